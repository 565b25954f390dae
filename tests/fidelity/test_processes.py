from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from hf_rgm.fidelity.launch import Launch
from hf_rgm.fidelity.retraining import retrain
from hf_rgm.testing import tiny_dataset, tiny_trainer

ROOT = Path(__file__).parents[2]
DATASET, QUERIES = tiny_dataset(12, seed=0), tiny_dataset(5, seed=1)
SUBSETS = [np.arange(12), [0, 1, 2, 5, 8], [3, 4, 9]]

SCRIPT = """
import os, sys, time
from pathlib import Path
import numpy as np
import torch
from hf_rgm.fidelity.retraining import retrain
from hf_rgm.testing import tiny_dataset, tiny_trainer

folder, rank = Path(sys.argv[1]), os.environ["RANK"]
assert os.environ["WORLD_SIZE"] == "2"

def build(dataset, seed):
    (folder / f"began-{rank}").touch()
    while len(list(folder.glob("began-*"))) < 2:
        time.sleep(0.05)
    trainer = tiny_trainer(dataset, seed, num_train_epochs=1)
    assert trainer.args.world_size == 1 and not torch.distributed.is_initialized()
    (folder / f"trained-{rank}-{len(dataset)}").touch(exist_ok=False)
    return trainer

values = retrain(
    build,
    tiny_dataset(12, seed=0),
    [np.arange(12), [0, 1, 2, 5, 8], [3, 4, 9]],
    tiny_dataset(5, seed=1),
    output_dir=folder / "retrainings",
    disable_tqdm=True,
)
np.save(folder / f"values-{rank}.npy", values)
"""

HOLDER = """
import sys, time
from filelock import FileLock

lock = FileLock(sys.argv[1])
lock.acquire()
print(flush=True)
time.sleep(600)
"""


def build(dataset, seed):
    return tiny_trainer(dataset, seed, num_train_epochs=1)


def refuse(dataset, seed):
    raise AssertionError("nothing is left to train")


@pytest.fixture
def launched(monkeypatch):
    """The environment of the second of two processes."""
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.slow
def test_two_processes_share_three_retrainings_and_both_return_them_all(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    trained = sorted(path.name.split("-")[1:] for path in tmp_path.glob("trained-*"))
    assert sorted(length for _, length in trained) == ["12", "3", "5"]
    assert {rank for rank, _ in trained} == {"0", "1"}
    alone = retrain(build, DATASET, SUBSETS, QUERIES, disable_tqdm=True)
    for rank in (0, 1):
        np.testing.assert_array_equal(np.load(tmp_path / f"values-{rank}.npy"), alone)
    assert sorted(path.suffix for path in (tmp_path / "retrainings").iterdir()) == [".npy"] * 3


def test_every_process_begins_with_its_share_and_ends_with_the_others():
    assert [Launch(rank, 3, 0).order(7) for rank in range(3)] == [
        [0, 3, 6, 1, 4, 2, 5],
        [1, 4, 2, 5, 0, 3, 6],
        [2, 5, 0, 3, 6, 1, 4],
    ]
    assert Launch(1, 2, 0).order(1) == [0]
    assert Launch(0, 1, 0).order(3) == [0, 1, 2]


def test_a_launch_is_read_from_the_environment(launched):
    assert Launch.from_environment() == Launch(index=1, count=2, local_index=1)


def test_without_a_launcher_there_is_one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Launch.from_environment() == Launch(0, 1, 0)


def test_one_launched_process_does_the_work_of_those_that_never_came(launched, tmp_path):
    alone = retrain(build, DATASET, SUBSETS, QUERIES, output_dir=tmp_path, disable_tqdm=True)
    assert os.environ["WORLD_SIZE"] == "2"
    np.testing.assert_array_equal(
        retrain(refuse, DATASET, SUBSETS, QUERIES, output_dir=tmp_path, disable_tqdm=True), alone
    )


def test_launched_processes_need_a_folder(launched):
    with pytest.raises(ValueError, match="`output_dir` is missing: 2 processes"):
        retrain(refuse, DATASET, SUBSETS, QUERIES, disable_tqdm=True)


def test_what_another_process_trains_is_waited_for_until_it_dies(tmp_path):
    first = retrain(build, DATASET, SUBSETS[:2], QUERIES, output_dir=tmp_path, disable_tqdm=True)
    lost = sorted(tmp_path.iterdir())[0]
    lost.unlink()
    process = subprocess.Popen([sys.executable, "-c", HOLDER, f"{lost}.lock"], stdout=subprocess.PIPE)
    process.stdout.readline()
    killed = threading.Event()

    def kill():
        killed.set()
        process.kill()

    def watched(dataset, seed):
        assert killed.is_set()
        return build(dataset, seed)

    timer = threading.Timer(1.0, kill)
    timer.start()
    again = retrain(watched, DATASET, SUBSETS[:2], QUERIES, output_dir=tmp_path, disable_tqdm=True)
    process.wait()
    assert lost.is_file()
    np.testing.assert_array_equal(again, first)


@pytest.fixture
def process_group():
    store = tempfile.mktemp()
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_processes_that_were_joined_are_refused(launched, process_group, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="2 processes itself, but they have been joined already.*script of its own"):
        retrain(refuse, DATASET, SUBSETS, QUERIES, output_dir=tmp_path, disable_tqdm=True)


def test_launchers_that_split_models_are_refused(launched, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(NotImplementedError, match="ACCELERATE_USE_FSDP is set.*Launch without it"):
        retrain(refuse, DATASET, SUBSETS, QUERIES, output_dir=tmp_path, disable_tqdm=True)


def test_a_trainer_that_trains_with_others_is_refused():
    joined = SimpleNamespace(args=SimpleNamespace(world_size=2))
    with pytest.raises(RuntimeError, match="on 2 processes together"):
        retrain(lambda dataset, seed: joined, DATASET, SUBSETS, QUERIES, disable_tqdm=True)


def test_with_several_devices_each_process_gets_its_own(monkeypatch, tmp_path):
    """Process 3 of 4 on a machine with two devices takes the second, in a group of one."""
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    try:
        with Launch(3, 4, 3).alone():
            assert os.environ["LOCAL_RANK"] == "1"
            assert os.environ["WORLD_SIZE"] == "1"
            arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
            assert (arguments.world_size, arguments.local_process_index) == (1, 1)
            assert torch.distributed.get_world_size() == 1
        assert "LOCAL_RANK" not in os.environ
        with Launch(3, 4, 3).alone():
            assert TrainingArguments(output_dir=str(tmp_path), use_cpu=True).world_size == 1
    finally:
        torch.distributed.destroy_process_group()
        TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
