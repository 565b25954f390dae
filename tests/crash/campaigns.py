"""
Kills, one after the other, and what must hold after each of them.

Each campaign takes the workers, an empty folder, a plan that says where the next kill is, and how many there are to
be. It stops at the first violation with an `AssertionError`, and returns how many workers were killed (the others had
finished before).
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open

from hf_rgm.files.reading import ArtefactFolder
from hf_rgm.files.writing import finish_replacement
from hf_rgm.trajectory.states import state_path
from hf_rgm.trajectory.steps import read_part, recorded_parts
from hf_rgm.trajectory.trajectory import Trajectory
from tests.crash.tasks import load
from tests.crash.workers import Outcome, Workers
from tests.hub_server import LocalHub
from tests.trajectory.test_storage import assert_same_state, assert_same_steps

Plan = Callable[[Outcome], dict[str, Any]]
"""Where a worker is killed, given what became of one that was not: arguments of `Workers.run`."""


def at_random_times(seed: int) -> Plan:
    """Kills at any time between start and end."""
    generator = random.Random(seed)
    return lambda whole: {"seconds": generator.uniform(0, whole.seconds or 0)}


def at_random_operations(seed: int) -> Plan:
    """Kills at changes of files, those of rare kinds (renames, exchanges) as often as those of frequent ones."""
    generator = random.Random(seed)

    def kill(whole: Outcome) -> dict[str, Any]:
        names = whole.operations or []
        name = generator.choice(sorted(set(names)))
        return {"operation": generator.choice([n for n, found in enumerate(names, 1) if found == name])}

    return kill


def around_the_last_rename() -> Plan:
    """Kills at the changes of files around the last one that puts something into place, one after the other."""
    offsets = itertools.cycle((0, 1, -1, 2, -2, 3))

    def kill(whole: Outcome) -> dict[str, Any]:
        names = whole.operations or []
        last = max(n for n, name in enumerate(names, 1) if name in ("os.rename", "exchange"))
        return {"operation": min(max(last + next(offsets), 1), len(names))}

    return kill


def at_every_operation() -> Plan:
    """Kills at the first change of a file, then at the second, and so on; from the beginning again after the last."""
    numbers = itertools.count()
    return lambda whole: {"operation": next(numbers) % len(whole.operations or [None]) + 1}


def tree(folder: Path) -> dict[str, bytes]:
    """Contents of all files by path; hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def saving(
    workers: Workers, folder: Path, plan: Plan, kills: int, *, kind: str, exchange: bool = True, first: bool = False
) -> int:
    """
    Kills `save` in one folder again and again: it always holds one whole version, the former or the one being saved.

    Args:
        kind (`str`): Which artefact.
        exchange (`bool`, *optional*, defaults to `True`): Whether the system can swap folders in one step.
        first (`bool`, *optional*, defaults to `False`): Remove the folder before each: nothing may be there but the
            whole.
    """
    arguments = {"kind": kind, "exchange": exchange, "watch": folder}
    whole, wholes, trees = folder / "whole" / kind, [], []
    workers.run("save", version=1, folder=whole, **arguments)
    for version in (0, 1):
        if first:
            shutil.rmtree(whole)
        wholes.append(workers.run("save", version=version, folder=whole, **arguments))
        trees.append(tree(whole))
    target, killed = folder / "saved" / kind, 0
    if not first:
        workers.run("save", version=0, folder=target, **arguments)
    for number in range(kills):
        version = (number + 1) % 2
        if first and target.exists():
            shutil.rmtree(target)
        before = tree(target) if target.exists() else None
        outcome = workers.run("save", version=version, folder=target, **arguments, **plan(wholes[version]))
        killed += outcome.killed
        if not exchange and kind == "unlearned":
            finish_replacement(target)  # transformers, which loads it, knows nothing of this
        if before is not None or target.exists():
            load(workers.model, kind, target)
            assert tree(target) in (before, trees[version]), f"{kind} is a mixture of versions"
            assert outcome.killed or tree(target) == trees[version]
    workers.run("save", version=1, folder=target, **arguments)
    assert tree(target) == trees[1]
    assert os.listdir(target.parent) == [target.name], "a killed process left something behind"
    return killed


def recording(workers: Workers, folder: Path, plan: Plan, kills: int, *, best: str | None = None) -> int:
    """
    Kills a training and resumes it, until it is through: its record is that of one that was not killed, bit for bit.

    Args:
        best (`str`, *optional*): Which checkpoint training ends with; see `record`.
    """
    whole = workers.run("record", folder=folder / "whole", watch=folder / "whole" / "trajectory", best=best)
    killed = 0
    for attempt in itertools.count():
        root = folder / str(attempt)
        finished = False
        while killed < kills and not finished:
            where = plan(whole)
            finished = not workers.run("record", folder=root, watch=root / "trajectory", best=best, **where).killed
            killed += not finished
            check_recorded_files(root / "trajectory")
        workers.run("record", folder=root, watch=root / "trajectory", best=best)
        check_same_record(root / "trajectory", folder / "whole" / "trajectory")
        shutil.rmtree(root)
        if killed >= kills:
            return killed
    raise RuntimeError("unreachable: the loop counts for ever")


