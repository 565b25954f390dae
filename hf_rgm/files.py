"""Writing artefact folders so that nothing half-written is ever taken for whole."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def format_size(num_bytes: float) -> str:
    """A number of bytes in words: `1.8 MB`."""
    if num_bytes < 1000:
        return f"{num_bytes:.0f} B"
    for unit in ("kB", "MB", "GB"):
        num_bytes /= 1000
        if num_bytes < 1000:
            return f"{num_bytes:.1f} {unit}"
    return f"{num_bytes / 1000:.1f} TB"


@contextlib.contextmanager
def staged_folder(target: str | Path, marker: str) -> Iterator[Path]:
    """
    Yields a temporary folder beside `target` and puts it in the target's place when the block ends without error.

    Args:
        target (`str` or `Path`): The folder to write.
        marker (`str`): Name of the file that identifies such a folder. An existing target is only replaced if it is
            empty or holds this file.

    Raises:
        FileExistsError: If the target holds something else.
    """
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file. Choose a folder that does not exist yet.")
    if target.is_dir() and any(target.iterdir()) and not (target / marker).is_file():
        raise FileExistsError(
            f"{target} is not empty and has no {marker}, so it is left alone. Choose another folder."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield staging
        if target.is_dir():
            retired = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
            os.replace(target, retired / target.name)
            os.replace(staging, target)
            shutil.rmtree(retired)
        else:
            os.replace(staging, target)
        target.chmod(0o755)
    finally:
        if staging.exists():
            shutil.rmtree(staging)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """
    Writes `content` through a temporary file that is renamed into place.

    Raises:
        TypeError, ValueError: If it does not fit into JSON, NaN and infinity included.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
