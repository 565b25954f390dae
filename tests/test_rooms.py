"""The rooms of the library and the one direction of its imports; docs/contributing.md says what each is for."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_rgm

LIBRARY = Path(hf_rgm.__file__).parent
ROOMS = (
    "exceptions",
    "registration",
    "files",
    "model",
    "clusters",
    "agreement",
    "hub",
    "plots",
    "trajectory",
    "recording",
    "synset",
    "engines",
    "distillation",
    "pages",
    "results",
    "attribution",
    "fidelity",
    "explorer",
    "testing",
    "demo",
    "cli",
)
"""From left to right: a room imports from itself and from rooms to its left."""

PUBLIC = "fidelity"
"""The last of the rooms that the public names of `hf_rgm` itself come from."""


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Lines and rooms of all imports from the library, but for those that are there for type checkers alone."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting.extend(node.orelse)
            continue
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "hf_rgm":
            names = [f"hf_rgm.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            if name.startswith("hf_rgm."):
                room = name.split(".")[1]
                yield node.lineno, room if room in ROOMS else PUBLIC
        waiting.extend(ast.iter_child_nodes(node))


def room_of(path: Path) -> str:
    return path.relative_to(LIBRARY).parts[0].removesuffix(".py")


def modules() -> list[Path]:
    return [path for path in sorted(LIBRARY.rglob("*.py")) if path.parent != LIBRARY or path.name != "__init__.py"]


def test_every_room_has_its_place():
    assert {room_of(path) for path in modules()} == {*ROOMS}


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(LIBRARY).as_posix())
def test_no_import_from_the_right(path):
    own = ROOMS.index(room_of(path))
    wrong = [f"{path}:{line} imports {room}" for line, room in imports(path) if room in ROOMS[own + 1 :]]
    assert not wrong


STARTED_BY_NAME = {"hf_rgm.cli.__main__", "hf_rgm.testing"}
"""Modules that users start or import, and the library does not."""


def test_every_module_is_used():
    used = {f"hf_rgm.{module}" for module in hf_rgm._MODULES.values()} | STARTED_BY_NAME
    for path in LIBRARY.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                used |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    names = {".".join(path.relative_to(LIBRARY.parent).with_suffix("").parts) for path in modules()}
    assert not {name for name in names - used if not name.endswith("__init__")}
