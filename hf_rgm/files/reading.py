"""Reading artefacts that need not be trusted: folders on disk or on the Hub, checked before they are read."""

from __future__ import annotations

import contextlib
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_rgm.files.parquet_footer import announced_bytes
from hf_rgm.files.strict_json import parse_json
from hf_rgm.files.writing import finish_replacement, format_size

MAX_JSON_BYTES = 100_000_000
# What a byte of JSON takes in Python at most: "{}," are three bytes and an object of 64 in a list.
JSON_EXPANSION = 32
# Tables that are distinct in every row are at most a few times larger than their files.
MAX_EXPANSION = 1000
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "F32": 4, "I32": 4, "F64": 8, "I64": 8
}  # fmt: skip
CACHED_KINDS = ("datasets--", "models--", "spaces--")
WAY_OUT = "Copy it again, or ask whoever made it."

Content = TypeVar("Content")


class ArtefactFolder:
    """
    A folder that holds an artefact. Files are reached through it, so that none outside is.

    Args:
        root (`str` or `Path`): The folder.
        boundary (`Path`, *optional*): Links in the folder may lead to what is in here. Defaults to the folder itself,
            for a snapshot in the cache of the Hub to the repository's part of it.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from hf_rgm.files.reading import ArtefactFolder
    >>> Path("artefact").mkdir()
    >>> _ = Path("artefact/notes.json").write_text('{"format_version": 1, "text": "hello"}')
    >>> ArtefactFolder("artefact").read_json("notes.json", format_version=1)["text"]
    'hello'

    ```
    """

    def __init__(self, root: str | Path, *, boundary: Path | None = None) -> None:
        self.root = Path(root)
        finish_replacement(self.root)
        self.boundary = (boundary or _part_of_cache(self.root) or self.root).resolve()

    def __str__(self) -> str:
        return str(self.root)

    @property
    def is_remote(self) -> bool:
        """Whether files are fetched when they are asked for."""
        return False

    def subfolder(self, name: str) -> ArtefactFolder:
        """A folder in this one."""
        return ArtefactFolder(self.root / name, boundary=self.boundary)

    def at_hand(self, name: str) -> bool:
        """Whether a file can be read without fetching it."""
        return (self.root / name).is_file()

    def file(self, name: str) -> Path:
        """
        The path of a file that is there.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If the name, or a link, leads out of the folder.
        """
        check_name(name)
        path = self.root / name
        if not path.is_file():
            raise FileNotFoundError(f"{self} has no {name}: not an artefact folder, or not a whole one. {WAY_OUT}")
        if not path.resolve().is_relative_to(self.boundary):
            raise ValueError(f"{path} is a link that leads out of {self.boundary}. Put the file itself there.")
        return path

    def read_json(self, name: str, *, format_version: int) -> dict[str, Any]:
        """
        Reads a JSON object and checks its `format_version`.

        Raises:
            FileNotFoundError: If there is no such file.
            MemoryError: If it could take more memory than is free.
            ValueError: If it is too large, not [strict JSON][parse_json], or not an object of this version.
        """
        path = self.file(name)
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise ValueError(
                f"{path} has {format_size(size)}, more than the {format_size(MAX_JSON_BYTES)} such a file may have. "
                f"{WAY_OUT}"
            )
        check_memory(JSON_EXPANSION * size, str(path))
        try:
            content = parse_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON ({_short(error, 300)}). {WAY_OUT}") from error
        found = content.get("format_version") if isinstance(content, dict) else type(content).__name__
        if found != format_version or isinstance(found, bool):
            raise ValueError(
                f"{path} has format version {_short(found)}, this release of hf_rgm reads {format_version}. Install "
                "the release that wrote it, or write it again."
            )
        return content

    @contextlib.contextmanager
    def open_tensors(self, name: str) -> Iterator[TensorFile]:
        """
        Opens a safetensors file.

        Raises:
            FileNotFoundError: If there is none.
            MemoryError: If it is larger than the memory that is free.
            ValueError: If it is damaged, or errors of safetensors occur while it is open.
        """
        path = self.file(name)
        check_memory(path.stat().st_size, str(path))
        try:
            with safe_open(path, framework="pt") as file:
                yield TensorFile(path, file)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({_short(error, 300)}). {WAY_OUT}") from error

    def read_parquet(self, name: str, schema: Mapping[str, pa.DataType], *, num_rows: int) -> pa.Table:
        """
        Reads columns of a parquet file of which it is known how many lines it has.

        Args:
            name (`str`): The file.
            schema (`Mapping[str, pa.DataType]`): Columns to read; they must have these types.
            num_rows (`int`): The lines it must have.

        Raises:
            FileNotFoundError: If there is no such file.
            MemoryError: If the table is larger than the memory that is free.
            ValueError: If it is damaged or holds something else.
        """
        path = self.file(name)
        try:
            with pq.ParquetFile(path) as file:
                if file.metadata.num_rows != num_rows:
                    raise ValueError(f"it has {file.metadata.num_rows} lines, {num_rows} are announced")
                check_columns(file.schema_arrow, schema)
                check_table(path)
                table = file.read(columns=list(schema))
                check_no_nulls(table)
                return table
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({_short(error, 300)}). {WAY_OUT}") from error


