"""What a file announces is checked before memory is taken for it, measured in processes of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub.hostile.artefacts import ARTEFACTS
from tests.hub.hostile.damage import HUNDRED_GB
from tests.hub.hostile.edits import Edit, all_of, header, in_text, one_huge_tensor, set_json, text

ROOT = Path(__file__).resolve().parents[3]
REFUSED, LOADED = 200, 300
"""Megabytes that refusing and loading may take at most, beside the libraries; Arrow and its pools take some tens."""

LOAD = """
import re, sys
from types import SimpleNamespace
import hf_rgm.files.reading
from tests.hub.hostile.artefacts import ARTEFACTS
from hf_rgm.files.reading import ArtefactFolder

def kilobytes(what):
    return int(re.search(what + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

hf_rgm.files.reading.psutil.virtual_memory = lambda: SimpleNamespace(available=8 * 10**9)
ARTEFACTS["Synset"].read(ArtefactFolder(sys.argv[1]))
for name, folder in zip(sys.argv[2::2], sys.argv[3::2]):
    open("/proc/self/clear_refs", "w").write("5")  # the peak is what is in use now
    before = kilobytes("VmRSS")
    try:
        ARTEFACTS[name].read(ArtefactFolder(folder))
        outcome = "loads"
    except (ValueError, MemoryError) as error:
        outcome = type(error).__name__
    sys.stdout.write(f"{outcome} {kilobytes('VmHWM') - before}\\n")
"""


def unknown_key(name: str, content: str) -> Edit:
    """Adds a key that nobody reads to a JSON file."""
    return in_text(name, "{", '{"unknown": ' + content + ",")


def empty_tensors(name: str, count: int) -> Edit:
    """A file of so many tensors without elements."""

    def edit(folder: Path) -> None:
        told = ",".join(f'"{k:07d}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for k in range(count))
        content = ("{" + told + "}").encode()
        (folder / name).write_bytes(len(content).to_bytes(8, "little") + content)

    return edit


CASES: dict[str, tuple[str, Edit, str]] = {
    "samples of 120 GB, announced in both files": (
        "Synset",
        all_of(
            set_json("synset.json", ("tensors", "inputs"), [6, 10**9, 5]),
            one_huge_tensor("synset.safetensors", "inputs", [6, 10**9, 5]),
        ),
        "MemoryError",
    ),
    "a state of 100 GB, announced in both files": (
        "Trajectory",
        all_of(
            set_json("trajectory.json", ("parameters", "hidden.weight"), HUNDRED_GB),
            one_huge_tensor("states/step-00000000.safetensors", "parameters.hidden.weight", HUNDRED_GB),
        ),
        "MemoryError",
    ),
    "10**8 rows, announced in both files, of which there are 12": (
        "ClusterMap",
        all_of(
            set_json("clusters.json", ("num_rows",), 10**8),
            header(
                "clusters.safetensors",
                lambda told: told["cluster_ids"].update(shape=[10**8], data_offsets=[0, 8 * 10**8]),
            ),
        ),
        "ValueError",
    ),
    "clusters of 100 GB, announced in both files": (
        "ClusterMap",
        all_of(
            set_json("clusters.json", ("num_rows",), 12_500_000_000),
            one_huge_tensor("clusters.safetensors", "cluster_ids", [12_500_000_000], "I64"),
        ),
        "MemoryError",
    ),
    "learning rates of 100 GB": (
        "Trajectory",
        one_huge_tensor("steps/part-00000000.safetensors", "learning_rates", [48, 260_416_667], "F64"),
        "MemoryError",
    ),
    "scores of 100 GB, announced in the JSON file only": (
        "AttributionResult",
        set_json("attribution.json", ("num_rows",), 12_500_000_000),
        "ValueError",
    ),
    "a header of 2**62 bytes": (
        "AttributionResult",
        text("attribution.safetensors", (2**62).to_bytes(8, "little") + b"{}"),
        "ValueError",
    ),
    "an unknown key of 31 MB of lists": (
        "Synset",
        unknown_key("synset.json", "[" + "[]," * 10_000_000 + "[]]"),
        "ValueError",
    ),
    "an unknown key of 800,000 objects": (
        "AttributionResult",
        unknown_key("attribution.json", "[" + "{}," * 800_000 + "{}]"),
        "loads",
    ),
    "unknown keys in three files, each half of what all may take": (
        "Synset",
        all_of(
            *(
                unknown_key(name, "[" + "{}," * 600_000 + "{}]")
                for name in ("synset.json", "clusters/clusters.json", "trajectories/0/trajectory.json")
            )
        ),
        "ValueError",
    ),
    "an unknown text of 31 MB, in characters of four bytes": (
        "ClusterMap",
        unknown_key("clusters.json", '"\U0001f600' + "x" * 30_000_000 + '"'),
        "loads",
    ),
    "a million tensors without elements": (
        "Trajectory",
        empty_tensors("states/step-00000048.safetensors", 1_000_000),
        "ValueError",
    ),
    "100,000 tensors without elements": (
        "Trajectory",
        empty_tensors("states/step-00000048.safetensors", 100_000),
        "ValueError",
    ),
    "JSON of 100 GB": (
        "ClusterMap",
        lambda folder: os.truncate(folder / "clusters.json", 10**11),
        "MemoryError",
    ),
}


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peaks of memory are read from /proc")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, float]]:
    """Error and megabytes of each case, one after the other in one process."""
    arguments = [str(ARTEFACTS["Synset"].pristine)]
    for name, edit, _ in CASES.values():
        folder = Path(shutil.copytree(ARTEFACTS[name].pristine, tmp_path_factory.mktemp("case") / "folder"))
        edit(folder)
        arguments += [name, str(folder)]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    return {what: (error, int(size) / 1024) for what, (error, size) in zip(CASES, lines, strict=True)}


@pytest.mark.parametrize("what", list(CASES))
def test_memory_is_not_taken_for_what_is_only_announced(what, outcomes, outcome_of):
    name, _, expected = CASES[what]
    error, megabytes = outcomes[what]
    limit = LOADED if expected == "loads" else REFUSED
    assert error == expected and megabytes < limit
    outcome_of(name, f"announces or has {what}", f"{error}, within {limit} MB")
