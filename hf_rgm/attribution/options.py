"""Options that a method passes on: type checkers, editors and `help()` list those of the method that takes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def keywords_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Keyword-only arguments of a function."""
    parameters = inspect.signature(function).parameters
    return {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def passes_options_to(
    target: Callable[Concatenate[Any, Parameters], Any],
) -> Callable[[Callable[..., Result]], Callable[Concatenate[Any, Parameters], Result]]:
    """Gives a method with `**options` the keyword arguments of the method that it passes them to."""

    def decorate(method: Callable[..., Result]) -> Callable[Concatenate[Any, Parameters], Result]:
        own = inspect.signature(method)
        kept = {name: p for name, p in own.parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
        passed = [parameter for name, parameter in keywords_of(target).items() if name not in kept]
        method.__signature__ = own.replace(parameters=[*kept.values(), *passed])  # type: ignore[attr-defined]
        return method

    return decorate
