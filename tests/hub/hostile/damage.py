"""Damage that any file of its kind may have: JSON, safetensors, and tables in safetensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hf_rgm.files.reading import MAX_JSON_BYTES
from tests.hub.hostile.artefacts import ARTEFACTS
from tests.hub.hostile.edits import (
    Edit,
    a_folder,
    a_link,
    a_parquet_file,
    a_pickle,
    a_torch_pickle,
    all_of,
    append,
    bad_value,
    drop_key,
    header,
    in_text,
    one_huge_tensor,
    remove,
    set_json,
    tensor,
    tensors,
    text,
    truncate,
)

HUNDRED_GB = [25_000, 1_000_000]
"""A shape of float32 that takes 100 GB."""


@dataclass(frozen=True)
class Case:
    """
    One way to tamper with an artefact.

    Args:
        artefact (`str`): Its class.
        done (`str`): What was done, in words.
        edit (`Callable`): Does it to a folder.
        message (`str`, *optional*): A regular expression that the error must match; `None` for what loads and can be
            used.
        error (`type`, *optional*, defaults to `ValueError`): The error that is raised.
        on_hub (`bool`, *optional*, defaults to `False`): Whether it is tried through the Hub too.
    """

    artefact: str
    done: str
    edit: Edit
    message: str | None
    error: type[Exception] = ValueError
    on_hub: bool = False


STATE, FINAL, STEPS = (
    "states/step-00000010.safetensors",
    "states/step-00000048.safetensors",
    "steps/part-00000000.safetensors",
)
RUN = "trajectories/0"
# Files of each artefact, by kind.
JSON = {name: artefact.marker for name, artefact in ARTEFACTS.items()}
TENSORS = {"Synset": "synset.safetensors", "AttributionResult": "attribution.safetensors", "Trajectory": STATE}
# Artefact, file, a column of it, and an edit that has the file announce 100 GB.
TABLES = [
    (name, file, key, one_huge_tensor(file, key, shape, dtype))
    for name, file, key, shape, dtype in (
        ("ClusterMap", "clusters.safetensors", "cluster_ids", [12_500_000_000], "I64"),
        ("Synset", "clusters/clusters.safetensors", "cluster_ids", [12_500_000_000], "I64"),
        ("Trajectory", STEPS, "learning_rates", [48, 260_416_667], "F64"),
    )
]
A_KEY = {"Synset": "num_runs", "AttributionResult": "objective", "Trajectory": "num_steps", "ClusterMap": "num_rows"}
A_TENSOR = {"Synset": "inputs", "AttributionResult": "scores", "Trajectory": "parameters.hidden.weight"}


def any_json() -> Iterator[Case]:
    """Damage that any JSON file may have."""
    for name, file in JSON.items():
        key = A_KEY[name]
        first = '{\n  "'
        invalid = rf"{file} is not valid JSON"
        for done, edit, message in (
            ("is empty", text(file, ""), invalid),
            ("is cut off", truncate(file, 0.6), invalid),
            ("is a pickle", a_pickle(file), invalid),
            ("is a list", text(file, "[]"), "has format version list"),
            ("is a number", text(file, "1"), "has format version int"),
            ("is of another format version", set_json(file, ("format_version",), 99), "has format version 99"),
            (
                "has a format version that is true",
                set_json(file, ("format_version",), True),
                "has format version True",
            ),
            ("is nested 100,000 deep", text(file, "[" * 100_000 + "]" * 100_000), "nested more than 50 deep"),
            ("is nested 60 deep", in_text(file, first, '{"x": ' + "[" * 60 + "]" * 60 + ',\n  "'), "nested more than"),
            (
                "has a key twice",
                in_text(file, first, '{"format_version": 1, "format_version": 1, "'),
                "is there twice",
            ),
            ("has NaN", in_text(file, first, '{"x": NaN,\n  "'), "NaN is no number"),
            ("has -Infinity", in_text(file, first, '{"x": -Infinity,\n  "'), "-Infinity is no number"),
            ("has 1e999", in_text(file, first, '{"x": 1e999,\n  "'), "1e999 is too large a number"),
            ("has 2**64", in_text(file, first, f'{{"x": {2**64},\n  "'), "is too large an integer"),
            (
                "has a number of 4,000 digits",
                in_text(file, first, '{"x": ' + "9" * 4000 + ',\n  "'),
                "is too large an integer",
            ),
            ("is not UTF-8", text(file, b'{"format_version": "\xff"}'), "can't decode byte"),
            ("begins with a byte order mark", in_text(file, first, "\ufeff" + first), invalid),
            (f"lacks `{key}`", drop_key(file, key), f"lacks .*{key}"),
        ):
            yield Case(name, f"{file} {done}", edit, message, on_hub=done in ("is cut off", "is nested 100,000 deep"))
        yield Case(
            name,
            f"{file} is larger than {MAX_JSON_BYTES // 10**6} MB",
            lambda folder, file=file: (folder / file).open("ab").truncate(MAX_JSON_BYTES + 1),
            "more than the (32.0|8.0) MB",
        )
        yield Case(name, f"{file} is missing", remove(file), f"has no {file}", FileNotFoundError)
        yield Case(name, f"{file} is a folder", a_folder(file), f"has no {file}", FileNotFoundError)
        yield Case(name, f"{file} is a link out of the folder", a_link(file), "a link that leads out")


def any_tensors() -> Iterator[Case]:
    """Damage that any safetensors file may have."""
    for name, file in TENSORS.items():
        key, short = A_TENSOR[name], file.rpartition("/")[2]
        damaged = rf"{short} is damaged"
        for done, edit, message in (
            ("is empty", text(file, ""), damaged),
            ("is cut off in the header", truncate(file, 0.05), damaged),
            ("is cut off in the data", truncate(file, 0.9), damaged),
            ("is a pickle", a_pickle(file), damaged),
            ("is a file of torch.save", a_torch_pickle(file), damaged),
            ("announces a header of 2**63 bytes", text(file, b"\xff" * 7 + b"\x7f" + b"{}"), damaged),
            ("has a header that is no JSON", text(file, b"\x08" + bytes(7) + b"{]{]{]{]"), damaged),
            (
                "announces a shape other than its data's",
                header(file, lambda told, key=key: told[key].update(shape=[2**40, 2**40])),
                damaged,
            ),
            (
                "announces a negative size",
                header(file, lambda told, key=key: told[key].update(shape=[-1])),
                damaged,
            ),
            (
                "announces an unknown dtype",
                header(file, lambda told, key=key: told[key].update(dtype="F31")),
                damaged,
            ),
            (
                "announces data beyond its end",
                header(file, lambda told, key=key: told[key].update(data_offsets=[0, 2**62])),
                damaged,
            ),
            ("is of float64", tensor(file, key, torch.Tensor.double), "dtype F64; expected|dtype F64"),
            ("is of complex numbers", tensor(file, key, lambda x: x.to(torch.complex64)), "C64|damaged"),
            ("is of int64", tensor(file, key, torch.Tensor.long), "dtype I64; expected"),
            ("is of 8-bit floats", tensor(file, key, lambda x: x.to(torch.float8_e4m3fn)), "dtype F8_E4M3; expected"),
            ("has NaN", tensor(file, key, bad_value(float("nan"))), "NaN or infinite"),
            ("has infinity", tensor(file, key, bad_value(float("inf"))), "NaN or infinite"),
            ("lacks a tensor", tensors(file, lambda content, key=key: content.pop(key)), "has no tensor|lacks param"),
            ("has a tensor of another shape", tensor(file, key, lambda x: x[:1]), "expected"),
            ("has a tensor of no elements", tensor(file, key, lambda x: x[:0]), "expected"),
        ):
            yield Case(name, f"{short} {done}", edit, message, on_hub=done in ("is a pickle", "has NaN"))
        yield Case(
            name,
            f"{short} announces 100 GB, in a sparse file",
            one_huge_tensor(file, key, HUNDRED_GB),
            "needs 100.0 GB, but only",
            MemoryError,
        )
        yield Case(name, f"{short} is missing", remove(file), "has no|missing", FileNotFoundError)
        yield Case(name, f"{short} is a link out of the folder", a_link(file), "a link that leads out")
    yield Case(
        "Synset",
        "synset.safetensors and synset.json announce inputs of 100 GB",
        all_of(
            set_json("synset.json", ("tensors", "inputs"), [6, 10**9, 5]),
            one_huge_tensor("synset.safetensors", "inputs", [6, 10**9, 5]),
        ),
        "needs 120.0 GB, but only",
        MemoryError,
    )


def any_table() -> Iterator[Case]:
    """Damage that any table, a safetensors file with columns, may have."""
    for name, file, key, huge in TABLES:
        short = file.rpartition("/")[2]
        damaged = f"{short} is damaged"
        for done, edit, message in (
            ("is empty", text(file, ""), damaged),
            ("is cut off in the header", truncate(file, 0.05), damaged),
            ("is cut off in the data", truncate(file, 0.9), damaged),
            ("has bytes after its end", lambda folder, file=file: append(folder / file, bytes(8)), damaged),
            ("is a pickle", a_pickle(file), damaged),
            ("is a table of parquet", a_parquet_file(file), damaged),
            (
                "announces more values than it has bytes",
                header(file, lambda told, key=key: told[key].update(shape=[10**8])),
                damaged,
            ),
            (
                "announces data beyond its end",
                header(file, lambda told, key=key: told[key].update(data_offsets=[0, 2**62])),
                damaged,
            ),
            (
                "announces a negative size",
                header(file, lambda told, key=key: told[key].update(shape=[-1])),
                damaged,
            ),
            ("is of float32", tensor(file, key, torch.Tensor.float), "dtype F32; expected"),
            ("is of int32", tensor(file, key, torch.Tensor.int), "dtype I32; expected"),
            ("is of bytes", tensor(file, key, lambda x: x.to(torch.uint8)), "dtype U8; expected"),
            ("lacks a column", tensors(file, lambda content, key=key: content.pop(key)), f"has no tensor '{key}'"),
            (
                "has a column too many",
                tensors(file, lambda content, key=key: content.update({"\x1b[2J": content[key].clone()})),
                "has the tensors .* too many",
            ),
            ("lacks a line in a column", tensor(file, key, lambda x: x[1:]), "expected"),
            ("has a column of two dimensions more", tensor(file, key, lambda x: x[None, None]), "expected"),
            ("has a column of no dimension", tensor(file, key, lambda x: x.flatten()[0]), "expected"),
        ):
            yield Case(name, f"{short} {done}", edit, message, on_hub=done in ("is a pickle", "lacks a column"))
        yield Case(name, f"{short} announces 100 GB, in a sparse file", huge, "needs 100.0 GB, but only", MemoryError)
        missing = ("records no steps", ValueError) if name == "Trajectory" else ("has no", FileNotFoundError)
        yield Case(name, f"{short} is missing", remove(file), *missing)
        yield Case(name, f"{short} is a link out of the folder", a_link(file), "a link that leads out")
