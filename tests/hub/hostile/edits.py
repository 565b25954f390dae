"""Ways to tamper with the files of an artefact."""

from __future__ import annotations

import copy
import json
import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.torch import save_file

Edit = Callable[[Path], object]
Route = tuple[str | int, ...]
"""Keys and positions that lead to a node of a JSON tree."""

MARKER = "executed-by-a-pickle"
"""What a payload that is executed would create, in the working folder."""


class Payload:
    """Unpickled, it creates a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (MARKER, "w"))


def set_json(name: str, route: Route, value: Any) -> Edit:
    """Puts a value in the place of a node of a JSON file."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(replaced(content, route, value)))

    return edit


def replaced(content: Any, route: Route, value: Any) -> Any:
    """A JSON tree with a value in the place of a node."""
    if not route:
        return value
    content = copy.copy(content)
    content[route[0]] = replaced(content[route[0]], route[1:], value) if route[1:] else value
    return content


def drop_key(name: str, key: str) -> Edit:
    """Takes a key out of a JSON object."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        del content[key]
        (folder / name).write_text(json.dumps(content))

    return edit


def routes(content: Any, *, depth: int) -> Iterator[Route]:
    """Every node down to a depth; of lists, the first element stands for all."""
    members = content.items() if isinstance(content, dict) else list(enumerate(content))[:1]
    for key, value in members:
        yield (key,)
        if depth > 1 and isinstance(value, (dict, list)):
            yield from ((key, *rest) for rest in routes(value, depth=depth - 1))


def text(name: str, content: str | bytes) -> Edit:
    """Writes a file anew."""
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def in_text(name: str, old: str, new: str) -> Edit:
    """Replaces text in a file, once."""

    def edit(folder: Path) -> None:
        content = (folder / name).read_text()
        assert old in content
        (folder / name).write_text(content.replace(old, new, 1))

    return edit


def remove(name: str) -> Edit:
    """Deletes a file."""
    return lambda folder: (folder / name).unlink()


def truncate(name: str, share: float) -> Edit:
    """Keeps the first part of a file."""

    def edit(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(share * len(content))])

    return edit


def a_pickle(name: str) -> Edit:
    """Puts a pickle that would execute something in the place of a file."""
    return text(name, pickle.dumps(Payload()))


def a_torch_pickle(name: str) -> Edit:
    """The same in the format of `torch.save`."""
    return lambda folder: torch.save({"scores": Payload()}, folder / name)


def a_link(name: str) -> Edit:
    """Moves a file beside the artefact and leaves a link."""

    def edit(folder: Path) -> None:
        outside = folder.parent / "outside"
        outside.mkdir(exist_ok=True)
        target = outside / Path(name).name
        (folder / name).rename(target)
        (folder / name).symlink_to(target)

    return edit


def a_linked_folder(name: str) -> Edit:
    """The same with a whole folder."""

    def edit(folder: Path) -> None:
        outside = folder.parent / "outside"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside, target_is_directory=True)

    return edit


def a_folder(name: str) -> Edit:
    """Puts a folder in the place of a file."""

    def edit(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return edit


def tensors(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    """Changes the tensors of a safetensors file in place."""

    def edit(folder: Path) -> None:
        with safe_open(folder / name, framework="pt") as file:
            content = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
            metadata = {name: text for name, text in (file.metadata() or {}).items() if name != "sha256"} or None
        change(content)
        save_file({key: tensor.contiguous() for key, tensor in content.items()}, folder / name, metadata=metadata)
        _without_digests(folder / name)

    return edit


def _without_digests(path: Path) -> None:
    """Takes the digests of states out of their trajectory: whoever changes a state would change these too."""
    trajectory = path.parent.parent / "trajectory.json"
    if path.parent.name == "states":
        content = json.loads(trajectory.read_text())
        trajectory.write_text(json.dumps({key: value for key, value in content.items() if key != "states_sha256"}))


def tensor(name: str, key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    """Changes one tensor of a safetensors file."""
    return tensors(name, lambda content: content.update({key: change(content[key])}))


def bad_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Puts a value in the place of the first element."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.flatten()[0] = value
        return tensor

    return change


def header(name: str, change: Callable[[dict[str, Any]], object], *, extend_to: int | None = None) -> Edit:
    """Changes the header of a safetensors file; the file may be extended, sparsely, to what the header announces."""

    def edit(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        announced = json.loads(content[8 : 8 + length])
        announced.get("__metadata__", {}).pop("sha256", None)  # whoever changes a table would change it too
        change(announced)
        encoded = json.dumps(announced).encode()
        (folder / name).write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])
        if extend_to is not None:
            with open(folder / name, "rb+") as file:
                file.truncate(8 + len(encoded) + extend_to)
        _without_digests(folder / name)

    return edit


def first_byte(name: str, key: str, value: int) -> Edit:
    """Changes the first byte of a tensor."""

    def edit(folder: Path) -> None:
        header(name, lambda told: None)(folder)
        content = bytearray((folder / name).read_bytes())
        (length,) = struct.unpack("<Q", content[:8])
        content[8 + length + json.loads(content[8 : 8 + length])[key]["data_offsets"][0]] = value
        (folder / name).write_bytes(content)

    return edit


def one_huge_tensor(name: str, key: str, shape: list[int], dtype: str = "F32") -> Edit:
    """A sparse file whose header announces one tensor, all zeros, and nothing else."""
    num_bytes = int(dtype[1:]) // 8 * torch.Size(shape).numel()

    def change(announced: dict[str, Any]) -> None:
        announced.clear()
        announced[key] = {"dtype": dtype, "shape": shape, "data_offsets": [0, num_bytes]}

    return header(name, change, extend_to=num_bytes)


def append(path: Path, content: bytes) -> None:
    """Adds bytes to the end of a file."""
    path.write_bytes(path.read_bytes() + content)


def a_parquet_file(name: str) -> Edit:
    """Puts a table of parquet in the place of a file."""
    return lambda folder: pq.write_table(pa.table({"row": [0, 1], "cluster_id": [0, 0]}), folder / name)


def all_of(*edits: Edit) -> Edit:
    """Several, one after the other."""

    def edit(folder: Path) -> None:
        for each in edits:
            each(folder)

    return edit
