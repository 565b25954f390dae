"""What a row of a dataset looks like: a picture or a text, and its label."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_rgm.clusters.grouping import as_numpy
from hf_rgm.model.functional_model import LABEL_NAMES
from hf_rgm.model.losses import IGNORED_LABEL

MAX_CHARACTERS = 600
MAX_PIXELS = 256
TOKENS = "input_ids"


@dataclass(frozen=True)
class Item:
    """A row as it is shown: a picture (PNG) or a text, and its label if it has a single one."""

    picture: bytes | None
    text: str
    label: str | None = None


def item_of(
    row: Any, *, tokenizer: PreTrainedTokenizerBase | None = None, label_names: Mapping[int, str] | None = None
) -> Item:
    """The first picture among a row's columns, else its texts, else its decoded tokens, else its plain values."""
    if not isinstance(row, Mapping):
        return Item(None, shortened(str(row)))
    label = _label(row, label_names or {})
    for value in row.values():
        if (picture := _picture(value)) is not None:
            return Item(picture, "", label)
    values = {name: value for name, value in row.items() if name not in LABEL_NAMES}
    texts = {name: value for name, value in values.items() if isinstance(value, str)}
    if not texts and TOKENS in row and tokenizer is not None:
        texts = {TOKENS: str(tokenizer.decode(as_numpy(row[TOKENS]).tolist(), skip_special_tokens=True))}
    if len(texts) == 1:
        return Item(None, shortened(next(iter(texts.values()))), label)
    lines = [f"{name}: {shortened(str(value))}" for name, value in (texts or values).items()]
    return Item(None, shortened("\n".join(lines)), label)


def png_of(pixels: Any) -> bytes:
    """A PNG of `(1 or 3, height, width)`, `(height, width, 3)` or `(height, width)`, stretched to full brightness."""
    array = as_numpy(pixels).astype(np.float64)
    if not _is_picture(array) or not np.isfinite(array).all():
        raise ValueError(f"A picture must have 1 or 3 channels and finite values, got shape {array.shape}.")
    if array.ndim == 3 and array.shape[0] in (1, 3):
        array = array.transpose(1, 2, 0)
    low = array.min()
    scaled = ((array - low) / ((array.max() - low) or 1.0) * 255).round().astype(np.uint8)
    return _encoded(Image.fromarray(scaled[..., 0] if scaled.shape[-1] == 1 and scaled.ndim == 3 else scaled))


def shortened(text: str, length: int = MAX_CHARACTERS) -> str:
    """Text cut to this length, with an ellipsis."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _picture(value: Any) -> bytes | None:
    if isinstance(value, Image.Image):
        if value.mode.startswith(("I", "F")):
            return png_of(np.asarray(value))
        return _encoded(value.convert("L" if value.mode in ("1", "L") else "RGB"))
    if isinstance(value, Tensor | np.ndarray) or (isinstance(value, list) and _depth(value) in (2, 3)):
        try:
            array = np.asarray(value, dtype=np.float64)
        except (TypeError, ValueError):
            return None
        if _is_picture(array) and np.isfinite(array).all():
            return png_of(array)
    return None


def _is_picture(array: np.ndarray) -> bool:
    if min(array.shape, default=0) < 1:
        return False
    return (array.ndim == 3 and (array.shape[0] in (1, 3) or array.shape[2] == 3)) or array.ndim == 2


def _depth(value: Any) -> int:
    depth = 0
    while isinstance(value, list) and value:
        value, depth = value[0], depth + 1
    return depth if isinstance(value, int | float) else 0


def _encoded(image: Image.Image) -> bytes:
    image.thumbnail((MAX_PIXELS, MAX_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _label(row: Mapping[str, Any], names: Mapping[int, str]) -> str | None:
    value = next((row[name] for name in LABEL_NAMES if name in row), None)
    if isinstance(value, str):
        return shortened(value, 60)
    if value is None or isinstance(value, Sequence) or np.size(as_numpy(value)) != 1:
        return None
    number = as_numpy(value).item()
    return None if number == IGNORED_LABEL else shortened(str(names.get(number, number)), 60)
