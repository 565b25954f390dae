from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import hf_rgm.files.writing
from hf_rgm.files.reading import ArtefactFolder
from hf_rgm.files.writing import (
    FOLDER_LOCK,
    FolderLock,
    exchange,
    finish_replacement,
    make_folder,
    order_metadata,
    read_sealed,
    remove_unfinished,
    replacing,
    seal,
    staged_folder,
    write_json,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_finished_folder_takes_its_place(tmp_path):
    with staged_folder(tmp_path / "deep" / "out", "marker.json") as folder:
        (folder / "marker.json").write_text("{}")
        assert not (tmp_path / "deep" / "out").exists()
    assert names(tmp_path / "deep") == ["out"]
    assert names(tmp_path / "deep" / "out") == ["marker.json"]


def test_an_earlier_folder_is_replaced_whole(tmp_path):
    for name in ("old", "new"):
        with staged_folder(tmp_path / "out", "marker.json") as folder:
            (folder / "marker.json").write_text("{}")
            (folder / name).write_text(name)
    assert names(tmp_path / "out") == ["marker.json", "new"]
    assert names(tmp_path) == ["out"]


def test_an_error_leaves_the_earlier_folder_and_no_debris(tmp_path):
    with staged_folder(tmp_path / "out", "marker.json") as folder:
        (folder / "marker.json").write_text("old")
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "out", "marker.json") as folder:
        (folder / "marker.json").write_text("new")
        raise KeyboardInterrupt
    assert (tmp_path / "out" / "marker.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_foreign_content_is_left_alone(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="not empty and has no marker.json"):
        with staged_folder(tmp_path / "home", "marker.json"):
            pass
    with pytest.raises(FileExistsError, match="is a file"):
        with staged_folder(tmp_path / "file", "marker.json"):
            pass
    assert names(tmp_path) == ["file", "home"]


def test_json_round_trip_and_its_errors(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        ArtefactFolder(tmp_path).read_json("config.json", format_version=1)
    write_json(path, {"format_version": 1, "x": [1.5, None]})
    assert ArtefactFolder(tmp_path).read_json("config.json", format_version=1) == {
        "format_version": 1,
        "x": [1.5, None],
    }
    assert names(tmp_path) == ["config.json"]
    with pytest.raises(ValueError, match="format version 1, this release of hf_rgm reads 2"):
        ArtefactFolder(tmp_path).read_json("config.json", format_version=2)
    path.write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="format version list"):
        ArtefactFolder(tmp_path).read_json("config.json", format_version=1)
    path.write_bytes(b'{"format_version": 1, \xff')
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        ArtefactFolder(tmp_path).read_json("config.json", format_version=1)


def test_content_that_is_not_json_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "config.json"
    write_json(path, {"format_version": 1})
    with pytest.raises(TypeError):
        write_json(path, {"format_version": 1, "x": object()})
    assert ArtefactFolder(tmp_path).read_json("config.json", format_version=1) == {"format_version": 1}


def write_version(target, version):
    with staged_folder(target, "marker.json") as folder:
        write_json(folder / "marker.json", {"format_version": 1, "version": version})


def read_version(target):
    return ArtefactFolder(target).read_json("marker.json", format_version=1)["version"]


def without_exchange(monkeypatch):
    monkeypatch.setattr(hf_rgm.files.writing, "exchange", lambda first, second: False)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges folders")
def test_folders_are_exchanged_in_one_step(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert exchange(tmp_path / "one", tmp_path / "two")
    assert (names(tmp_path / "one"), names(tmp_path / "two")) == (["two"], ["one"])
    with pytest.raises(FileNotFoundError, match="three"):
        exchange(tmp_path / "one", tmp_path / "three")


def test_without_exchange_a_folder_is_replaced_all_the_same(tmp_path, monkeypatch):
    without_exchange(monkeypatch)
    for version in range(3):
        write_version(tmp_path / "out", version)
        assert read_version(tmp_path / "out") == version
        assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("finish", [read_version, lambda target: write_version(target, 2)])
def test_a_replacement_that_was_cut_between_two_renames_is_completed(tmp_path, finish):
    for name, version in (("old", 0), ("new", 1)):
        write_version(tmp_path / ".out.hf-rgm-saving" / name, version)
    assert finish(tmp_path / "out") in (1, None)
    assert read_version(tmp_path / "out") in (1, 2)
    write_version(tmp_path / "out", 3)
    assert names(tmp_path) == ["out"]


def test_a_second_rename_that_fails_is_undone(tmp_path, monkeypatch):
    write_version(tmp_path / "out", 0)
    without_exchange(monkeypatch)
    rename = os.rename

    def failing(source, target):
        if Path(source).name == "new":
            raise OSError(errno.EIO, "the disk is broken")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="the disk is broken"):
        write_version(tmp_path / "out", 1)
    assert read_version(tmp_path / "out") == 0
    assert names(tmp_path) == ["out"]


def test_what_a_dead_process_left_is_removed_but_not_what_a_living_one_writes(tmp_path):
    code = """if True:
        import sys, time
        from pathlib import Path
        sys.modules["hf_rgm"] = type(sys)("hf_rgm")
        sys.modules["hf_rgm"].__path__ = [sys.argv[2]]
        from hf_rgm.files.writing import replacing
        with replacing(Path(sys.argv[1])) as path:
            path.write_text("half")
            print("writing", flush=True)
            time.sleep(60)
    """
    package = str(Path(hf_rgm.files.writing.__file__).parents[1])
    arguments = [sys.executable, "-c", code, str(tmp_path / "file.txt"), package]
    writer = subprocess.Popen(arguments, stdout=subprocess.PIPE)
    assert writer.stdout.readline() == b"writing\n"
    unfinished = [".file.txt.hf-rgm-saving", ".file.txt.hf-rgm-saving.lock"]
    remove_unfinished(tmp_path)
    assert names(tmp_path) == unfinished
    writer.kill()
    writer.communicate()
    assert names(tmp_path) == unfinished
    remove_unfinished(tmp_path)
    assert names(tmp_path) == []


def test_a_link_to_a_folder_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    write_version(tmp_path / "link", 0)
    assert (tmp_path / "link").is_symlink()
    assert read_version(tmp_path / "disk") == 0


def test_a_folder_can_be_replaced_from_inside(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_version(".", 0)
    assert read_version(tmp_path / "here") == 0


def test_a_mount_point_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "mounted")
    with pytest.raises(OSError, match="mounted is a mount point, which is not replaced. Choose a folder in it"):
        write_version(tmp_path / "mounted", 0)


@pytest.mark.parametrize(("code", "kind"), [(errno.EROFS, OSError), (errno.EACCES, PermissionError)])
@pytest.mark.parametrize("existing", [True, False])
def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch, code, kind, existing):
    if existing:
        write_version(tmp_path / "out", 0)

    def refuse(path, mode=0o777, **options):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(kind) as caught:
        write_version(tmp_path / "out", 1)
    assert caught.value.errno == code
    assert f"{tmp_path / 'out'} is not written, files must be made in {tmp_path}. Allow it" in str(caught.value)
    assert not existing or read_version(tmp_path / "out") == 0
    assert names(tmp_path) == ["out"] * existing


