"""Finished work of a distillation on disk: one file per block of clusters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_rgm.files.writing import remove_unfinished, replacing


class BlockStore:
    """
    Keeps finished blocks so that a killed distillation continues where it was.

    Args:
        folder (`str` or `Path`): Where the files go.
        identity (`dict`): What the work depends on; blocks written under another identity are refused.

    Raises:
        FileExistsError: If the folder holds blocks of another distillation.
        OSError: If the folder cannot be made.
        ValueError: If a block is damaged.
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self._identity = json.dumps(identity, sort_keys=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob("block-*.safetensors"):
            self._check(path)
        remove_unfinished(self.folder)

    def _path(self, block: range) -> Path:
        return self.folder / f"block-{block.start:06d}-{block.stop:06d}.safetensors"

    def _check(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                identity = (file.metadata() or {}).get("identity")
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}). Delete it; the block will be distilled again.") from error
        if identity != self._identity:
            raise FileExistsError(
                f"{path} belongs to another distillation (other settings, model, data or clusters). Choose another "
                "`output_dir`, or delete this one."
            )

    def read(self, block: range) -> dict[str, Tensor] | None:
        """The tensors of a finished block, or `None`."""
        path = self._path(block)
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)

    def write(self, block: range, tensors: dict[str, Tensor]) -> None:
        """
        Writes a finished block whole or not at all.

        Raises:
            OSError: If the disk is full or the folder cannot be written; blocks that are there stay.
        """
        with replacing(self._path(block)) as temporary:
            save_file(
                {k: v.contiguous() for k, v in tensors.items()}, temporary, metadata={"identity": self._identity}
            )
