"""Random mutations of folders: bytes, JSON trees, headers of safetensors, elements of tensors, and whole files."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from tests.hub.hostile.edits import Route, replaced

Mutation = Callable[[Random, Path], object]
"""Changes a file in place."""

ODD_NUMBERS = (0, -1, 1, 2, 3, 255, 2**31, 2**32, 2**63 - 1, -(2**63), 2**63, 2**64, 10**18, 10**400, 0.0, -0.0, 0.5)
ODD_FLOATS = (1e-320, 1e-30, 1e20, 1e30, 3e38, 1e300, float("nan"), float("inf"), float("-inf"))
ODD_TEXTS = ("", " ", "\x1b[2J", "\ud800", "\u202e", "../../x", "/etc/passwd", "<script>", "$x$", "0", "F99", "true")
ODD_ELEMENTS = {4: ("<f", "<i"), 8: ("<d", "<q"), 2: ("<e", "<h"), 1: ("<b", "<B")}
LONG, LONGER = 30_000, 2_000_000
"""Characters of a long name and of a very long one."""


def nodes(content: Any, route: Route = ()) -> list[Route]:
    """Routes to all nodes of a JSON tree."""
    members = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [route, *(node for key, value in members for node in nodes(value, (*route, key)))]


def at(content: Any, route: Route) -> Any:
    """The node that a route leads to."""
    for key in route:
        content = content[key]
    return content


def odd_value(random: Random, depth: int = 3) -> Any:
    """A value that nobody expects, rarely a large one."""
    kind = random.randrange(12 if depth else 6)
    if kind < 3:
        return random.choice((*ODD_NUMBERS, *ODD_FLOATS))
    if kind < 5:
        return random.choice((None, True, False, [], {}))
    if kind < 9:
        size = random.choices((0, LONG, LONGER), (300, 10, 1))[0]
        return random.choice(ODD_TEXTS) if size == 0 else random.choice("x\x1b\U0001f600") * size
    if kind < 10:
        return {random.choice(ODD_TEXTS): odd_value(random, depth - 1) for _ in range(random.randrange(4))}
    return [odd_value(random, depth - 1)] * random.choices((1, 2, 5, 1000, 100_000), (100, 100, 50, 5, 1))[0]


def mutated_tree(random: Random, tree: Any) -> Any:
    """A JSON tree with one node replaced, copied to another place, taken out, or given more members."""
    routes = nodes(tree)
    route, other = random.choice(routes), random.choice(routes)
    kind, value = random.randrange(8), at(tree, route)
    if kind < 3 or not route:
        return replaced(tree, route, odd_value(random))
    if kind == 3:
        return replaced(tree, route, at(tree, other))
    if kind == 4 and isinstance(value, (int, float)):
        as_float = float(value) if abs(value) < 2**64 else 0.5
        return replaced(tree, route, random.choice((value + 1, value - 1, -value, 2 * value, as_float, [value])))
    if kind == 5 and isinstance(value, list):
        changed = random.choice((value[:-1], value[::-1], value * 2, [*value, odd_value(random)]))
        return replaced(tree, route, changed)
    if kind == 6 and isinstance(value, dict):
        return replaced(tree, route, {**value, str(random.choice(ODD_TEXTS)): odd_value(random)})
    parent = at(tree, route[:-1])
    rest = {k: v for k, v in parent.items() if k != route[-1]} if isinstance(parent, dict) else parent[1:]
    return replaced(tree, route[:-1], rest)


def as_text(tree: Any) -> bytes:
    """JSON as text, with lone surrogates and NaN as they are."""
    return json.dumps(tree, ensure_ascii=False).encode("utf-8", "surrogatepass")


def json_nodes(random: Random, path: Path) -> None:
    """Changes one to three nodes of a JSON file."""
    tree = json.loads(path.read_bytes())
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        tree = mutated_tree(random, tree)
    path.write_bytes(as_text(tree))


def json_text(random: Random, path: Path) -> None:
    """Adds a key twice, a value that is no JSON, or deep nesting to the text of a JSON file."""
    text = path.read_bytes()
    places = [place for place, sign in enumerate(text) if sign in b"{[,:"]
    place = random.choice(places) + 1 if places else 0
    key = random.choice([*json.loads(text), "x"])
    depth = random.choice((10, 60, 1000, 100_000))
    piece = random.choice(
        (
            f'"{key}": 1,'.encode(),
            random.choice((b"NaN,", b"-Infinity,", b"1e999,", b"9" * 5000 + b",", b"0x1,", b"'", b"//", b"\x00")),
            b"[" * depth + b"]" * depth + b",",
            b'"' + random.choice((b"\xff", b"\\ud800", b"\\u0000", b"\xed\xa0\x80")) + b'",',
        )
    )
    path.write_bytes(text[:place] + piece + text[place:])


def tensor_header(random: Random, path: Path) -> None:
    """Changes nodes of the header of a safetensors file, and often forgets its digest as whoever changes it would."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    tree = json.loads(content[8 : 8 + length])
    if random.random() < 0.5:
        tree.get("__metadata__", {}).pop("sha256", None)
    for _ in range(random.choice((1, 1, 2))):
        tree = mutated_tree(random, tree)
    header = as_text(tree)
    told = random.choices((len(header), random.choice((0, 1, length, 2**31, 2**62, 2**63))), (9, 1))[0]
    path.write_bytes(struct.pack("<Q", told % 2**64) + header + content[8 + length :])