def check_recorded_files(folder: Path) -> None:
    """Every file that is there under its name is whole, and an unfinished trajectory is not loaded."""
    for path in folder.glob("states/step-*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                file.get_tensor(name)
    for start in recorded_parts(folder):
        read_part(ArtefactFolder(folder), start)
    try:
        trajectory = Trajectory.load(folder)
    except FileNotFoundError:
        assert not (folder / "trajectory.json").exists()
    except ValueError as error:
        assert "is not complete" in str(error), error
    else:
        assert [trajectory.state(step).step for step in trajectory.state_steps] == list(trajectory.state_steps)


def check_same_record(found_folder: Path, expected_folder: Path) -> None:
    """Steps, states and their files are the same; what recording cost is not."""
    found, expected = Trajectory.load(found_folder), Trajectory.load(expected_folder)
    assert_same_steps(found.steps, expected.steps)
    assert found.state_steps == expected.state_steps
    for step in expected.state_steps:
        assert_same_state(found.state(step), expected.state(step))
        assert state_path(found_folder, step).stat().st_size == state_path(expected_folder, step).stat().st_size
    different = {key for key in expected.metadata if found.metadata[key] != expected.metadata[key]}
    assert different <= {"recording", "model"}, different
    assert not list(found_folder.rglob(".*")), "a killed process left something behind"


def distilling(workers: Workers, folder: Path, plan: Plan, kills: int) -> int:
    """Kills a distillation and continues it: finished blocks are kept, and the synset is the same bit for bit."""
    whole = workers.run("distill", folder=folder / "whole", watch=folder / "whole")
    killed = 0
    for attempt in itertools.count():
        root = folder / str(attempt)
        finished, blocks = False, {}
        while killed < kills and not finished:
            outcome = workers.run("distill", folder=root, watch=root, **plan(whole))
            finished = not outcome.killed
            killed += outcome.killed
            now = {path.name: path.stat().st_ino for path in (root / "blocks").glob("block-*")}
            assert blocks.items() <= now.items(), "a finished block was done again"
            blocks = now
        workers.run("distill", folder=root, watch=root)
        for name in ("blocks", "synset/clusters", "synset/trajectories", "synset/data"):
            assert tree(root / name) == tree(folder / "whole" / name), f"{name} differs"
        found, expected = (path / "synset" / "synset.safetensors" for path in (root, folder / "whole"))
        assert found.read_bytes() == expected.read_bytes()
        assert sorted(os.listdir(root)) == ["blocks", "synset"], "a killed process left something behind"
        shutil.rmtree(root)
        if killed >= kills:
            return killed
    raise RuntimeError("unreachable: the loop counts for ever")


def pushing(
    workers: Workers, hub: LocalHub, folder: Path, plan: Plan | None, kills: int, *, kind: str = "synset"
) -> int:
    """
    Kills `push` again and again: the repository always holds one whole version, and pushing again completes it.

    Args:
        plan (`Callable`, *optional*): Where to kill. By default as the Hub receives a request: the first, then the
            second, and so on.
    """
    repo_id, repo_type = f"{hub.user}/{kind}", "model" if kind == "unlearned" else "dataset"
    trees, wholes, requests = [], [], 0
    for version in (0, 1):
        requests = len(hub.requests)
        wholes.append(workers.run("push", repo_id=repo_id, kind=kind, version=version))
        requests = len(hub.requests) - requests
        trees.append(hub.files(repo_id, repo_type))
    killed = 0
    for number in range(kills):
        version = number % 2
        process: list[int] = []
        if plan is None:
            hub.before("", lambda process=process: os.kill(process[0], signal.SIGKILL), skip=number % requests)
        where = plan(wholes[version]) if plan else {}
        outcome = workers.run("push", repo_id=repo_id, kind=kind, version=version, started=process.append, **where)
        killed += outcome.killed
        assert outcome.killed or hub.files(repo_id, repo_type) == trees[version]
        assert hub.files(repo_id, repo_type) in trees, "the repository is a mixture of versions"
        hub.faults.clear()
    workers.run("push", repo_id=repo_id, kind=kind, version=1)
    assert hub.files(repo_id, repo_type) == trees[1]
    if kind == "synset":
        workers.run("pull", repo_id=repo_id, cache_dir=folder / "cache", folder=folder / "pulled")
        found, expected = (folder / "pulled" / "synset.safetensors").read_bytes(), trees[1]["synset.safetensors"]
        assert found == expected
    return killed
