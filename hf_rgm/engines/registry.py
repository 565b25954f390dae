"""The engines by name, and which of them fits a question."""

from __future__ import annotations

from hf_rgm.engines.adjoint import AdjointEngine
from hf_rgm.engines.anchored_replay import AnchoredReplayEngine
from hf_rgm.engines.engine import Engine
from hf_rgm.engines.kept_responses import ResponsesEngine
from hf_rgm.engines.linear import LinearEngine
from hf_rgm.engines.plain_replay import PlainReplayEngine
from hf_rgm.engines.training_on import TrainingOnEngine

ENGINES: dict[str, type[Engine]] = {
    engine.name: engine
    for engine in (
        LinearEngine,
        AdjointEngine,
        AnchoredReplayEngine,
        PlainReplayEngine,
        TrainingOnEngine,
        ResponsesEngine,
    )
}

REPLAYS = tuple(name for name, engine in ENGINES.items() if engine.replays)
"""Those that give models under any cluster weights."""

MISSING = {
    "rows": "the training dataset: pass it as `rows`",
    "samples": 'a synset: distil one, or use `engine="linearized_replay"`',
    "responses": "a synset that keeps responses: distil it with `DistillationConfig(responses=...)`",
}


def default_engine(available: dict[str, bool], *, rewind: float | None = None, num_masks: int | None = None) -> str:
    """
    The engine where none is named: what the synset's author computed from the rows, where these are not at hand.

    That was computed once, from one rewind point: other questions go to linearised replay.
    """
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
    """
    The engine of a name, once it is seen to be able to do what is asked.

    Args:
        name (`str`): The engine.
        available (`dict[str, bool]`): Whether there are `"rows"`, `"samples"` and `"responses"`.
        rewind (`float`, *optional*): The rewind point that is asked for.
        num_masks (`int`, *optional*): Random halves that are asked for.
        rows_given (`bool`, *optional*, defaults to `False`): Whether the question itself comes with rows.
        replays (`bool`, *optional*, defaults to `False`): Whether models are asked for.

    Raises:
        ValueError: If there is no such engine, or it cannot; says what can.
    """
    known = REPLAYS if replays else tuple(ENGINES)
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
