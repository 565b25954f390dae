from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rgm.files.parquet_footer import announced_bytes

TABLE = pa.table(
    {
        "a": pa.array(range(1000), pa.int64()),
        "b": pa.array([0.5] * 1000),
        "c": pa.array([[1, 2, 3]] * 1000, pa.large_list(pa.int64())),
        "d": ["text"] * 1000,
        "e": pa.array([True, None] * 500),
    }
)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"row_group_size": 7},
        {"compression": "zstd", "use_dictionary": False, "version": "1.0"},
        {"write_page_index": True, "write_page_checksum": True, "store_decimal_as_integer": True},
        {"sorting_columns": [pq.SortingColumn(0)], "data_page_version": "2.0"},
    ],
    ids=str,
)
def test_sizes_are_those_that_pyarrow_reads(options, tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(TABLE.replace_schema_metadata({"k": "v" * 300}), path, **options)
    metadata = pq.read_metadata(path)
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    columns = [group.column(index) for group in groups for index in range(group.num_columns)]
    expected = sum(max(8 * column.num_values, column.total_uncompressed_size) for column in columns)
    assert announced_bytes(path) == expected > 8 * 6000


def test_a_table_without_lines_takes_nothing(tmp_path):
    pq.write_table(TABLE.slice(0, 0), tmp_path / "a.parquet")
    assert announced_bytes(tmp_path / "a.parquet") < 1000


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" * 2, b"x" * 100, b"\x00" * 4 + b"\xff" * 4 + b"PAR1"])
def test_what_is_no_parquet_file_is_refused(content, tmp_path):
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(ValueError, match="parquet file"):
        announced_bytes(tmp_path / "a.parquet")


@given(footer=st.binary(max_size=200) | st.integers(0, 255).map(lambda byte: bytes([byte]) * 10_000))
@settings(deadline=None, derandomize=True, max_examples=500)
def test_any_footer_is_read_or_refused(footer, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzzed.parquet"
    path.write_bytes(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    try:
        assert announced_bytes(path) >= 0
    except ValueError as error:
        assert str(error).startswith("it")


def test_pages_are_believed_more_than_the_footer(tmp_path):
    """A footer can say 1 where the page that pyarrow reads holds 300,000 values, all the same and thus tiny."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"rows": pa.array([[7] * 300_000], pa.large_list(pa.int64()))}), path)
    content = path.read_bytes()
    length = int.from_bytes(content[-8:-4], "little")
    footer = content[-8 - length : -8]
    number = bytes([0xC0, 0xCF, 0x24])  # 300,000 as a zigzag varint
    assert number in footer
    lying = footer.replace(number, bytes([0x82, 0x80, 0x00]))  # 1, padded to the same length
    path.write_bytes(content[: -8 - length] + lying + content[-8:])
    assert len(content) < 10_000
    assert announced_bytes(path) >= 8 * 300_000
