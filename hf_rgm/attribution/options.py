"""Options that several public methods take and pass on: for type checkers, and for `help()`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from hf_rgm.engines.objectives import Objective
from hf_rgm.model.row_reader import DataCollator

Method = TypeVar("Method", bound=Callable[..., Any])


class AttributionOptions(TypedDict, total=False):
    """Those of [`Attributor.attribute`]."""

    engine: str | None
    objective: str | Objective
    rows: Any
    data_collator: DataCollator | None
    rewind: float | None
    num_masks: int | None
    seed: int
    query_ids: Sequence[Any] | None
    output_dir: str | Path | None


class CallOptions(AttributionOptions, total=False):
    """Those of a call of the pipeline: `batch_size` and `num_workers` change nothing."""

    batch_size: int | None
    num_workers: int | None


class UnlearningOptions(TypedDict, total=False):
    """Those of [`Attributor.unlearn`]."""

    engine: str | None
    rows: Any
    queries: Any
    data_collator: DataCollator | None
    rewind: float | None


class MixtureOptions(TypedDict, total=False):
    """Those of [`Attributor.suggest_mixture`]."""

    objective: str | Objective
    maximize: bool | None
    max_change: float
    min_agreement: float | None
    rows: Any
    data_collator: DataCollator | None
    rewind: float | None


def keywords_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The arguments that a function takes by keyword only."""
    parameters = inspect.signature(function).parameters
    return {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def passes_options_to(target: Callable[..., Any]) -> Callable[[Method], Method]:
    """
    Makes the signature of a method with `**options` show the keyword arguments of what it passes them to.

    So that `help()` and editors list them, while names, defaults and checks stay in one place.

    Args:
        target (`Callable`): What the options are passed to.
    """

    def decorate(method: Method) -> Method:
        own = inspect.signature(method)
        kept = {name: p for name, p in own.parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
        passed = [parameter for name, parameter in keywords_of(target).items() if name not in kept]
        method.__signature__ = own.replace(parameters=[*kept.values(), *passed])  # type: ignore[attr-defined]
        return method

    return decorate
