"""Real processes, joined by gloo on the CPU: what several do together is what one does alone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hf_rgm import Attributor, DistillationConfig, ReverseGradientMatchingDistiller
from hf_rgm.distillation.blocks import BlockStore
from hf_rgm.engines import row_scores
from hf_rgm.engines.row_scores import ScoreFolder
from hf_rgm.model.processes import Processes
from hf_rgm.testing import tiny_recorded_run, tiny_synset

ROOT = Path(__file__).parents[2]
TOLERANCE = {"rtol": 5e-4, "atol": 5e-6}
"""Masks, queries and rows go together in other numbers, so float32 sums are in another order at each of 48 steps."""

CONFIG = DistillationConfig(num_iterations=20, cluster_block_size=4)
"""Two blocks, of four clusters and two."""

QUESTIONS = {
    "linearised": {},
    "replayed halves": {"engine": "replay", "num_masks": 7},
    "adjoint of one value": {"engine": "adjoint", "objective": "mean_loss"},
    "rows": {"rows": True},
    "rows by the adjoint": {"engine": "adjoint", "rows": True},
}

SCRIPT = """
import contextlib, io, os, sys
from pathlib import Path
import numpy as np
from hf_rgm import Attributor, ReverseGradientMatchingDistiller, Synset
from hf_rgm.engines import row_scores
from hf_rgm.model.processes import Processes
from hf_rgm.testing import TinyModel, tiny_dataset
from tests.model.test_processes import CONFIG, QUESTIONS

folder, expected = Path(sys.argv[1]), int(sys.argv[2])
model, train, queries = TinyModel.from_pretrained(folder / "model"), tiny_dataset(48, seed=0), tiny_dataset(12, seed=1)
row_scores.MAX_BLOCK_ROWS = 9
processes = Processes()
rank = processes.index
assert processes.count == int(os.environ["WORLD_SIZE"]) == expected, processes.count

# An error of one reaches all, and they can go on.
def fail_on_the_last(item):
    if rank == expected - 1:
        raise ZeroDivisionError(f"item {item}")
    return item

try:
    processes.map(fail_on_the_last, range(7))
    raise SystemExit("nobody noticed")
except ZeroDivisionError:
    assert rank == expected - 1
except RuntimeError as error:
    assert rank != expected - 1
    assert f"Process {expected - 1} of {expected} failed" in str(error) and "ZeroDivisionError: item" in str(error)
assert processes.map(lambda item: item * item, range(5)) == [0, 1, 4, 9, 16]
assert processes.map(str, []) == []
assert processes.map(lambda item: rank, range(1)) == [0]

loaded = Synset.from_pretrained(folder / "synset")
shown = io.StringIO()
with contextlib.redirect_stderr(shown):
    synset = ReverseGradientMatchingDistiller(
        model, folder / "trajectory", train, loaded.clusters, config=CONFIG, output_dir=folder / "blocks"
    ).distill()
    results = {f"samples {name}": tensor.numpy() for name, tensor in synset.samples.named_tensors().items()}
    attributor = Attributor(model, loaded)
    for name, options in QUESTIONS.items():
        options = {**options, **({"rows": train} if options.get("rows") else {})}
        result = attributor.attribute(queries, **options)
        results[name] = result.scores
        if result.row_scores is not None:
            results[f"scores of {name}"] = result.row_scores
    result = attributor.attribute(queries, engine="adjoint", rows=train, output_dir=folder / "scores")
    results["scores in a folder"] = np.array(result.row_scores)
for bar in ("Distilling", "Replaying", "Scoring rows"):
    assert (bar in shown.getvalue()) == (rank == 0), (rank, shown.getvalue())
np.savez(folder / f"results-{rank}.npz", **results)
"""

DYING = """
import os, sys, time
from hf_rgm.model.processes import Processes

processes = Processes()
def work(item):
    if processes.index == 1:
        os._exit(3)
    time.sleep(0.5)
