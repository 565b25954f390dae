"""What a row of a dataset looks like: a picture or a text, and its label."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_rgm.clusters.grouping import as_numpy
from hf_rgm.model.functional_model import LABEL_NAMES
from hf_rgm.model.losses import IGNORED_LABEL
from hf_rgm.pages.html import Card

MAX_CHARACTERS = 600
MAX_PIXELS = 256
TOKENS = "input_ids"
PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow starts other programs for some formats
NOT_SHOWN = "(not shown: no picture whose bytes are in the dataset; `save_to_disk` embeds them)"


def card_of(
    row: Any, *, tokenizer: PreTrainedTokenizerBase | None = None, label_names: Mapping[int, str] | None = None
) -> Card:
    """Card with the first picture among a row's columns, else its texts, decoded tokens, or plain values."""
    if not isinstance(row, Mapping):
        return Card(text=shortened(str(row)))
    label = _label(row, label_names or {})
    row = {name: value if (found := _embedded(value)) is None else found for name, value in row.items()}
    for value in row.values():
        if (picture := _picture(value)) is not None:
            return Card(picture=picture, label=label)
    values = {name: value for name, value in row.items() if name not in LABEL_NAMES}
    texts = {name: value for name, value in values.items() if isinstance(value, str)}
    if not texts and TOKENS in row and tokenizer is not None:
        texts = {TOKENS: str(tokenizer.decode(as_numpy(row[TOKENS]).tolist(), skip_special_tokens=True))}
    if len(texts) == 1:
        return Card(text=shortened(next(iter(texts.values()))), label=label)
    lines = [f"{name}: {shortened(str(value))}" for name, value in (texts or values).items()]
    return Card(text=shortened("\n".join(lines)), label=label)


def shown_row(dataset: Any, position: int) -> Any:
    """A row, of a `datasets.Dataset` as it is stored: its pictures are bytes, and nothing that it names is opened."""
    if not isinstance(dataset, datasets.Dataset):
        return dataset[position]
    stored: Any = dataset.with_format("arrow")[position]
    return stored.to_pylist()[0]


def png_of(pixels: Any) -> bytes | None:
    """
    PNG of `(1 or 3, height, width)`, `(height, width, 1 or 3)` or `(height, width)`, stretched to full brightness.

    `None` for other shapes, for values that are not finite, and for what is not numeric.
    """
    try:
        array = as_numpy(pixels)
    except ValueError:  # lists of different lengths
        return None
    if not array.size or array.ndim not in (2, 3) or array.dtype.kind not in "biuf" or not np.isfinite(array).all():
        return None
    array = array.astype(np.float64)
    if array.ndim == 3 and array.shape[0] in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[-1] not in (1, 3):
        return None
    low = array.min()
    scaled = ((array - low) / ((array.max() - low) or 1.0) * 255).round().astype(np.uint8)
    return _encoded(Image.fromarray(scaled[..., 0] if scaled.shape[2:] == (1,) else scaled))


def shortened(text: str, length: int = MAX_CHARACTERS) -> str:
    """Text cut to this length, with an ellipsis."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _embedded(value: Any) -> Any:
    """What is shown of a picture or sound as `datasets` stores it, by its bytes alone; `None` for anything else."""
    if not isinstance(value, Mapping) or set(value) != {"bytes", "path"}:
        return None
    with contextlib.suppress(OSError, SyntaxError, ValueError, Image.DecompressionBombError, TypeError):
        picture = Image.open(io.BytesIO(value["bytes"]), formats=PICTURES)
        picture.load()
        return picture
    return NOT_SHOWN


def _picture(value: Any) -> bytes | None:
    if isinstance(value, Image.Image) and not value.mode.startswith(("I", "F")):
        return _encoded(value.convert("L" if value.mode in ("1", "L") else "RGB"))
    return png_of(value) if isinstance(value, Image.Image | Tensor | np.ndarray | list) else None


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
