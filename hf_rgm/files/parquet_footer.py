"""What a parquet file announces, read without pyarrow: its accessors end the process on some damaged footers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

_MAGIC = b"PAR1"
_MAX_DEPTH = 16
# Fields of the Thrift structures FileMetaData, RowGroup, ColumnChunk and ColumnMetaData.
_ROW_GROUPS, _COLUMNS, _META_DATA, _NUM_VALUES, _UNCOMPRESSED_SIZE, _COMPRESSED_SIZE = 4, 1, 3, 5, 6, 7
_DATA_OFFSET, _DICTIONARY_OFFSET = 9, 11
# Of PageHeader: sizes before and after compression, and the headers of data pages of both versions, whose first field
# is the number of values.
_PAGE_BYTES, _PAGE_SIZE, _DATA_PAGES, _PAGE_VALUES = 2, 3, (5, 8), 1
_MAX_PAGE_HEADER = 2**16
_TRUE, _FALSE, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _LISTS, _MAP, _STRUCT = 1, 2, 3, (4, 5, 6), 7, 8, (9, 10), 11, 12


def announced_bytes(path: Path) -> int:
    """
    What the values of a parquet file of numbers take in memory at most: 8 bytes each, or their size on disk before
    compression where that is more.

    The footer is not believed: pages say themselves how many values they hold, and pyarrow reads what they say.

    Args:
        path (`Path`): The file, of which the footer and the headers of the pages are read.

    Raises:
        ValueError: If it has no whole footer, or that or a page announces fewer than no values.
    """
    try:
        groups = _Compact(_footer(path)).struct()[_ROW_GROUPS]
        columns = [column[_META_DATA] for group in groups for column in group[_COLUMNS]]
        with open(path, "rb") as file:
            sizes = [
                (8 * column[_NUM_VALUES], column[_UNCOMPRESSED_SIZE], *_sizes_of_pages(file, column))
                for column in columns
            ]
        if any(min(each) < 0 for each in sizes):
            raise ValueError("it announces fewer than no values")
        return sum(max(each) for each in sizes)
    except (IndexError, KeyError, TypeError) as error:
        raise ValueError("its footer is not that of a parquet file") from error


def _sizes_of_pages(file: BinaryIO, column: dict[int, Any]) -> tuple[int, int]:
    """What the values of a column chunk take, and its pages before compression, by the pages' own headers."""
    offsets = [column[_DATA_OFFSET], column.get(_DICTIONARY_OFFSET, 0)]
    # A chunk of no values has no pages.
    at = min((offset for offset in offsets if offset > 0), default=0)
    end = at + column[_COMPRESSED_SIZE]
    num_values, num_bytes = 0, 0
    while at < end:
        file.seek(at)
        reader = _Compact(file.read(_MAX_PAGE_HEADER))
        header = reader.struct()
        counts = [header[kind][_PAGE_VALUES] for kind in _DATA_PAGES if kind in header]
        if min(0, header[_PAGE_SIZE], header[_PAGE_BYTES], *counts) < 0:
            raise ValueError("it has a page of less than nothing")
        num_values += sum(counts)
        num_bytes += header[_PAGE_BYTES]
        at += reader.position + header[_PAGE_SIZE]
    return 8 * num_values, num_bytes


def _footer(path: Path) -> bytes:
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - 8))
        end = file.read(8)
        length = int.from_bytes(end[:4], "little")
        if len(end) < 8 or end[4:] != _MAGIC or length + 8 > size:
            raise ValueError("it does not end as a parquet file does")
        file.seek(size - 8 - length)
        return file.read(length)


class _Compact:
    """
    Reads Thrift's compact protocol: structures as dictionaries by field number.

    Every element takes at least a byte, so that no more is built than the footer is long.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def position(self) -> int:
        """Bytes read so far."""
        return self._at

    def struct(self, depth: int = 0) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while header := self._byte():
            step, kind = header >> 4, header & 15
            number = number + step if step else self._integer()
            fields[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise ValueError("its footer is nested too deep")
        if kind in (_TRUE, _FALSE, _BYTE):
            return self._byte()
        if kind in _INTEGERS:
            return self._integer()
        if kind in (_DOUBLE, _BINARY):
            # Nothing that is looked for is text or a fraction.
            length = 8 if kind == _DOUBLE else self._varint()
            self._at += length
            return None
        if kind in _LISTS:
            header = self._byte()
            count = header >> 4 if header >> 4 < 15 else self._varint()
            return [self._value(header & 15, depth + 1) for _ in range(count)]
        if kind == _MAP:
            count = self._varint()
            kinds = self._byte() if count else 0
            return [self._value(each, depth + 1) for _ in range(count) for each in (kinds >> 4, kinds & 15)]
        if kind == _STRUCT:
            return self.struct(depth + 1)
        raise ValueError("its footer has values of an unknown kind")

    def _byte(self) -> int:
        value = self._data[self._at]
        self._at += 1
        return value

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("its footer has a number beyond 64 bits")

    def _integer(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)
