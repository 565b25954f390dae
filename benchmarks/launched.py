"""The part of `benchmarks.growth` that several launched processes do together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.models import SmallCnnForImageClassification
from benchmarks.report import ROOT
from hf_rgm.files.writing import write_json


def launched(folder: Path, setup: dict[str, Any], recipe: dict[str, Any]) -> list[dict[str, float]]:
    """
    Distils and attributes on `setup["num_processes"]` processes of one thread each.

    Args:
        folder (`Path`): Holds `model`, `trajectory` and `pictures.npz`.
        setup, recipe (`dict`): Fields of the point and of what is the same everywhere.

    Returns:
        `list[dict[str, float]]`: costs of each process.

    Raises:
        RuntimeError: If the processes fail, with what they said.
    """
    count = setup["num_processes"]
    write_json(folder / "task.json", {"setup": setup, "recipe": recipe})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    done = subprocess.run(
        [*command, "-m", "benchmarks.launched", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{count} processes failed:\n{done.stderr}")
    return [json.loads((folder / f"costs-{index}.json").read_text()) for index in range(count)]


def work(folder: Path) -> None:
    """What each process does."""
    from benchmarks.growth import Pictures, Recipe, Setup, distil_and_attribute

    task = json.loads((folder / "task.json").read_text())
    setup = Setup(**{**task["setup"], "hidden_sizes": tuple(task["setup"]["hidden_sizes"])})
    with np.load(folder / "pictures.npz") as arrays:
        pictures = Pictures(**arrays)
    model = SmallCnnForImageClassification.from_pretrained(folder / "model")
    costs = distil_and_attribute(model, folder / "trajectory", setup, Recipe(**task["recipe"]), pictures)
    write_json(folder / f"costs-{os.environ['RANK']}.json", costs)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    work(Path(sys.argv[1]))