def tensor_elements(random: Random, path: Path) -> None:
    """Puts odd numbers in the place of elements of a safetensors file, and forgets its digests."""
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    tree = json.loads(bytes(content[8 : 8 + length]))
    tree.get("__metadata__", {}).pop("sha256", None)
    header, data = as_text(tree), content[8 + length :]
    for _ in range(random.randrange(1, 4)):
        size = random.choice(list(ODD_ELEMENTS))
        kind = random.choice(ODD_ELEMENTS[size])
        value = random.choice(ODD_FLOATS) if kind[1] in "fde" else random.choice((0, -1, 1, 2**62, -(2**63)))
        try:
            packed = struct.pack(kind, value)
        except (struct.error, OverflowError):
            packed = random.randbytes(size)
        place = size * random.randrange(max(len(data) // size, 1))
        data[place : place + size] = packed
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def any_bytes(random: Random, path: Path) -> None:
    """Flips, puts, cuts, repeats or adds bytes."""
    content = bytearray(path.read_bytes())
    for _ in range(random.randrange(1, 5)):
        # The begin of a file, with its header, as often as all the rest.
        place = random.randrange(random.choice((min(len(content), 200), len(content))) + 1)
        kind = random.randrange(6)
        if kind == 0 and place < len(content):
            content[place] ^= 1 << random.randrange(8)
        elif kind == 1:
            piece = random.randbytes(random.randrange(9))
            content[place : place + len(piece)] = piece
        elif kind == 2:
            del content[place : place + random.randrange(1, 65)]
        elif kind == 3:
            content[place:place] = random.randbytes(random.randrange(1, 17))
        elif kind == 4:
            content[place:place] = content[place : place + random.randrange(1, 65)]
        else:
            content[place : place + 64] = bytes(len(content[place : place + 64]))
    path.write_bytes(content)


def whole_file(random: Random, path: Path) -> None:
    """Cuts a file off, empties it, makes it longer, removes it, or puts another one in its place."""
    size = path.stat().st_size
    kind = random.randrange(6)
    if kind < 3:
        os.truncate(path, random.choice((0, random.randrange(size + 1), size + random.choice((1, 8, 100_000)))))
    elif kind == 3:
        path.unlink()
    else:
        others = sorted(other for other in path.parent.rglob("*") if other.is_file())
        other = random.choice(others)
        if other != path:
            shutil.copyfile(other, path)


def array_header(random: Random, path: Path) -> None:
    """Changes the header of a file of an array, which is text."""
    content = path.read_bytes()
    old, new = random.choice(
        (
            (b"'<f4'", random.choice((b"'|O'", b"'<f8'", b"'<c8'", b"'|V4'", b"'<U9'", b"'x'", b"1e9"))),
            (b"False", random.choice((b"True", b"None", b"[]"))),
            (b"(", random.choice((b"(9999999999, ", b"(-1, ", b"((", b"(0, ", b"(None, "))),
            (b"'shape'", random.choice((b"'descr'", b"'x'", b"{}"))),
        )
    )
    path.write_bytes(content.replace(old, new, 1))


def forget_digests(random: Random, folder: Path) -> None:
    """Takes the digests of states out of trajectories: whoever changes a state would change these too."""
    for path in folder.rglob("trajectory.json"):
        tree = json.loads(path.read_bytes())
        path.write_bytes(as_text({key: value for key, value in tree.items() if key != "states_sha256"}))


BY_SUFFIX: dict[str, tuple[Mutation, ...]] = {
    ".json": (json_nodes, json_nodes, json_nodes, json_text, any_bytes, whole_file),
    ".safetensors": (tensor_header, tensor_header, tensor_elements, tensor_elements, any_bytes, whole_file),
    ".npy": (array_header, any_bytes, any_bytes, whole_file),
}


def mutate(random: Random, folder: Path, files: list[str]) -> list[str]:
    """Mutates one of the files of a folder, rarely two; their names."""
    if random.random() < 0.5:
        forget_digests(random, folder)
    chosen = sorted({random.choice(files) for _ in range(random.choice((1, 1, 1, 2)))})
    for name in chosen:
        random.choice(BY_SUFFIX[Path(name).suffix])(random, folder / name)
    return chosen
