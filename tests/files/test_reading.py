from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hf_rgm.files.names import checked_names
from hf_rgm.files.reading import ArtefactFolder, check_memory, parsed, printable, shortened


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "folder"
    (path / "inner").mkdir(parents=True)
    (path / "a.json").write_text('{"format_version": 1, "a": [1]}')
    save_file({"x": torch.arange(6.0).reshape(2, 3)}, path / "t.safetensors", metadata={"k": "v"})
    return path


def test_files_are_found(folder):
    assert ArtefactFolder(folder).file("a.json") == folder / "a.json"
    assert ArtefactFolder(folder).subfolder("inner").root == folder / "inner"
    assert not ArtefactFolder(folder).is_remote and ArtefactFolder(folder).at_hand("a.json")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "..", "a\\b"])
def test_names_that_lead_out_are_refused(folder, name):
    with pytest.raises(ValueError, match="is not the name of a file in an artefact"):
        ArtefactFolder(folder).file(name)


@pytest.mark.parametrize("name", ["missing", "inner", "a\0b"])
def test_what_is_no_file_is_missing(folder, name):
    with pytest.raises(FileNotFoundError, match="has no"):
        ArtefactFolder(folder).file(name)


def test_links_may_lead_within_the_folder_only(folder, tmp_path):
    (tmp_path / "secret").write_text("{}")
    (folder / "out").symlink_to(tmp_path / "secret")
    (folder / "within").symlink_to(folder / "a.json")
    (folder / "inner" / "up").symlink_to(folder / "a.json")
    assert ArtefactFolder(folder).file("within")
    assert ArtefactFolder(folder).subfolder("inner").file("up")
    with pytest.raises(ValueError, match="leads out of"):
        ArtefactFolder(folder).file("out")


@pytest.mark.parametrize(("repository", "allowed"), [("datasets--me--set", True), ("downloads", False)])
def test_links_to_blobs_are_for_caches_of_the_hub(folder, tmp_path, repository, allowed):
    snapshot = tmp_path / repository / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    blobs = tmp_path / repository / "blobs"
    blobs.mkdir()
    (snapshot / "a.json").rename(blobs / "1")
    (snapshot / "a.json").symlink_to("../../blobs/1")
    if allowed:
        assert ArtefactFolder(snapshot).file("a.json")
    else:
        with pytest.raises(ValueError, match="leads out of"):
            ArtefactFolder(snapshot).file("a.json")


def test_json_is_read_and_its_version_checked(folder):
    assert ArtefactFolder(folder).read_json("a.json", format_version=1)["a"] == [1]
    with pytest.raises(ValueError, match="has format version 1, this release of hf_rgm reads 2"):
        ArtefactFolder(folder).read_json("a.json", format_version=2)


def test_tensors_are_read_after_a_look_at_the_header(folder):
    with ArtefactFolder(folder).open_tensors("t.safetensors") as file:
        assert list(file.names) == ["x"] and file.metadata == {"k": "v"}
        assert file.shape("x") == (2, 3) and file.dtype("x") == "F32"
        assert torch.equal(file.read("x", shape=(2, None), dtypes=("F32",)), torch.arange(6.0).reshape(2, 3))
        for shape, dtype in (((2,), "F32"), ((2, 4), "F32"), ((2, 3), "F16")):
            with pytest.raises(ValueError, match=r"of shape \(2, 3\) and dtype F32; expected"):
                file.read("x", shape=shape, dtypes=(dtype,))
        with pytest.raises(ValueError, match="has no tensor 'y'"):
            file.read("y", shape=(2, 3), dtypes=("F32",))


def test_other_tensors_than_expected_are_refused(folder):
    save_file({"x": torch.zeros(1), "\x1b[2J": torch.zeros(1)}, folder / "t.safetensors")
    with ArtefactFolder(folder).open_tensors("t.safetensors", way_out="Do it again.") as file:
        file.check_no_others(["x", "\x1b[2J", "y"])
        with pytest.raises(ValueError, match=r"the tensors \['.+x1b\[2J'\] too many. Do it again"):
            file.check_no_others(["x"])


