"""The engines by name."""

from __future__ import annotations

from typing import Any

from hf_rgm.attribution.linearized import LinearizedReplayEngine
from hf_rgm.attribution.replay import ReplayEngine

REPLAY_ENGINES = ("linearized_replay", "replay", "plain_replay")
ENGINES = ("adjoint", *REPLAY_ENGINES)
ENGINES_OF_ROWS = ("adjoint", "linearized_replay")


def check_engine(engine: str, known: tuple[str, ...] = ENGINES) -> None:
    """Raises a `ValueError` that names the known engines."""
    if engine not in known:
        raise ValueError(f"Unknown engine {engine!r}. Use one of {', '.join(known)}.")


def replay_engine(name: str, *parts: Any, **settings: Any) -> LinearizedReplayEngine | ReplayEngine:
    """
    Builds a replay engine.

    Args:
        name (`str`): `"linearized_replay"`, `"replay"` (anchored) or `"plain_replay"`.
        parts: Model, inputs, samples and trajectory.
        settings: What else the engine takes.

    Raises:
        ValueError: If there is no engine of that name.
    """
    check_engine(name, REPLAY_ENGINES)
    if name == "linearized_replay":
        return LinearizedReplayEngine(*parts, **settings)
    return ReplayEngine(*parts, anchored=name == "replay", **settings)