def test_an_error_of_something_else_is_left_as_it_is(tmp_path):
    with pytest.raises(PermissionError, match="elsewhere") as caught, replacing(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "no", "/elsewhere/source")
    assert "is not written" not in str(caught.value)


def test_a_full_disk_leaves_the_earlier_file(tmp_path):
    write_json(tmp_path / "out.json", {"version": 0})
    with pytest.raises(OSError, match="No space left on device: .*out.json is not written, it needs more than the"):
        with replacing(tmp_path / "out.json") as path:
            path.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert json.loads((tmp_path / "out.json").read_text()) == {"version": 0}
    assert names(tmp_path) == ["out.json"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, PermissionError])
def test_a_replacement_that_stops_between_two_renames_loses_nothing(tmp_path, monkeypatch, error):
    with staged_folder(tmp_path / "out", "marker.json") as folder:
        (folder / "marker.json").write_text("old")
    rename, calls = os.rename, []

    def failing(source, target):
        calls.append(source)
        if len(calls) > 1:
            raise error
        rename(source, target)

    monkeypatch.setattr("hf_rgm.files.writing.exchange", lambda first, second: False)
    monkeypatch.setattr("hf_rgm.files.writing.os.rename", failing)
    with pytest.raises(error), staged_folder(tmp_path / "out", "marker.json") as folder:
        (folder / "marker.json").write_text("new")
    monkeypatch.undo()
    finish_replacement(tmp_path / "out")
    assert (tmp_path / "out" / "marker.json").read_text() in ("old", "new")


