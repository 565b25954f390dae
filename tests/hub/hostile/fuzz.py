"""
Feeds every loader with mutated folders, for minutes each:

    python -m tests.hub.hostile.fuzz --minutes 10 [--only synset] [--seed 0] [--findings FOLDER]

A loader may load what is left, which can then be looked at and saved, or raise an error that it announces and that
names the file, within the bounds of `tests/hub/hostile/bounds.py`. Everything else is a finding: it is printed with
its number, by which `--example NUMBER` repeats it, and its folder is kept. The test suite runs the first examples of
each loader, and those that found something.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import torch
import typer
from transformers import BertConfig, BertForSequenceClassification

import hf_rgm.files.reading
from hf_rgm import Attributor, FidelityReport
from hf_rgm.agreement.correlations import Estimate
from hf_rgm.agreement.fidelity_figures import Agreement, check_kept_report
from hf_rgm.cli.common import clear_errors, hide_bars
from hf_rgm.cli.loading import Loading
from hf_rgm.distillation.blocks import BlockStore
from hf_rgm.engines.row_scores import ScoreBlock, ScoreFolder
from hf_rgm.files.reading import ArtefactFolder
from hf_rgm.files.writing import write_json
from hf_rgm.testing import tiny_recorded_run, tiny_synset
from tests.hub.hostile.artefacts import ARTEFACTS, is_plain, is_refusal
from tests.hub.hostile.bounds import FREE, MEGABYTES, SECONDS, Taken, measured
from tests.hub.hostile.mutations import BY_SUFFIX, mutate
from tests.responses import tiny_responses

REPORT = FidelityReport(
    agreements={"lds_clusters": Agreement(Estimate(0.5, 0.25, 0.75), 6, Estimate(0.9, None, None))},
    engine="adjoint",
    objective="margin",
    num_queries=20,
    seeds=(1, 2),
    rows=False,
    samples_sha256="0" * 64,
    settings={"rewind": 0.5},
)
IDENTITY = {"settings": [1, 2], "model": "0" * 64}
BLOCK = ScoreBlock(range(0, 2), range(0, 5))


class Refused(ValueError):
    """A command that ended with one line."""


@dataclass(frozen=True)
class Loader:
    """How a folder is made, loaded, and looked at and saved to another, and which of its files are mutated."""

    make: Callable[[Path], object]
    load: Callable[[Path], Any]
    look: Callable[[Any, Path], object]
    files: str = "**/*"


def _artefact(name: str, files: str = "**/*", make: Callable[[Path], object] | None = None) -> Loader:
    artefact = ARTEFACTS[name]

    def load(folder: Path) -> Any:
        content = artefact.read(ArtefactFolder(folder))
        for trajectory in getattr(content, "trajectories", [content]):
            for step in getattr(trajectory, "state_steps", ()):
                trajectory.state(step)
        if getattr(content, "responses", None) is not None:
            content.responses.check()
        return content

    def look(content: Any, target: Path) -> None:
        artefact.look(content)
        artefact.save(content, target)

    return Loader(make or artefact.make, load, look, files)


def _make_synset(folder: Path) -> None:
    synset = tiny_synset()
    fidelity = replace(REPORT, samples_sha256=synset.samples_sha256).to_dict()
    replace(synset, responses=tiny_responses(), fidelity=fidelity).save_pretrained(folder)


def _load_report(folder: Path) -> FidelityReport:
    content = ArtefactFolder(folder).read_json("report.json", format_version=1)
    check_kept_report(content, f"`fidelity` of {folder}")
    return FidelityReport.from_dict(content)


def _make_report(folder: Path) -> None:
    folder.mkdir()
    write_json(folder / "report.json", REPORT.to_dict())


def _look_at_report(report: FidelityReport, target: Path) -> None:
    assert is_plain(str(report))
    write_json(target, report.to_dict())


def _make_blocks(folder: Path) -> None:
    BlockStore(folder, IDENTITY).write(range(0, 2), {"inputs": torch.randn(2, 3, 4), "log_weights": torch.zeros(2)})


def _load_blocks(folder: Path) -> Any:
    return BlockStore(folder, IDENTITY).read(range(0, 2))


def _make_scores(folder: Path) -> None:
    scores = ScoreFolder(folder, IDENTITY)
    scores.write(BLOCK, torch.randn(2, 5).numpy())
    shutil.copytree(scores.folder, folder / "blocks")
    scores.join([BLOCK], (2, 5))


def _load_scores(folder: Path) -> Any:
    scores = ScoreFolder(folder, IDENTITY)
    matrix = scores.matrix()
    for path in (folder / "blocks").iterdir():
        shutil.copy(path, scores.folder)
    return matrix.sum(), scores._read(BLOCK).sum()


def _make_model(folder: Path) -> None:
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3
    )
    model = BertForSequenceClassification(config)
    unlearned = Attributor(tiny_recorded_run().model, tiny_synset(), disable_tqdm=True).unlearn(
        ["class 0, first half"]
    )
    replace(unlearned, model=model).save_pretrained(folder)


def _load_model(folder: Path) -> Any:
    """The model as commands load it, whose errors are one line."""
    hide_bars(quiet=True)
    with contextlib.redirect_stderr(io.StringIO()) as told:
        try:
            with clear_errors():
                return Loading().model(str(folder))
        except typer.Exit:
            raise Refused(told.getvalue()) from None


def _nothing(content: Any, target: Path) -> None:
    """Nothing is left to look at."""


LOADERS = {
    "synset": _artefact("Synset", make=_make_synset),
    "responses": _artefact("Synset", "responses.safetensors", make=_make_synset),
    "trajectory": _artefact("Trajectory"),
    "states": _artefact("Trajectory", "states/*"),
    "steps": _artefact("Trajectory", "steps/*"),
    "clusters": _artefact("ClusterMap"),
    "result": _artefact("AttributionResult"),
    "fidelity": Loader(_make_report, _load_report, _look_at_report),
    "blocks": Loader(_make_blocks, _load_blocks, _nothing),
    "scores": Loader(_make_scores, _load_scores, _nothing),
    "unlearned": Loader(_make_model, _load_model, _nothing, "[cm]o*"),  # `unlearning.json` is read by nobody
}


class Fuzzer:
    """Examples of one loader; number and seed of one say all about it."""

    def __init__(self, name: str, scratch: Path, seed: int = 0) -> None:
        self.name, self.seed, self.loader = name, seed, LOADERS[name]
        self.folder, self.target, self._pristine = scratch / "folder", scratch / "target", scratch / "pristine"
        scratch.mkdir(exist_ok=True)
        self.loader.make(self._pristine)
        paths = sorted(path for path in self._pristine.glob(self.loader.files) if path.suffix in BY_SUFFIX)
        self._files = [path.relative_to(self._pristine).as_posix() for path in paths]
        self.largest = Taken()
        self.loader.look(self.loader.load(self._pristine), self.target)  # what is imported late, is

    def check(self, number: int, *, seconds: float = SECONDS) -> str:
        """What came of an example: `"loads"` or the name of an announced error. An `AssertionError` is a finding."""
        for folder in (self.folder, self.target):
            shutil.rmtree(folder, ignore_errors=True)
        self.target.unlink(missing_ok=True)
        shutil.copytree(self._pristine, self.folder)
        changed = mutate(Random(f"{self.name} {self.seed} {number}"), self.folder, self._files)
        content, outcome = None, "loads"
        with measured() as taken:
            try:
                content = self.loader.load(self.folder)
            except Exception as error:
                assert is_refusal(error) or isinstance(error, (Refused, FileExistsError)), _told(error)
                text, names = str(error), [str(self.folder), *(Path(name).name for name in changed)]
                assert is_plain(text.strip()) and any(name in text for name in names), f"{changed}: {_told(error)}"
                outcome = type(error).__name__
        self.largest = Taken(*map(max, astuple(self.largest), astuple(taken)))
        assert taken.seconds < seconds and taken.megabytes < MEGABYTES, f"took {taken}"
        if content is not None:
            self.loader.look(content, self.target)
        return outcome


def _told(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-3000:]


def _too_long(signal_number: int, frame: Any) -> None:
    raise AssertionError("took a minute")


def fuzz(name: str, seconds: float, seed: int, findings: Path, first: int = 0) -> None:
    """Tries examples for a time, prints what came of them, and keeps folders of findings."""
    logging.disable(logging.ERROR)
    signal.signal(signal.SIGALRM, _too_long)
    os.fsync = lambda descriptor: None  # type: ignore[assignment]
    hf_rgm.files.reading.psutil.virtual_memory = lambda: SimpleNamespace(available=FREE)
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        fuzzer, end = Fuzzer(name, Path(scratch), seed), time.monotonic() + seconds
        number = first
        while number == first or time.monotonic() < end:
            (findings / f"{name}.number").write_text(str(number))  # known if the process dies
            signal.alarm(60)
            try:
                outcomes[fuzzer.check(number)] += 1
            except Exception as problem:
                outcomes["FINDINGS"] += 1
                kept = findings / f"{name}-{number}"
                if fuzzer.folder.exists() and outcomes["FINDINGS"] <= 50:
                    shutil.copytree(fuzzer.folder, kept, dirs_exist_ok=True)
                    (kept / "finding.txt").write_text(_told(problem))
                sys.stdout.write(f"{name} {number}: {_told(problem).strip().splitlines()[-1][:300]}\n")
            signal.alarm(0)
            number += 1
        largest = f"{fuzzer.largest.seconds:.2f} s, {fuzzer.largest.megabytes:.0f} MB"
        told = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
        sys.stdout.write(f"{name}: {number - first} examples in {seconds / 60:g} minutes: {told}; at most {largest}\n")
        sys.stdout.flush()


def main() -> None:
    """Fuzzes the loaders one after the other, each in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m tests.hub.hostile.fuzz", description="Fuzzes loaders.")
    parser.add_argument("--minutes", type=float, default=10, help="for each loader")
    parser.add_argument("--only", choices=LOADERS, action="append", help="loader; may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--example", type=int, help="only this one")
    parser.add_argument("--findings", type=Path, help="folder for what was found; by default a new temporary one")
    options = parser.parse_args()
    findings = options.findings or Path(tempfile.mkdtemp(prefix="hf-rgm-findings-"))
    findings.mkdir(parents=True, exist_ok=True)
    seconds = 60 * options.minutes if options.example is None else 0
    for name in options.only or LOADERS:
        arguments = (name, seconds, options.seed, findings, options.example or 0)
        process = multiprocessing.get_context("fork").Process(target=fuzz, args=arguments)
        process.start()
        process.join()
        if process.exitcode:
            number = (findings / f"{name}.number").read_text()
            sys.stdout.write(f"{name} {number}: THE PROCESS DIED with {process.exitcode}\n")
    sys.stdout.write(f"Findings are in {findings}.\n")


if __name__ == "__main__":
    main()
