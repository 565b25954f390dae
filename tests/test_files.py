from __future__ import annotations

import json

import pytest

from hf_rgm.artefacts import ArtefactFolder
from hf_rgm.files import staged_folder, write_json


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
