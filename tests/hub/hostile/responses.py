"""What the responses of a synset must not say, and damage to their file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from hf_rgm.synset.responses import RESPONSES_FILE
from tests.hub.hostile.damage import HUNDRED_GB, Case
from tests.hub.hostile.edits import (
    Edit,
    a_link,
    a_pickle,
    all_of,
    bad_value,
    header,
    one_huge_tensor,
    remove,
    set_json,
    tensor,
    tensors,
    truncate,
)
from tests.responses import add_responses


def _in_bfloat16(folder: Path) -> None:
    add_responses(folder, "bfloat16")


def responses() -> Iterator[Case]:
    """Damage to responses, which are first added to the synset."""
    file, values, scales = RESPONSES_FILE, "values.hidden.weight", "scales.hidden.weight"
    damaged, told = f"{file} is damaged", "synset.json"

    def says(key: str, value: object) -> Edit:
        return set_json(told, ("responses", key), value)

    for done, edit, message in (
        (f"{file} is cut off", truncate(file, 0.9), damaged),
        (f"{file} is a pickle", a_pickle(file), damaged),
        (f"{file} is a link out of the folder", a_link(file), "a link that leads out"),
        (
            f"{file} announces data beyond its end",
            header(file, lambda read: read[values].update(data_offsets=[0, 2**62])),
            damaged,
        ),
        (f"{file} has seven clusters", tensor(file, values, lambda x: x[[0, 0, 1, 2, 3, 4, 5]]), "expected"),
        (f"{file} has values of float32", tensor(file, values, torch.Tensor.float), "dtype F32; expected"),
        (f"{file} lacks a scale", tensors(file, lambda x: x.pop(scales)), "has no tensor"),
        (f"{file} has a tensor too many", tensors(file, lambda x: x.update({"\x1b[2J": x[scales] + 1})), "too many"),
        (f"{file} has a negative scale", tensor(file, scales, bad_value(-1.0)), "impossible scales"),
        (f"{file} has a scale of NaN", tensor(file, scales, bad_value(float("nan"))), "impossible scales"),
        (f"{file} has a scale of 3e38", tensor(file, scales, bad_value(3e38)), "impossible scales"),
        (f"{file} has a scale of zero for values", tensor(file, scales, bad_value(0.0)), "impossible scales"),
        (f"{file} has other values than announced", tensor(file, values, lambda x: x // 2), "the file was changed"),
        (
            f"{file} is of another model",
            header(file, lambda read: read["__metadata__"].update(parameters_sha256="\x1b" * 64)),
            "of another model",
        ),
        (f"{told} announces responses of 10**15 bytes", says("num_bytes", 10**15), "do not belong together"),
        (f"{told} announces responses of another identity", says("sha256", "\x1b[2J"), "the file was changed"),
        (f"{told} announces responses in another precision", says("precision", "\x1b[2J"), "must be one of"),
        (f"{told} announces responses from step -1", says("rewind_step", -1), "no training step"),
        (f"{told} announces responses from step 2**62", says("rewind_step", 2**62), "has rewind_step 10"),
        (f"{told} announces responses that lack a size", says("num_bytes", None), "damaged"),
    ):
        on_hub = done in (f"{file} is a pickle", f"{file} has other values than announced")
        yield Case("Synset", done, all_of(add_responses, edit), message, on_hub=on_hub)
    yield Case(
        "Synset",
        f"{file} has NaN",
        all_of(_in_bfloat16, tensor(file, values, bad_value(float("nan")))),
        "NaN or infinite",
    )
    yield Case(
        "Synset",
        f"{file} announces 100 GB, in a sparse file",
        all_of(add_responses, one_huge_tensor(file, values, HUNDRED_GB)),
        "needs 100.0 GB, but only",
        MemoryError,
    )
    yield Case(
        "Synset",
        f"{file} is announced and missing",
        all_of(add_responses, remove(file)),
        f"has no {file}",
        FileNotFoundError,
        on_hub=True,
    )
    yield Case(
        "Synset",
        f"{file} is there and not announced",
        all_of(add_responses, set_json(told, ("responses",), None)),
        None,
    )
    yield Case("Synset", f"{file} is added, whole", add_responses, None)