processes.map(work, range(4))
"""


def launch(tmp_path, script, count, *arguments):
    path = tmp_path / "script.py"
    path.write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(path), *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=280
    )


def distiller(folder=None):
    run = tiny_recorded_run()
    return ReverseGradientMatchingDistiller(
        run.model, run.trajectory, run.train_dataset, run.clusters, config=CONFIG, output_dir=folder, disable_tqdm=True
    )


@pytest.fixture(scope="module")
def alone():
    """What one process finds."""
    run = tiny_recorded_run()
    results = {f"samples {name}": t.numpy() for name, t in distiller().distill().samples.named_tensors().items()}
    attributor = Attributor(run.model, tiny_synset(), disable_tqdm=True)
    for name, options in QUESTIONS.items():
        options = {**options, **({"rows": run.train_dataset} if options.get("rows") else {})}
        result = attributor.attribute(run.queries, **options)
        results[name] = result.scores
        if result.row_scores is not None:
            results[f"scores of {name}"] = result.row_scores
    results["scores in a folder"] = results["scores of rows by the adjoint"]
    return results


def stop_after_first(monkeypatch, owner, work):
    """Work that is killed at its second block."""
    write, count = owner.write, []

    def killed(*arguments):
        if count:
            raise KeyboardInterrupt
        count.append(None)
        return write(*arguments)

    with monkeypatch.context() as context:
        context.setattr(owner, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            work()


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_continue_and_find_what_one_finds(tmp_path, monkeypatch, alone, count):
    """One process began both the distillation and the scores of rows; two distil, so that the third has nothing to."""
    run = tiny_recorded_run()
    run.model.save_pretrained(tmp_path / "model")
    run.trajectory.save(tmp_path / "trajectory")
    tiny_synset().save_pretrained(tmp_path / "synset")
    stop_after_first(monkeypatch, BlockStore, lambda: distiller(tmp_path / "blocks").distill())
    monkeypatch.setattr(row_scores, "MAX_BLOCK_ROWS", 9)
    attributor = Attributor(run.model, tiny_synset(), disable_tqdm=True)
    options = {"engine": "adjoint", "rows": run.train_dataset, "output_dir": tmp_path / "scores"}
    stop_after_first(monkeypatch, ScoreFolder, lambda: attributor.attribute(run.queries, **options))
    begun = {path: path.stat().st_mtime_ns for path in (tmp_path / "blocks").glob("block-*")}
    done = launch(tmp_path, SCRIPT, count, tmp_path, count)
    assert done.returncode == 0, done.stderr
    assert len(begun) == 1 and all(path.stat().st_mtime_ns == time for path, time in begun.items())
    assert len(list((tmp_path / "scores").iterdir())) == 1
    first, *others = (dict(np.load(tmp_path / f"results-{rank}.npz")) for rank in range(count))
    assert first.keys() == alone.keys()
    for name, expected in alone.items():
        np.testing.assert_allclose(first[name], expected, **TOLERANCE, err_msg=name)
        for other in others:
            np.testing.assert_array_equal(other[name], first[name], err_msg=name)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run(tmp_path):
    begun = time.monotonic()
    done = launch(tmp_path, DYING, 2)
    assert done.returncode != 0
    assert "exitcode  : 3" in done.stderr
    assert time.monotonic() - begun < 120


def test_parts_are_equal_and_enough_for_all(monkeypatch):
    processes = Processes()
    assert processes.count == 1 and processes.is_main and processes.shows_progress
    assert processes.parts(10, at_most=4) == [range(0, 4), range(4, 8), range(8, 10)]
    monkeypatch.setattr(Processes, "count", 3)
    assert processes.parts(10, at_most=100) == [range(0, 4), range(4, 8), range(8, 10)]
    assert processes.parts(2, at_most=100) == [range(0, 1), range(1, 2)]
    assert processes.parts(0, at_most=100) == []


def test_alone_errors_are_the_works_own():
    with pytest.raises(ZeroDivisionError):
        Processes().map(lambda item: 1 // item, [0])


KILLED = """
import os, sys, datetime
import hf_rgm.model.processes as processes

processes.JOINING = datetime.timedelta(seconds=5)
together = processes.Processes()
killed = together.index == int(sys.argv[1])
if killed and sys.argv[2] == "before":
    os._exit(9)
def work(item):
    if killed:
        os._exit(9)
    return item
try:
    together.map(work, range(2))
except RuntimeError as error:
    sys.stdout.write(str(error))
    os._exit(0)
"""


@pytest.mark.parametrize("when", ["before", "meanwhile"])
@pytest.mark.parametrize("killed", [0, 1])
def test_without_a_launcher_a_killed_process_is_noticed(tmp_path, killed, when):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", KILLED, str(killed), when],
            env={**os.environ, **shared, "PYTHONPATH": str(ROOT), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=120)[0] for process in started]
    other = 1 - killed
    assert [process.returncode for process in started] == ([9, 0] if killed == 0 else [0, 9])
    assert f"Process {other} of 2 no longer waits for the others: one ended" in told[other]
