"""What a trajectory's JSON file says of the run."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hf_rgm.files.reading import ArtefactFolder

FORMAT_VERSION = 2
METADATA_FILE = "trajectory.json"
FROM_CHECKPOINTS = "from_checkpoints"
"""Key of a trajectory's metadata: what had to be assumed of a run that was not recorded."""
MAX_METADATA_BYTES = 8_000_000
MAX_UPDATES = 2**53
"""Larger numbers are not exact in the float64 of bias corrections."""


@dataclass
class Description:
    """Required keys of a finished trajectory's JSON file."""

    format_version: int
    complete: bool
    optimizer: dict[str, Any]
    parameters: dict[str, list[int]]
    num_rows: int
    dataset_fingerprint: str
    num_steps: int
    state_steps: list[int]


@dataclass
class Metadata:
    """Optional keys that are used in computations."""

    updates_before: int = 0
    fingerprint_columns: list[str] | None = None
    seeds: dict[str, int | None] | None = None
    num_digested_rows: int = 0
    rows_sha256: str | None = None
    states_sha256: dict[str, str] | None = None
    architecture: dict[str, str] | None = None
    frozen_sha256: str | None = None
    trained_loss: dict[str, Any] | None = None
    initial_loss: float | None = None  # where the initial state is not recorded

    def __post_init__(self) -> None:
        if not 0 <= self.updates_before <= MAX_UPDATES:
            raise ValueError(f"updates_before must be from 0 to {MAX_UPDATES}, got {self.updates_before}")
        if self.num_digested_rows < 0:
            raise ValueError(f"num_digested_rows must not be negative, got {self.num_digested_rows}")


OWN_KEYS = tuple(item.name for item in fields(Description))


def has_checkpoints(folder: str | Path) -> bool:
    """Whether a folder holds checkpoints of a `Trainer` and no trajectory."""
    folder = Path(folder)
    return not (folder / METADATA_FILE).is_file() and any(folder.glob("checkpoint-*/trainer_state.json"))


def read_metadata(folder: ArtefactFolder) -> dict[str, Any]:
    """Reads the description of a trajectory, complete or not."""
    if not folder.root.is_dir() and not folder.is_remote:
        raise FileNotFoundError(
            f"There is no folder {folder}. Record a training run with `TrajectoryCallback({str(folder)!r})` first."
        )
    options: dict[str, Any] = {"format_version": FORMAT_VERSION, "max_bytes": MAX_METADATA_BYTES}
    content = folder.read_json(METADATA_FILE, **options, again="record the training run again")
    missing = [key for key in OWN_KEYS if key not in content]
    if missing:
        raise ValueError(
            f"{folder}/{METADATA_FILE} lacks {', '.join(missing)}. Copy the folder again, or record the training run "
            "again."
        )
    return content