def leads_out(name: str) -> bool:
    """Whether a name can be none of a file in a folder."""
    relative = PurePosixPath(name)
    return relative.is_absolute() or ".." in relative.parts or "\\" in name


def check_name(name: str) -> None:
    """Raises a `ValueError` if the name of a file leads out of its folder."""
    if leads_out(name):
        raise ValueError(f"{name!r} is no name of a file in an artefact. {WAY_OUT}")


class TensorFile:
    """
    An open safetensors file.

    Args:
        path (`Path`): Where it is.
        file (`safe_open`): The file.
    """

    def __init__(self, path: Path, file: safe_open) -> None:
        self.path = path
        self._file = file
        self._names = dict.fromkeys(file.keys())

    @property
    def metadata(self) -> dict[str, str]:
        """What the header says besides the tensors."""
        return self._file.metadata() or {}

    @property
    def names(self) -> list[str]:
        """Names of the tensors."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return tuple(self._file.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Dtype of a tensor, from the header, as safetensors calls it: `"F32"`."""
        return self._file.get_slice(name).get_dtype()

    def read(self, name: str, *, shape: Sequence[int | None], dtypes: Sequence[str]) -> Tensor:
        """
        Reads a tensor, after a look at the header.

        Args:
            name (`str`): Its name.
            shape (`Sequence`): The shape it must have; `None` stands for any size.
            dtypes (`Sequence[str]`): The dtypes it may have.

        Raises:
            MemoryError: If it is larger than the memory that is free.
            ValueError: If it is missing or something else.
        """
        if name not in self._names:
            raise ValueError(f"{self.path} has no tensor {name!r}. {WAY_OUT}")
        found, dtype = self.shape(name), self.dtype(name)
        fits = len(found) == len(shape) and all(
            want is None or want == size for want, size in zip(shape, found, strict=True)
        )
        if not fits or dtype not in dtypes:
            expected = tuple("any" if size is None else size for size in shape)
            raise ValueError(
                f"{self.path} has {name!r} of shape {found} and dtype {dtype}; expected {expected} and "
                f"{' or '.join(dtypes)}. {WAY_OUT}"
            )
        num_bytes = DTYPE_BYTES[dtype]
        for size in found:
            num_bytes *= size
        check_memory(num_bytes, f"{name!r} of {self.path}")
        return self._file.get_tensor(name)


def check_columns(found: pa.Schema, wanted: Mapping[str, pa.DataType], *, optional: Collection[str] = ()) -> None:
    """
    Raises a `ValueError` unless a table has each column once and in its type.

    Args:
        found (`pa.Schema`): Of the table.
        wanted (`Mapping[str, pa.DataType]`): The columns, by name.
        optional (`Collection[str]`, *optional*): Those that may be missing.
    """
    for column, dtype in wanted.items():
        count = found.names.count(column)
        if count == 0 and column in optional:
            continue
        kind = found.field(found.names.index(column)).type if count == 1 else f"there {count} times"
        if kind != dtype:
            raise ValueError(f"column {column!r} is {kind}, not {dtype}")


