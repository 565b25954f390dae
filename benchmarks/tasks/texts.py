"""What the text tasks share: the sentences, and datasets of token ids of one length."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

SENTENCES = Path(__file__).resolve().parents[1] / "data" / "sentiment_sentences.jsonl"
SPLIT_SEED = 0


@dataclass(frozen=True)
class Sentence:
    """
    A sentence of a review.

    Args:
        text (`str`): The sentence.
        label (`int`): 0 if negative, 1 if positive.
        source (`str`): `amazon`, `imdb` or `yelp`.
    """

    text: str
    label: int
    source: str


def load_sentences() -> list[Sentence]:
    """All 3,000 sentences, shuffled; what they are says the README beside them."""
    with SENTENCES.open(encoding="utf-8") as file:  # `splitlines` would also split at a sentence's own U+0085
        lines = list(file)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(lines))
    return [Sentence(**json.loads(lines[line])) for line in order]


def sentence_rows(sentences: Sequence[Sentence], labels: NDArray, tokenizer: Any, max_length: int) -> Dataset:
    """Rows of sentences, cut and padded to `max_length` tokens; labels `(num_sentences,)`."""
    texts = [sentence.text for sentence in sentences]
    options = {"padding": "max_length", "truncation": True, "max_length": max_length, "return_tensors": "np"}
    encoded = tokenizer(texts, **options)
    return token_dataset(encoded["input_ids"], encoded["attention_mask"], labels)


def codes(values: list[str]) -> tuple[NDArray[np.int64], list[str]]:
    """Each value's number, `(num_values,)`, and the values that are numbered 0, 1, ..., in sorted order."""
    names, numbers = np.unique(values, return_inverse=True)
    return numbers.astype(np.int64), names.tolist()


def token_dataset(input_ids: NDArray[np.integer], attention_mask: NDArray[np.integer], labels: NDArray) -> Dataset:
    """
    Rows for a `Trainer` that collates by `default_data_collator`.

    Args:
        input_ids, attention_mask (`np.ndarray`): `(num_rows, length)`, padded.
        labels (`np.ndarray`): `(num_rows,)`, or `(num_rows, length)` for labels of tokens.
    """
    columns = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    return Dataset.from_dict({name: np.asarray(values).tolist() for name, values in columns.items()}).with_format(
        "torch"
    )