@pytest.mark.parametrize("change", [lambda content: content[:-1], lambda content: content + b"\0"])
def test_a_header_announces_exactly_the_bytes_that_follow(folder, change):
    content = (folder / "t.safetensors").read_bytes()
    (folder / "t.safetensors").write_bytes(change(content))
    with (
        pytest.raises(ValueError, match="t.safetensors is damaged .*. Do it again"),
        ArtefactFolder(folder).open_tensors("t.safetensors", way_out="Do it again."),
    ):
        pass


def test_what_does_not_fit_into_memory_is_refused(folder, monkeypatch):
    check_memory(10**6, "it")
    monkeypatch.setattr("hf_rgm.files.reading.psutil.virtual_memory", lambda: SimpleNamespace(available=10))
    with pytest.raises(MemoryError, match="it needs 11 B, but only 10 B of memory are free"):
        check_memory(11, "it")
    for read in (
        lambda: ArtefactFolder(folder).read_json("a.json", format_version=1),
        lambda: ArtefactFolder(folder).open_tensors("t.safetensors").__enter__(),
    ):
        with pytest.raises(MemoryError):
            read()


@dataclass
class Content:
    number: int
    share: float | None
    names: list[str | int]
    shapes: dict[str, list[int]]
    rest: dict[str, Any]
    flag: bool = False

    def __post_init__(self) -> None:
        if self.number < 0:
            raise ValueError("number is negative")


GOOD: dict[str, Any] = {"number": 1, "share": 1, "names": ["a", 1], "shapes": {"a": [1]}, "rest": {"x": None}}


def test_fields_are_checked_by_their_types():
    content = parsed(Content, GOOD | {"unknown": 1}, "x.json")
    assert content == Content(**GOOD) and not content.flag


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("number", None),
        ("number", True),
        ("number", 1.0),
        ("number", "1"),
        ("share", True),
        ("share", "1"),
        ("names", None),
        ("names", "ab"),
        ("names", [None]),
        ("names", [True]),
        ("shapes", []),
        ("shapes", {"a": [None]}),
        ("shapes", {"a": 1}),
        ("rest", None),
        ("flag", 0),
    ],
)
def test_other_types_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"x\.json is damaged: `{name}` is .*, not "):
        parsed(Content, GOOD | {name: value}, "x.json")


def test_missing_fields_and_what_the_class_refuses_are_named():
    with pytest.raises(ValueError, match=r"x\.json lacks number, share"):
        parsed(Content, {name: value for name, value in GOOD.items() if name not in ("number", "share")}, "x.json")
    with pytest.raises(ValueError, match=r"x\.json is damaged: number is negative"):
        parsed(Content, GOOD | {"number": -1}, "x.json")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain äß 中文 👩\u200d👧", "plain äß 中文 👩\u200d👧"),
        ("\x1b[2J\n\r\t\0", "\\x1b[2J\\n\\r\\t\\x00"),
        ("\u202e\u2066\u200b\ufeff", "\\u202e\\u2066\\u200b\\ufeff"),
        ("\ud800\u2028", "\\ud800\\u2028"),
        ("<b>$x$", "<b>$x$"),
    ],
)
def test_control_characters_are_spelled_out(text, shown):
    assert printable(text) == shown and printable(shown) == shown
    assert json.loads(json.dumps(shown)) == shown


def test_of_long_texts_only_what_is_shown_is_looked_at(monkeypatch):
    """Else a name of 30 MB takes half a minute to be refused."""
    looked_at = []
    monkeypatch.setattr("hf_rgm.files.reading._is_control", lambda character: bool(looked_at.append(character)))
    long = "\u202e" * 100_000
    assert shortened(long, 40) == long[:40] + "..." and len(looked_at) == 40
    with pytest.raises(ValueError, match="A name of a cluster has 100000 characters"):
        checked_names(["short", long], "a cluster")
    with pytest.raises(ValueError, match="`number` is .*, not"):
        parsed(Content, GOOD | {"number": long}, "a file")
    assert len(looked_at) < 300
