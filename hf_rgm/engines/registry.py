"""Engines by name, and which of them fits a question."""

from __future__ import annotations

from hf_rgm.engines.adjoint import AdjointEngine
from hf_rgm.engines.anchored_replay import AnchoredReplayEngine
from hf_rgm.engines.engine import Engine
from hf_rgm.engines.kept_responses import ResponsesEngine
from hf_rgm.engines.linear import LinearEngine
from hf_rgm.engines.training_on import TrainingOnEngine

_CLASSES: tuple[type[Engine], ...] = (
    LinearEngine,
    AdjointEngine,
    AnchoredReplayEngine,
    TrainingOnEngine,
    ResponsesEngine,
)
ENGINES = {engine.name: engine for engine in _CLASSES}

MISSING = {
    "rows": "the training dataset: pass it as `rows`",
    "samples": 'a synset: distil one, or use `engine="linearized_replay"`',
    "responses": "a synset that keeps responses: distil it with `DistillationConfig(responses=...)`",
}


def default_engine(available: dict[str, bool], *, rewind: float | None = None, num_masks: int | None = None) -> str:
    """Name of the engine where the user names none: responses if rows are missing, else linearised replay."""
    # Responses were computed once, from one rewind point.
    kept = available["responses"] and not available["rows"] and rewind is None and num_masks is None
    return ResponsesEngine.name if kept else LinearEngine.name


def check_engine(
    name: str,
    *,
    available: dict[str, bool],
    rewind: float | None = None,
    num_masks: int | None = None,
    rows_given: bool = False,
    replays: bool = False,
) -> type[Engine]:
    """Engine of a name; raises a `ValueError` that says what can be done, if it cannot do what is asked."""
    known = [other for other, kind in ENGINES.items() if kind.replays or not replays]
    if name not in known:
        raise ValueError(f"Unknown engine {name!r}. Use one of {', '.join(known)}.")
    engine = ENGINES[name]
    if rows_given and not engine.takes_rows:
        takers = [other for other, kind in ENGINES.items() if kind.takes_rows]
        raise ValueError(f"`rows` are for engines {', '.join(takers[:-1])} and {takers[-1]}, got {name!r}.")
    if engine.needs and not available[engine.needs]:
        raise ValueError(f"`engine={name!r}` needs {MISSING[engine.needs]}.")
    if rewind is not None and not 0 <= rewind < 1:
        raise ValueError(f"`rewind` must be at least 0 and below 1 (a fraction of training), got {rewind}.")
    if rewind is not None and engine is ResponsesEngine:
        raise ValueError(
            f"`rewind` = {rewind} cannot be had of responses, which were computed once. Leave it out, or use "
            '`engine="linearized_replay"`.'
        )
    if num_masks is not None and not engine.replays:
        raise ValueError(f'`num_masks` = {num_masks} is for replay engines; `engine="{name}"` needs no masks.')
    if num_masks is not None and num_masks < 2:
        raise ValueError(f"`num_masks` must be at least 2, got {num_masks}. Use several times the clusters.")
    return engine
