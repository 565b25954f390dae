"""Reading of untrusted artefacts: folders on disk or on the Hub, checked before they are read."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import re
import shutil
import sys
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import psutil
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_rgm.files.writing import MAX_JSON_BYTES, finish_replacement, format_size

MAX_DEPTH = 50
# The most memory that JSON takes in Python, beside its text twice: for each value, each list or object, and each key.
JSON_COSTS = {r",": 64, r"[\[{]": 130, r'"\s*:': 220}
JSON_BUDGET = 250_000_000  # bytes of memory for all JSON files of an artefact together
DISK_SHARE = 0.9  # of the free disk that one download may take
MAX_HEADER_BYTES, MAX_TENSORS = 8_000_000, 50_000  # of a safetensors file
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "F32": 4, "I32": 4, "F64": 8, "I64": 8
}  # fmt: skip
CACHED_KINDS = ("datasets--", "models--", "spaces--")
WAY_OUT = "Copy it again, or ask whoever made it."

Content = TypeVar("Content")


class ArtefactFolder:
    """The folder of an artefact, through which its files are reached; links may lead to what is in `boundary`."""

    is_remote = False  # whether files are downloaded when they are read

    def __init__(self, root: str | Path, *, boundary: Path | None = None) -> None:
        self.root = Path(root)
        self._json_bytes: dict[Path, int] = {}  # memory of the JSON files that were read, by path
        finish_replacement(self.root)
        self.boundary = (boundary or _part_of_cache(self.root) or self.root).resolve()

    def __str__(self) -> str:
        return str(self.root)

    def subfolder(self, name: str) -> ArtefactFolder:
        """A folder in this one."""
        found = self._folder(name)
        found._json_bytes = self._json_bytes
        return found

    def _folder(self, name: str) -> ArtefactFolder:
        return ArtefactFolder(self.root / name, boundary=self.boundary)

    def at_hand(self, name: str) -> bool:
        """Whether a file can be read without downloading it."""
        return (self.root / name).is_file()

    def file(self, name: str, *, max_bytes: int | None = None) -> Path:
        """The path of a file that is there; refuses names and links that lead out of the folder, and sizes."""
        check_name(name)
        path = self.root / name
        if not path.is_file():
            raise FileNotFoundError(f"{self} has no {name}: not an artefact folder, or not a whole one. {WAY_OUT}")
        if not path.resolve().is_relative_to(self.boundary):
            raise ValueError(f"{path} is a link that leads out of {self.boundary}. Put the file itself there.")
        check_size(path.stat().st_size, str(path), max_bytes)
        return path

    def read_json(
        self, name: str, *, format_version: int, again: str = "write it again", max_bytes: int = MAX_JSON_BYTES
    ) -> dict[str, Any]:
        """Reads a JSON object of a `format_version`; `again` says how to replace an older one."""
        path = self.file(name, max_bytes=min(max_bytes, JSON_BUDGET - sum(self._json_bytes.values())))
        try:
            text = path.read_text(encoding="utf-8")
            self._json_bytes[path] = json_memory(text)
            total = sum(self._json_bytes.values())
            if total > JSON_BUDGET:
                raise ValueError(
                    f"with it the JSON of {self} takes {format_size(total)} of memory, which is no artefact's"
                )
            check_memory(self._json_bytes[path], str(path))
            content = parse_json(text)
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON ({shortened(error, 300)}). {WAY_OUT}") from error
        found = content.get("format_version") if isinstance(content, dict) else type(content).__name__
        if found != format_version or isinstance(found, bool):
            raise ValueError(
                f"{path} has format version {shortened(found)}, this release of hf_rgm reads {format_version}. "
                f"Install the release that wrote it, or {again} with this release."
            )
        return content

    @contextlib.contextmanager
    def open_tensors(self, name: str, *, num_bytes: int | None = None, way_out: str = WAY_OUT) -> Iterator[TensorFile]:
        """Opens a safetensors file whose header must announce what follows it, tensors of at most `num_bytes`."""
        path = self.file(name, max_bytes=None if num_bytes is None else num_bytes + MAX_HEADER_BYTES)
        with open(path, "rb") as start:
            length = int.from_bytes(start.read(8), "little")
        if MAX_HEADER_BYTES < length < path.stat().st_size:
            raise ValueError(
                f"{path} is damaged: its header has {format_size(length)}, more than {format_size(MAX_HEADER_BYTES)}. "
                f"{way_out}"
            )
        try:
            with safe_open(path, framework="pt") as file:
                yield TensorFile(path, file, way_out)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({shortened(error, 300)}). {way_out}") from error


def files_in(folder: Path) -> tuple[set[str], set[str]]:
    """Names of all regular files in a folder, and of the links, which are not followed; hidden ones are in neither."""
    regular, links = set(), set()
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if not any(part.startswith(".") for part in name.parts):
            (links if path.is_symlink() else regular if path.is_file() else set()).add(name.as_posix())
    return regular, links


def leads_out(name: str) -> bool:
    """Whether a name leads out of its folder: absolute, with `..`, or with backslashes."""
    relative = PurePosixPath(name)
    return relative.is_absolute() or ".." in relative.parts or "\\" in name


def check_name(name: str) -> None:
    """Refuses a file name that leads out of its folder."""
    if leads_out(name):
        raise ValueError(f"{name!r} is not the name of a file in an artefact. {WAY_OUT}")


class TensorFile:
    """An open safetensors file."""

    def __init__(self, path: Path, file: safe_open, way_out: str = WAY_OUT) -> None:
        self.path = path
        self._file = file
        self._way_out = way_out
        self.names = dict.fromkeys(file.keys())
        if len(self.names) > MAX_TENSORS:
            raise ValueError(f"{path} is damaged: it has {len(self.names)} tensors. {way_out}")
        self.metadata: dict[str, str] = file.metadata() or {}  # what the header says besides the tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return tuple(self._file.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Dtype of a tensor, from the header, as safetensors calls it: `"F32"`."""
        return self._file.get_slice(name).get_dtype()

    def check_no_others(self, names: Collection[str]) -> None:
        """Refuses a file with other tensors than these."""
        extra = sorted(set(self.names) - set(names))
        if extra:
            named = [shortened(name) for name in extra[:5]]
            raise ValueError(f"{self.path} has the tensors {named} too many. {self._way_out}")

    def read(self, name: str, *, shape: Sequence[int | None], dtypes: Sequence[str]) -> Tensor:
        """Reads a tensor of this shape, in which `None` is any size, and one of these dtypes."""
        found = self.check(name, shape=shape, dtypes=dtypes)
        check_memory(DTYPE_BYTES[self.dtype(name)] * math.prod(found), f"{name!r} of {self.path}")
        return self._file.get_tensor(name)

    def check(self, name: str, *, shape: Sequence[int | None], dtypes: Sequence[str]) -> tuple[int, ...]:
        """Refuses a tensor that `read` would refuse, by its header; its shape otherwise."""
        if name not in self.names:
            raise ValueError(f"{self.path} has no tensor {name!r}. {self._way_out}")
        found, dtype = self.shape(name), self.dtype(name)
        fits = len(found) == len(shape) and all(
            want is None or want == size for want, size in zip(shape, found, strict=True)
        )
        if not fits or dtype not in dtypes:
            expected = tuple("any" if size is None else size for size in shape)
            raise ValueError(
                f"{self.path} has {name!r} of shape {found} and dtype {dtype}; expected {expected} and "
                f"{' or '.join(dtypes)}. {self._way_out}"
            )
        return found


