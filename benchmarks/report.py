"""The JSON of a benchmark: written after every method, continued by a later run, never mixed up."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hf_rgm.files.writing import write_json

FORMAT_VERSION = 2
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "numpy",
    "scipy",
    "scikit-learn",
    "captum",
    "dattri",
    "kronfluence",
    "traker",
)
CODE = ("hf_rgm", "benchmarks", "pyproject.toml", "constraints.txt", ":!benchmarks/results", ":!*.md")


class Report:
    """
    Results of the methods on one task.

    Args:
        path (`Path`): The JSON file; results already there are kept.
        header (`dict`): What the results depend on, under `"identity"`, and what describes them.
        order (`list[str]`): Methods in the order of the tables.
        anew (`bool`, *optional*, defaults to `False`): Discard results already there.

    Raises:
        ValueError: If the file holds results of another run, task or versions; says which and what to do.
    """

    def __init__(self, path: Path, header: dict[str, Any], order: list[str], *, anew: bool = False) -> None:
        self.path = path
        self._order = order
        self.content: dict[str, Any] = {"format_version": FORMAT_VERSION, **header, "methods": {}}
        if path.is_file() and not anew:
            found = json.loads(path.read_text(encoding="utf-8"))
            differences = _differences(found, self.content)
            if differences:
                raise ValueError(
                    f"{path} holds results that cannot be continued: {'; '.join(differences)}. Pass --anew to discard "
                    "them, or --output to write elsewhere."
                )
            self.content["versions"] = found["versions"] | self.content["versions"]
            self.content["methods"] = found["methods"]

    def entry(self, name: str) -> dict[str, Any] | None:
        """The result of a method, or `None`."""
        return self.content["methods"].get(name)

    def put(self, name: str, entry: dict[str, Any]) -> None:
        """Adds or replaces the result of a method and writes the file."""
        methods = self.content["methods"] | {name: entry}
        rank = {name: index for index, name in enumerate(self._order)}
        self.content["methods"] = dict(sorted(methods.items(), key=lambda item: rank.get(item[0], len(rank))))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.content)


def _differences(found: dict[str, Any], own: dict[str, Any]) -> list[str]:
    if found.get("format_version") != FORMAT_VERSION:
        return [f"they have format version {found.get('format_version')}, not {FORMAT_VERSION}"]
    return [
        f"{name} was {before[name]!r} and is {value!r}"
        for before, now in ((found["identity"], own["identity"]), (found["versions"], own["versions"]))
        for name, value in now.items()
        if name in before and before[name] != value
    ]


def versions() -> dict[str, str]:
    """Python's version and those of the packages that are installed, peers among them."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, Any]:
    """Commit, whether the code differs from it, processor, its cores and the threads that are used."""
    commit = _git("rev-parse", "HEAD")
    return {
        "commit": commit,
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", *CODE)) if commit else None,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    description = Path("/proc/cpuinfo")
    if description.is_file():
        for line in description.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