HOLDER = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print(flush=True)
time.sleep(600)
"""


def test_a_locked_folder_is_free_again_when_its_process_is_killed(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / FOLDER_LOCK)], stdout=subprocess.PIPE)
    process.stdout.readline()
    lock = FolderLock(tmp_path)
    try:
        with pytest.raises(RuntimeError, match=rf"Another process is recording into {tmp_path}.*until it has ended"):
            lock.acquire()
    finally:
        process.kill()
        process.wait()
    lock.acquire()
    lock.release()
    assert names(tmp_path) == []


def test_within_a_process_the_last_one_has_the_lock(tmp_path):
    failed, next_one = FolderLock(tmp_path / "run"), FolderLock(tmp_path / "run")
    failed.acquire()
    next_one.acquire()
    next_one.release()
    assert names(tmp_path / "run") == []
    failed.release()


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_all_files_have_the_mode_of_new_ones(tmp_path, umask):
    before = os.umask(umask)
    try:
        with staged_folder(tmp_path / "folder", "a.json") as folder:
            write_json(folder / "a.json", {})
            save_file({"x": torch.zeros(2)}, folder / "x.safetensors")
        with replacing(tmp_path / "y.safetensors") as path:
            save_file({"x": torch.zeros(2)}, path)
    finally:
        os.umask(before)
    files = [*(tmp_path / "folder").iterdir(), tmp_path / "y.safetensors"]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask} and len(files) == 3


def test_a_folder_for_work_that_cannot_be_made_is_explained(tmp_path, monkeypatch):
    def read_only(self, *arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(OSError, match="files must be made in .*. Allow it or choose another folder"):
        make_folder(tmp_path / "work")


@pytest.mark.parametrize("value", ["plain", 'Ü \u2028 \x07 " \\ /', "\x7f"])
def test_metadata_are_in_the_same_order_in_every_file(tmp_path, value):
    contents = set()
    for number in range(20):
        path = tmp_path / str(number)
        save_file({"x": torch.arange(3.0)}, path, metadata={"b": "1", "a": value, "c": "3"})
        order_metadata(path)
        contents.add(path.read_bytes())
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"a": value, "b": "1", "c": "3"}
            assert file.get_tensor("x").tolist() == [0, 1, 2]
    assert len(contents) == 1


@pytest.mark.parametrize(
    ("old", "new"), [(b"(2, 5)", b"((2,5)"), (b"'descr'", b"'desc\0'"), (b"NUMPY", b"numpy"), (b"<f4", b"|O ")]
)
def test_an_array_whose_header_was_changed_is_named(tmp_path, old, new):
    """NumPy parses headers as Python, whose errors are of several kinds."""
    path = tmp_path / "array.npy"
    np.save(path, np.ones((2, 5), np.float32))
    seal(path)
    assert read_sealed(path).sum() == 10
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    with pytest.raises(ValueError, match="array.npy is damaged .* Delete it; it will be computed again"):
        read_sealed(path)
