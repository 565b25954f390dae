"""Finished blocks of clusters on disk, one file each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_rgm.files.reading import ArtefactFolder
from hf_rgm.files.writing import make_folder, remove_unfinished, replacing
from hf_rgm.model.functional_model import parameters_sha256

_AGAIN = "the block will be distilled again."


class BlockStore:
    """Finished blocks in a folder, where a killed distillation continues; refuses blocks of another one."""

    def __init__(self, folder: str | Path, identity: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self._identity = json.dumps(identity, sort_keys=True)
        make_folder(self.folder)
        for path in self.folder.glob("block-*.safetensors"):
            self._digest(path)
        remove_unfinished(self.folder)

    def _path(self, block: range) -> Path:
        return self.folder / f"block-{block.start:06d}-{block.stop:06d}.safetensors"

    def _digest(self, path: Path) -> str:
        """What a block says that its tensors' SHA-256 is; refuses one of another distillation."""
        with ArtefactFolder(self.folder).open_tensors(path.name, way_out=f"Delete it; {_AGAIN}") as file:
            identity, _, digest = file.metadata.get("identity", "").partition("\n")
        if identity != self._identity:
            raise FileExistsError(
                f"{path} belongs to another distillation (other settings, model, data or clusters). Choose another "
                "`output_dir`, or delete this one."
            )
        return digest

    def read(self, block: range) -> dict[str, Tensor] | None:
        """The tensors of a finished block, or `None`."""
        path = self._path(block)
        if not path.is_file():
            return None
        digest, tensors = self._digest(path), load_file(path)
        if digest != parameters_sha256(tensors):
            raise ValueError(f"{path} is damaged: its content changed. Delete it; {_AGAIN}")
        return tensors

    def write(self, block: range, tensors: dict[str, Tensor]) -> None:
        """Writes a finished block whole or not at all."""
        with replacing(self._path(block)) as temporary:
            whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
            # Under one key: safetensors writes several in any order, and blocks are the same to the byte.
            save_file(whole, temporary, metadata={"identity": f"{self._identity}\n{parameters_sha256(whole)}"})