def check_table(path: Path) -> None:
    """
    Checks, before a parquet file of numbers is read, that its memory is bounded.

    Args:
        path (`Path`): The file.

    Raises:
        MemoryError: If the table is larger than the memory that is free.
        ValueError: If it is out of all proportion to the file, or the footer is none.
    """
    num_bytes, on_disk = announced_bytes(path), path.stat().st_size
    if num_bytes > MAX_EXPANSION * on_disk:
        raise ValueError(f"it announces {format_size(num_bytes)} in a file of {format_size(on_disk)}")
    check_memory(num_bytes, str(path))


def check_no_nulls(table: pa.Table) -> None:
    """Raises a `ValueError` if values, or elements of lists, are missing."""
    for name, column in zip(table.column_names, table.columns, strict=True):
        inner = [chunk.values for chunk in column.chunks if isinstance(chunk, pa.LargeListArray)]
        if column.null_count or any(values.null_count for values in inner):
            raise ValueError(f"column {name!r} lacks values")


def check_memory(num_bytes: int, what: str) -> None:
    """
    Raises a `MemoryError` if something would not fit into the memory that is free.

    Args:
        num_bytes (`int`): Its size.
        what (`str`): How the error calls it.
    """
    free = psutil.virtual_memory().available
    if num_bytes > free:
        raise MemoryError(
            f"{what} needs {format_size(num_bytes)}, but only {format_size(free)} of memory are free. Use a machine "
            "with more memory, or something smaller."
        )


def parsed(content_class: type[Content], content: Mapping[str, Any], source: str) -> Content:
    """
    The fields of a dataclass from a JSON object, types checked.

    Args:
        content_class (`type`): A dataclass of plain types, lists, dictionaries and unions of these. What it raises a
            `ValueError` for is reported like a wrong type. `float` takes integers, `int` no booleans.
        content (`Mapping[str, Any]`): The object; keys that are no fields are left alone.
        source (`str`): Where it is from, for errors.

    Raises:
        ValueError: If a field is missing or of another type.
    """
    types = get_type_hints(content_class)
    missing = [name for name in types if name not in content]
    if missing:
        raise ValueError(f"{source} lacks {', '.join(missing)}. {WAY_OUT}")
    for item in fields(content_class):  # type: ignore[arg-type]
        if not _is_a(content[item.name], types[item.name]):
            raise ValueError(
                f"{source} is damaged: `{item.name}` is {_short(repr(content[item.name]))}, not {item.type}. {WAY_OUT}"
            )
    try:
        return content_class(**{name: content[name] for name in types})
    except ValueError as error:
        raise ValueError(f"{source} is damaged: {_short(error, 300)}. {WAY_OUT}") from error


def _is_a(value: Any, kind: Any) -> bool:
    origin, members = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_is_a(value, member) for member in members)
    if origin is list:
        return isinstance(value, list) and all(_is_a(item, members[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is_a(item, members[1]) for item in value.values())
    return kind is Any or type(value) is kind or (kind is float and type(value) is int)


def with_defaults(content_class: type, content: Mapping[str, Any]) -> dict[str, Any]:
    """The object with the defaults of a dataclass in place of what is missing."""
    defaults = {item.name: item.default for item in fields(content_class) if item.default is not MISSING}
    return {**defaults, **content}


def printable(text: str) -> str:
    """
    The text with control characters, line breaks and marks that change the direction of writing spelled out.

    Names that come from data are shown in terminals, where such characters could do things.

    Example:

    ```python
    >>> from hf_rgm.files.reading import printable
    >>> printable("imdb\\x1b[2J")
    'imdb\\\\x1b[2J'

    ```
    """
    return "".join(
        character.encode("unicode_escape").decode("ascii") if _is_control(character) else character
        for character in text
    )


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in _JOINERS


# Scripts and emoji are written with these.
_JOINERS = "\u200c\u200d"


def _short(value: Any, length: int = 60) -> str:
    text = printable(str(value))
    return text if len(text) <= length else f"{text[:length]}..."


def _part_of_cache(root: Path) -> Path | None:
    """The repository's folder in the cache of the Hub, if `root` is a snapshot in one: links lead to its blobs."""
    in_cache = root.parent.name == "snapshots" and root.parent.parent.name.startswith(CACHED_KINDS)
    return root.parent.parent if in_cache else None
