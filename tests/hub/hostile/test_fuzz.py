"""Loaders fed with mutated files: they raise what they announce, and what loads can be looked at and saved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_rgm.files.reading import ArtefactFolder
from tests.hub.hostile.artefacts import ARTEFACTS, Artefact, is_refusal
from tests.hub.hostile.edits import Route, replaced

EXAMPLES = 200
fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["\x1b[2J", "\ud800", "../../x", "<script>", "$x$", 1e308, -0.0, 2**63 - 1, -(2**63)]),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=4), values, max_size=3),
    max_leaves=5,
)


def is_read(file: Path) -> bool:
    """Whether loaders read a file; cards and tables to look at they do not."""
    return file.name != "README.md" and file.suffix != ".parquet"


def load(artefact: Artefact, folder: Path, target: Path) -> None:
    """Loads what was mutated; errors must be those that are announced."""
    try:
        content = artefact.read(ArtefactFolder(folder))
        for trajectory in getattr(content, "trajectories", [content]):
            for step in getattr(trajectory, "state_steps", ()):
                trajectory.state(step)
    except Exception as error:
        assert is_refusal(error), repr(error)
        return
    artefact.look(content)
    artefact.save(content, target)


@contextmanager
def mutated(contents: dict[Path, bytes]) -> Iterator[None]:
    """Files with other contents, meanwhile."""
    originals = {path: path.read_bytes() for path in contents}
    for path, content in contents.items():
        path.write_bytes(content)
    try:
        yield
    finally:
        for path, content in originals.items():
            path.write_bytes(content)


@pytest.mark.parametrize("name", list(ARTEFACTS))
def test_files_with_mutated_bytes(name, tmp_path, nothing_outside):
    artefact = ARTEFACTS[name]
    folder = Path(shutil.copytree(artefact.pristine, tmp_path / "folder"))
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and is_read(path.relative_to(folder))]

    @fuzzed
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        file = data.draw(st.sampled_from(files))
        content = bytearray(file.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(content)))
            kind = data.draw(st.sampled_from(["flip", "put", "cut", "insert"]))
            if kind == "flip" and at < len(content):
                content[at] ^= 1 << data.draw(st.integers(0, 7))
            elif kind == "put":
                piece = data.draw(st.binary(max_size=8))
                content[at : at + len(piece)] = piece
            elif kind == "cut":
                del content[at : at + data.draw(st.integers(1, 64))]
            else:
                content[at:at] = data.draw(st.binary(max_size=16))
        with mutated({file: bytes(content)}):
            load(artefact, folder, nothing_outside / "copy")

    check()


def nodes(content: Any, route: Route = ()) -> list[Route]:
    members = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [route, *(node for key, value in members for node in nodes(value, (*route, key)))]


@pytest.mark.parametrize("name", list(ARTEFACTS))
def test_json_with_other_values_in_the_place_of_nodes(name, tmp_path, nothing_outside):
    artefact = ARTEFACTS[name]
    folder = Path(shutil.copytree(artefact.pristine, tmp_path / "folder"))
    trees = {path: json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))}
    places = [(file, node) for file, tree in trees.items() for node in nodes(tree)]

    @fuzzed
    @given(place=st.sampled_from(places), value=JSON_VALUES)
    def check(place: tuple[Path, Route], value: Any) -> None:
        file, node = place
        with mutated({file: json.dumps(replaced(trees[file], node, value)).encode()}):
            load(artefact, folder, nothing_outside / "copy")

    check()
