"""What a stranger may put into a repository, and what must come of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from hf_rgm.artefacts import MAX_JSON_BYTES
from tests.hub.hostile.artefacts import ARTEFACTS
from tests.hub.hostile.edits import (
    Edit,
    Route,
    a_folder,
    a_link,
    a_linked_folder,
    a_pickle,
    a_torch_pickle,
    all_of,
    bad_value,
    column,
    drop_key,
    header,
    in_text,
    one_huge_tensor,
    remove,
    required,
    set_json,
    table,
    tensor,
    tensors,
    text,
    truncate,
)

HARMLESS = "harmless"
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
    "steps/part-00000000.parquet",
)
RUN = "trajectories/0"
# Files of each artefact, by kind.
JSON = {name: artefact.marker for name, artefact in ARTEFACTS.items()}
TENSORS = {"Synset": "synset.safetensors", "AttributionResult": "attribution.safetensors", "Trajectory": STATE}
TABLES = {"ClusterMap": "rows.parquet", "Synset": "clusters/rows.parquet", "Trajectory": STEPS}
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
            "more than the 100.0 MB",
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
    """Damage that any parquet file may have."""
    for name, file in TABLES.items():
        short = file.rpartition("/")[2]
        key = "step" if name == "Trajectory" else "row"
        damaged = f"{short} is damaged"
        for done, edit, message in (
            ("is empty", text(file, ""), damaged),
            ("is cut off", truncate(file, 0.7), damaged),
            ("is a pickle", a_pickle(file), damaged),
            ("lacks a column", table(file, lambda content, key=key: content.drop_columns([key])), "there 0 times"),
            (
                "has a column twice",
                table(file, lambda content, key=key: content.append_column(key, content[key])),
                "there 2 times",
            ),
            (
                "has a column of text",
                column(file, key, lambda values: pa.array([str(value) for value in values])),
                "is string, not int64",
            ),
            (
                "has a column of float64",
                column(file, key, lambda values: values.cast(pa.float64())),
                "is double, not int64",
            ),
            (
                "has a column of structures",
                column(file, key, lambda values: pa.array([{"value": value.as_py()} for value in values])),
                "is struct.*, not int64",
            ),
            (
                "lacks a value",
                column(file, key, lambda values: pa.array([None, *values.to_pylist()[1:]], pa.int64())),
                "lacks values",
            ),
            (
                "has a line twice",
                column(file, key, lambda values: pa.array([values[1].as_py(), *values.to_pylist()[1:]])),
                "every row once|consecutive",
            ),
            (
                "has negative rows",
                column(file, key, lambda values: pa.array([-value for value in values.to_pylist()])),
                "every row once|consecutive",
            ),
            (
                "has a footer that contradicts its statistics",
                required(file, key),
                "is damaged|every row once|consecutive",
            ),
            (
                "has an extension type whose metadata is a pickle",
                table(file, lambda content, key=key: _with_extension(content, key)),
                None,
            ),
        ):
            yield Case(name, f"{short} {done}", edit, message, on_hub=done in ("is a pickle", "lacks a value"))
        yield Case(
            name,
            f"{short} is missing",
            remove(file),
            "has no|no steps",
            (FileNotFoundError if key == "row" else ValueError),
        )
        yield Case(name, f"{short} is a link out of the folder", a_link(file), "a link that leads out")


def _with_extension(content: pa.Table, key: str) -> pa.Table:
    """Declares a column to be what old releases of pyarrow made by unpickling (CVE-2023-47248)."""
    import pickle

    from tests.hub.hostile.edits import Payload

    told = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(Payload(), 0)}
    position = content.column_names.index(key)
    return content.cast(content.schema.set(position, content.schema.field(key).with_metadata(told)))


def a_bomb(num_rows: int, columns: list[str]) -> Edit:
    """Parquet of few bytes that announces many rows of one value."""

    def edit(folder: Any) -> None:
        chunk = pa.array(np.zeros(10**6, np.int64))
        values = pa.chunked_array([chunk] * (num_rows // len(chunk)))
        pq.write_table(pa.table(dict.fromkeys(columns, values)), folder / "rows.parquet", compression="zstd")

    return edit


def cluster_maps() -> Iterator[Case]:
    """What a map of clusters must not say."""
    file = "clusters.json"
    damaged = "cluster map in .* is damaged"
    for done, edit, message in (
        ("names more clusters than rows have", set_json(file, ("names",), [str(k) for k in range(13)]), damaged),
        ("names a cluster without rows", set_json(file, ("names",), ["a", "b", "c", "d", "e"]), damaged),
        ("names fewer clusters than rows have", set_json(file, ("names",), ["a"]), damaged),
        ("names two clusters alike", set_json(file, ("names", 1), "imdb"), damaged),
        ("announces -1 rows", set_json(file, ("num_rows",), -1), "-1 are announced"),
        ("announces 10**18 rows", set_json(file, ("num_rows",), 10**18), "are announced"),
        ("has a parent that is not there", set_json(file, ("parents", 0), 99), damaged),
        ("has a parent beyond 64 bits", set_json(file, ("parents", 0), 2**63), damaged),
        ("has parents without names", set_json(file, ("parent_names",), None), damaged),
        ("has fewer parents than clusters", set_json(file, ("parents",), [0]), damaged),
    ):
        yield Case("ClusterMap", f"{file} {done}", edit, message, on_hub=done == "announces 10**18 rows")
    far = column("rows.parquet", "cluster_id", lambda values: pa.array([10**15, *values.to_pylist()[1:]]))
    yield Case("ClusterMap", "rows.parquet has cluster 10**15", far, damaged)
    yield Case(
        "ClusterMap",
        "rows.parquet has 10**8 rows of one value in 0.4 MB, as announced",
        all_of(set_json(file, ("num_rows",), 10**8), a_bomb(10**8, ["row", "cluster_id"])),
        "announces 1.6 GB in a file of",
    )
    yield Case(
        "ClusterMap",
        "rows.parquet has 10**7 rows, 12 are announced",
        a_bomb(10**7, ["row", "cluster_id"]),
        "10000000 lines, 12 are announced",
    )


def results() -> Iterator[Case]:
    """What a result must not say."""
    file, matrices = "attribution.json", "attribution.safetensors"
    damaged = "The result in .* is damaged"
    for done, edit, message in (
        ("names no queries", set_json(file, ("query_ids",), []), "names 0 queries"),
        ("names no clusters", set_json(file, ("cluster_names",), []), "and 0 clusters"),
        ("names two queries alike", set_json(file, ("query_ids", 1), "a"), damaged),
        ("names queries by numbers and text alike", set_json(file, ("query_ids",), [1, "1"]), damaged),
        ("has a query id beyond 64 bits", set_json(file, ("query_ids",), [1, 2**63]), "no 64-bit integers"),
        ("announces -1 rows", set_json(file, ("num_rows",), -1), "expected"),
        ("announces 10**18 rows", set_json(file, ("num_rows",), 10**18), "expected"),
        ("has a fidelity that is no report", set_json(file, ("metadata", "fidelity"), {"x": 1}), "fidelity report"),
    ):
        yield Case("AttributionResult", f"{file} {done}", edit, message, on_hub=done == "names no queries")
    for done, edit, message in (
        ("has a negative cluster size", tensor(matrices, "cluster_sizes", bad_value(-4)), "cluster sizes from -4"),
        (
            "has cluster sizes beyond 64 bits",
            tensor(matrices, "cluster_sizes", lambda x: x * 0 + 2**62),
            "cluster sizes",
        ),
        ("has cluster 2**40", tensor(matrices, "cluster_ids", bad_value(2**40)), "cluster ids from"),
        ("has a row in cluster -1", tensor(matrices, "cluster_ids", bad_value(-1)), "cluster ids from -1"),
        (
            "has sizes other than its clusters'",
            tensor(matrices, "cluster_sizes", lambda x: x[[1, 0, 2]] + torch.tensor([1, 0, -1])),
            damaged,
        ),
    ):
        yield Case("AttributionResult", f"{matrices} {done}", edit, message)


def trajectories(prefix: str = "") -> Iterator[Case]:
    """What a recorded run must not say."""
    file, steps = f"{prefix}trajectory.json", f"{prefix}{STEPS}"
    group: Route = ("optimizer", "groups", 0)
    for done, edit, message in (
        ("has -1 steps", set_json(file, ("num_steps",), -1), "has -1 steps"),
        ("has no steps", set_json(file, ("num_steps",), 0), "has 0 steps"),
        ("has 2**63 steps", set_json(file, ("num_steps",), 2**63), "steps"),
        ("has 10**15 steps", set_json(file, ("num_steps",), 10**15), "names states at steps"),
        ("has no rows", set_json(file, ("num_rows",), 0), "on 0 rows"),
        ("is not complete", set_json(file, ("complete",), False), "is not complete"),
        ("names no states", set_json(file, ("state_steps",), []), "names states at steps"),
        ("names a state before the first", set_json(file, ("state_steps", 0), -1), "names states at steps"),
        ("names 10**6 states", set_json(file, ("state_steps",), list(range(10**6))), "names states at steps"),
        ("has an optimizer of another name", set_json(file, ("optimizer", "name"), "lion"), "optimizer .* is damaged"),
        ("has an optimizer whose name is a list", set_json(file, ("optimizer", "name"), ["adamw"]), "is damaged"),
        ("has no parameter groups", set_json(file, ("optimizer", "groups"), []), "is damaged"),
        (
            "has 10**5 parameters in two groups",
            set_json(file, (*group, "names"), ["a"] * 10**5),
            "more than one group",
        ),
        ("has betas of 1", set_json(file, (*group, "betas"), [1, 1]), r"in \[0, 1\)"),
        ("has three betas", set_json(file, (*group, "betas"), [0.1, 0.1, 0.1]), "`betas` must be two"),
        ("has a weight decay of 1e300", set_json(file, (*group, "weight_decay"), 1e300), "at most 1e"),
        ("has a negative eps", set_json(file, (*group, "eps"), -1.0), "must not be negative"),
        ("has a dampening of -1e300", set_json(file, (*group, "dampening"), -1e300), "at most 1e"),
        ("lacks a parameter of the states", set_json(file, ("parameters",), {}), "lacks parameters|too many"),
        ("has parameters of negative sizes", set_json(file, ("parameters", "hidden.bias"), [-8]), "expected"),
        ("has parameters of 100 GB", set_json(file, ("parameters", "hidden.weight"), HUNDRED_GB), "expected"),
        ("was used -1 times before", set_json(file, ("updates_before",), -1), "updates_before must be"),
        ("was used 2**60 times before", set_json(file, ("updates_before",), 2**60), "updates_before must be"),
    ):
        yield Case("Trajectory", f"trajectory.json {done}", edit, message, on_hub=done == "has 10**15 steps")

    def first(value: float) -> Edit:
        return column(
            steps,
            "learning_rates",
            lambda values: pa.array([[value, value], *values.to_pylist()[1:]], pa.large_list(pa.float64())),
        )

    def rows(value: int) -> Edit:
        return column(
            steps,
            "rows",
            lambda values: pa.array([[value] * 8, *values.to_pylist()[1:]], pa.large_list(pa.int64())),
        )

    for done, edit, message in (
        ("has a learning rate of 1e30", first(1e30), "must be between 0 and"),
        ("has a negative learning rate", first(-1.0), "must be between 0 and"),
        ("has a learning rate of NaN", first(float("nan")), "must be between 0 and"),
        (
            "has a step with one learning rate of two",
            column(
                steps, "learning_rates", lambda v: pa.array([[0.1], *v.to_pylist()[1:]], pa.large_list(pa.float64()))
            ),
            "between 1 and 2 learning rates",
        ),
        (
            "has a step without learning rates",
            column(
                steps, "learning_rates", lambda v: pa.array([None, *v.to_pylist()[1:]], pa.large_list(pa.float64()))
            ),
            "lacks values",
        ),
        (
            "lacks a learning rate",
            column(
                steps,
                "learning_rates",
                lambda v: pa.array([[None, 1.0], *v.to_pylist()[1:]], pa.large_list(pa.float64())),
            ),
            "lacks values",
        ),
        (
            "has three learning rates a step, for two groups",
            column(steps, "learning_rates", lambda v: pa.array([[0.1] * 3] * len(v), pa.large_list(pa.float64()))),
            "3 learning rates a step",
        ),
        (
            "has a clipping factor of infinity",
            column(steps, "clip_factor", lambda v: pa.array([float("inf")] * len(v))),
            "must be between 0 and",
        ),
        ("has rows that the training set lacks", rows(48), "names rows 48 to 48"),
        ("has row -1", rows(-1), "names rows -1 to"),
        (
            "has batches of other sizes than their rows",
            column(
                steps, "micro_batch_sizes", lambda v: pa.array([[2**40, -(2**40)]] * len(v), pa.large_list(pa.int64()))
            ),
            "but batches of",
        ),
        (
            "has a column too many",
            table(steps, lambda content: content.append_column("\x1b[2J", content["step"])),
            "too many",
        ),
        (
            "has fewer steps than announced",
            table(steps, lambda content: content.slice(0, 40)),
            "records no steps 40 to 47",
        ),
        ("has no steps", table(steps, lambda content: content.slice(0, 0)), "records no steps 0 to 47"),
    ):
        yield Case("Trajectory", f"{STEPS.rpartition('/')[2]} {done}", edit, message)
    second = "exp_avg_sq.hidden.weight"
    yield Case(
        "Trajectory", "a state lacks the moments of some parameters", tensors(STATE, lambda x: x.pop(second)), None
    )
    yield Case(
        "Trajectory",
        "a state has moments of an unknown kind",
        tensors(STATE, lambda x: x.update({"\x1b.hidden.weight": x.pop(second)})),
        "does not keep",
    )
    yield Case("Trajectory", "the last state is missing", remove(FINAL), "is missing", FileNotFoundError, on_hub=True)
    yield Case(
        "Trajectory",
        "a state is of a precision that there is not",
        header(STATE, lambda told: told["__metadata__"].update(precision="\x1b[2J")),
        r"states in '\\x1b\[2J'",
    )
    yield Case(
        "Trajectory",
        "the last state holds differences from itself",
        header(FINAL, lambda told: told["__metadata__"].update(precision="bfloat16")),
        "differences from nothing",
    )


PRIVACY = {"distance": 1.0, "row_distance": 1.0, "share_nearer": 0.5}


def synsets() -> Iterator[Case]:
    """What a synset must not say, and what must be found when it is used."""
    file, matrices = "synset.json", "synset.safetensors"
    apart = "do not belong together"
    for done, edit, message in (
        ("names 0 runs", set_json(file, ("num_runs",), 0), "names 0 recorded runs"),
        ("names -1 runs", set_json(file, ("num_runs",), -1), "names -1 recorded runs"),
        ("names other parameters than its run ends at", set_json(file, ("parameters_sha256",), "0" * 64), apart),
        (
            "announces a tensor too many",
            set_json(file, ("tensors",), {"inputs": [6], "\x1b": [6]}),
            "announces the tensors",
        ),
        ("announces inputs of one dimension", set_json(file, ("tensors", "inputs"), [6]), apart),
        ("announces inputs of no samples", set_json(file, ("tensors", "inputs"), [6, 0, 2**62]), apart),
        ("announces inputs of negative sizes", set_json(file, ("tensors", "inputs"), [6, -5, -1, 4, 4]), apart),
        ("announces inputs of 7 clusters", set_json(file, ("tensors", "inputs"), [7, 5, 1, 4, 4]), apart),
        ("announces no residuals", set_json(file, ("tensors", "residuals"), []), apart),
        ("was matched at no state", set_json(file, ("matched_states",), []), apart),
        ("was matched at a state of run 7", set_json(file, ("matched_states", 0), [7, 10]), "step 10 of run 7"),
        ("was matched at a state of run -1", set_json(file, ("matched_states", 0), [-1, 10]), "step 10 of run -1"),
        ("was matched at step 11", set_json(file, ("matched_states", 0), [0, 11]), "step 11 of run 0"),
        (
            "was matched at a state of three numbers",
            set_json(file, ("matched_states", 0), [0, 10, 1]),
            "a run and a step",
        ),
        (
            "takes an argument that is none",
            set_json(file, ("input_name",), "x; import os"),
            "must be a forward argument",
        ),
        ("is of soft tokens without ids", set_json(file, ("input_name",), "soft_tokens"), "holds no input_ids"),
        ("has no labels a row", set_json(file, ("metadata", "labels_per_row"), 0), "no mean number"),
        ("has a label smoothing of 2", set_json(file, ("metadata", "label_smoothing_factor"), 2), r"not in \[0, 1\)"),
        ("has the tokens of one sample", set_json(file, ("metadata",), {"tokens": [[1]]}), "tokens of 1 samples"),
        ("has token -1", set_json(file, ("metadata",), {"tokens": [[-1]] * 30}), "not all ids of tokens"),
        ("has token 2**60", set_json(file, ("metadata",), {"tokens": [[2**60]] * 30}), "not all ids of tokens"),
        ("has a privacy without distance", set_json(file, ("metadata",), {"privacy": {"x": 1}}), "lacks distance"),
        (
            "has a privacy with half of its figures",
            set_json(file, ("metadata",), {"privacy": PRIVACY | {"share_nearer": None}}),
            "belong together",
        ),
        (
            "has a privacy of tokens without their number",
            set_json(file, ("metadata",), {"privacy": PRIVACY | {"kept_tokens": 1}}),
            "belong together",
        ),
        (
            "has a fidelity that is no report",
            set_json(file, ("fidelity",), {"format_version": 1}),
            "report is damaged",
        ),
    ):
        yield Case("Synset", f"{file} {done}", edit, message, on_hub=done == "was matched at a state of run 7")
    sharper = set_json(file, ("tensors", "targets"), [6, 5, 7])
    for done, edit, message in (
        ("has negative residuals", tensor(matrices, "residuals", bad_value(-1.0)), "residuals that are"),
        ("has residuals of NaN", tensor(matrices, "residuals", bad_value(float("nan"))), "residuals that are"),
        (
            "has inputs of another shape than the model takes",
            all_of(
                set_json(file, ("tensors", "inputs"), [6, 5, 3]),
                tensor(matrices, "inputs", lambda x: x[..., :3, 0, 0].expand(6, 5, 1)[..., [0, 0, 0]]),
            ),
            None,
        ),
        (
            "has targets of seven labels for a model of three",
            all_of(sharper, tensor(matrices, "targets", lambda x: torch.zeros(6, 5, 7))),
            None,
        ),
        (
            "has target ids that are no labels",
            all_of(
                set_json(file, ("tensors", "target_ids"), [6, 5, 3]),
                tensors(matrices, lambda x: x.update(target_ids=torch.full((6, 5, 3), 10**12))),
            ),
            None,
        ),
        (
            "has negative target ids",
            all_of(
                set_json(file, ("tensors", "target_ids"), [6, 5, 3]),
                tensors(matrices, lambda x: x.update(target_ids=torch.full((6, 5, 3), -1))),
            ),
            "target_ids",
        ),
        ("has weights of 1e38", tensor(matrices, "log_weights", lambda x: x * 0 + 1e38), None),
        ("has inputs of 1e38", tensor(matrices, "inputs", lambda x: x * 0 + 1e38), None),
    ):
        yield Case("Synset", f"{matrices} {done}", edit, message)
    steps, run = f"{RUN}/{STEPS}", f"{RUN}/trajectory.json"
    large = column(steps, "learning_rates", lambda v: pa.array([[1e6, 1e6]] * len(v), pa.large_list(pa.float64())))
    yield Case("Synset", "its run has learning rates of 1e6", large, None)
    betas = [set_json(run, ("optimizer", "groups", k, "betas"), [0.9999999, 0.9999999]) for k in (0, 1)]
    yield Case("Synset", "its run has betas of 0.9999999", all_of(*betas), None)
    yield Case("Synset", "its run has different betas by group", betas[0], None)
    plain = [set_json(run, ("optimizer", "name"), "sgd")]
    yield Case("Synset", "its run is said to be of another optimizer", all_of(*plain), "this optimizer does not keep")
    yield Case(
        "Synset",
        "a state of its run lacks all moments",
        tensors(f"{RUN}/{STATE}", lambda x: [x.pop(key) for key in list(x) if key.startswith("exp_avg")]),
        None,
    )
    negative = tensor(f"{RUN}/{STATE}", "exp_avg_sq.hidden.weight", lambda values: values * 0 - 1)
    yield Case("Synset", "a state of its run has negative second moments", negative, None)
    yield Case("Synset", "its run has other rows than its clusters", set_json(run, ("num_rows",), 47), apart)
    yield Case("Synset", "its run is missing", remove(run), "has no trajectory.json", FileNotFoundError, on_hub=True)
    yield Case(
        "Synset",
        "the folder of its runs is a link out of the folder",
        a_linked_folder("trajectories"),
        "a link that leads out",
    )
    yield Case(
        "Synset",
        "the table of samples and the card are missing",
        all_of(remove("data/train.parquet"), remove("README.md")),
        None,
        on_hub=True,
    )


VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "-1": -1,
    "2**63": 2**63,
    "1e300": 1e300,
    "text": "text",
    "control characters": "\x1b[2J\ud800\u202e\n",
    "[]": [],
    "{}": {},
    "[[null]]": [[None]],
}
"""What every node of every JSON file is replaced by."""


CASES = [
    *any_json(),
    *any_tensors(),
    *any_table(),
    *cluster_maps(),
    *results(),
    *trajectories(),
    *synsets(),
]