def json_memory(text: str) -> int:
    """Memory that JSON takes in Python at most, by its signs, wherever they are."""
    counts = {pattern: sum(1 for _ in re.finditer(pattern, text)) for pattern in JSON_COSTS}
    return 2 * sys.getsizeof(text) + sum(cost * counts[pattern] for pattern, cost in JSON_COSTS.items())


def parse_json(text: str) -> Any:
    """Content of strict JSON: no repeated keys, no NaN or infinity, integers of 64 bits, at most 50 levels."""
    try:
        content = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_in_64_bits,
            object_pairs_hook=_without_repeats,
        )
    except RecursionError as error:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from error
    level = [content] if isinstance(content, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        members = (item.values() if isinstance(item, dict) else item for item in level)
        level = [value for values in members for value in values if isinstance(value, (dict, list))]
    if level:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    return content


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is too large a number")
    return number


def _in_64_bits(text: str) -> int:
    # Of more than 20 digits none fits, and Python's time is quadratic in their number.
    number = int(text) if len(text) <= 20 else None
    if number is None or not -(2**63) <= number < 2**64:
        raise ValueError(f"{text[:40]} is too large an integer")
    return number


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {repeated[:40]!r} is there twice")
    return content


def check_size(num_bytes: int, what: str, max_bytes: int | None = None) -> None:
    """Refuses a file that has more bytes than are free in memory, or than such a file may have."""
    check_memory(num_bytes, what)
    if max_bytes is not None and num_bytes > max_bytes:
        raise ValueError(
            f"{what} has {format_size(num_bytes)}, more than the {format_size(max_bytes)} such a file may have. "
            f"{WAY_OUT}"
        )


def check_memory(num_bytes: int, what: str) -> None:
    """Raises a `MemoryError` if something would not fit into the memory that is free."""
    free = psutil.virtual_memory().available
    if num_bytes > free:
        raise MemoryError(
            f"{what} needs {format_size(num_bytes)}, but only {format_size(free)} of memory are free. Use a machine "
            "with more memory, or something smaller."
        )


def check_disk(num_bytes: int, what: str, folder: Path) -> None:
    """Raises an `OSError` if something would fill the disk that a folder, which may not be there yet, is on."""
    free = shutil.disk_usage(next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())).free
    if num_bytes > DISK_SHARE * free:
        raise OSError(
            errno.ENOSPC,
            f"{what} has {format_size(num_bytes)}, but only {format_size(free)} are free in {folder}. Make room, or "
            "pass another `cache_dir`.",
        )


