"""
What loading a folder may take, and the command that measures it for every folder of the gallery:

    python -m tests.hub.hostile.bounds

It prints the folders that took the most seconds and megabytes, and fails if one took more than it may. The tests
assert the megabytes.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import hf_rgm.files.reading
from hf_rgm.files.reading import ArtefactFolder
from tests.hub.hostile.artefacts import ARTEFACTS, REFUSALS

SECONDS, MEGABYTES = 5.0, 300.0
FREE = 8 * 10**9
"""Bytes of memory that are said to be free."""

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Taken:
    """Processor time, and memory beyond what was in use before; none where the system does not tell."""

    seconds: float = 0.0
    megabytes: float = 0.0


@contextlib.contextmanager
def measured() -> Iterator[Taken]:
    """What the block takes, known when it ends, however it does."""
    taken = Taken()
    if _RESET.exists():
        _RESET.write_text("5")  # the peak is what is in use now
    before, start = _kilobytes("VmRSS"), time.process_time()  # others may use the machine
    try:
        yield taken
    finally:
        taken.seconds = time.process_time() - start
        taken.megabytes = (_kilobytes("VmHWM") - before) / 1024


def _kilobytes(what: str) -> int:
    lines = _STATUS.read_text().splitlines() if _RESET.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith(what)), 0)


def main() -> int:
    """Loads every folder, prints the extremes, and returns how many took more than they may."""
    from tests.hub.hostile.cases import CASES
    from tests.hub.hostile.test_memory import CASES as SIZES

    logging.disable(logging.ERROR)
    hf_rgm.files.reading.psutil.virtual_memory = lambda: SimpleNamespace(available=FREE)
    gallery = [(case.artefact, case.done, case.edit) for case in CASES]
    gallery += [(name, done, edit) for done, (name, edit, _) in SIZES.items()]
    found = []
    for name, done, edit in gallery:
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(shutil.copytree(ARTEFACTS[name].pristine, Path(parent) / "folder"))
            edit(folder)
            with measured() as taken, contextlib.suppress(*REFUSALS):
                content = ARTEFACTS[name].read(ArtefactFolder(folder))
                if getattr(content, "responses", None) is not None:
                    content.responses.check()
            found.append((taken, f"{name}: {done}"))
    for unit in ("seconds", "megabytes"):
        for taken, what in sorted(found, key=lambda item: -getattr(item[0], unit))[:3]:
            sys.stdout.write(f"{getattr(taken, unit):.2f} {unit}: {what}\n")
    over = sum(taken.seconds >= SECONDS or taken.megabytes >= MEGABYTES for taken, _ in found)
    sys.stdout.write(f"{len(found)} folders, {over} over {SECONDS:g} s or {MEGABYTES:g} MB\n")
    return over


if __name__ == "__main__":
    sys.exit(main())