def parsed(content_class: type[Content], content: Mapping[str, Any], source: str) -> Content:
    """A dataclass of plain types, lists, dictionaries and unions from a JSON object; `source` is named in errors."""
    defaults = {item.name: item.default for item in fields(content_class) if item.default is not MISSING}  # type: ignore[arg-type]
    types, content = get_type_hints(content_class), {**defaults, **content}
    missing = [name for name in types if name not in content]
    if missing:
        raise ValueError(f"{source} lacks {', '.join(missing)}. {WAY_OUT}")
    for item in fields(content_class):  # type: ignore[arg-type]
        if not _is_a(content[item.name], types[item.name]):
            found = shortened(repr(content[item.name]))
            raise ValueError(f"{source} is damaged: `{item.name}` is {found}, not {item.type}. {WAY_OUT}")
    try:
        return content_class(**{name: content[name] for name in types})
    except ValueError as error:
        raise ValueError(f"{source} is damaged: {shortened(error, 300)}. {WAY_OUT}") from error


def _is_a(value: Any, kind: Any) -> bool:
    origin, members = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_is_a(value, member) for member in members)
    if origin is list:
        return isinstance(value, list) and all(_is_a(item, members[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is_a(item, members[1]) for item in value.values())
    return kind is Any or type(value) is kind or (kind is float and type(value) is int)


def printable(text: str) -> str:
    """The text with control characters, line breaks and marks of direction spelled out: terminals obey them."""
    if text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode("ascii") if _is_control(character) else character
        for character in text
    )


def shortened(value: Any, length: int = 64) -> str:
    """The first characters of a text from a file, printable: for errors."""
    text = str(value)
    return printable(text) if len(text) <= length else f"{printable(text[:length])}..."


def _is_control(character: str) -> bool:
    # Scripts and emoji are written with joiners.
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in "\u200c\u200d"


def _part_of_cache(root: Path) -> Path | None:
    """The repository's folder in the cache of the Hub, if `root` is a snapshot in one: links lead to its blobs."""
    in_cache = root.parent.name == "snapshots" and root.parent.parent.name.startswith(CACHED_KINDS)
    return root.parent.parent if in_cache else None
