"""Dataset rows as batches of tensors, collated as by a `Trainer`."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    default_data_collator,
)

from hf_rgm.model.functional_model import LABEL_NAMES, SPAN_NAMES, FunctionalModel
from hf_rgm.model.losses import IGNORED_LABEL
from hf_rgm.model.random_state import random_state_kept

logger = logging.getLogger(__name__)

TRIED_ROWS, READ_AT_ONCE = 8, 10_000

DataCollator = Callable[[list[Any]], Mapping[str, Any]] | PreTrainedTokenizerBase
"""Makes a batch of rows; a tokenizer stands for the collator of a `Trainer(processing_class=tokenizer)`."""


def knows_words(tokenizer: Any) -> bool:
    """Whether a tokenizer has more than special tokens."""
    # Transformers makes up a tokenizer with special tokens only for a model that was saved without one.
    return bool({*tokenizer.get_vocab()} - {*tokenizer.all_special_tokens})


def as_rows(given: Any) -> Any:
    """Rows of a dictionary of columns, such as `dataset[:3]`, or of a single row; anything else as it is."""
    if not isinstance(given, Mapping):
        return given
    if isinstance(given, datasets.DatasetDict):
        raise ValueError(f"Got a dataset with the splits {', '.join(map(str, given))}. Choose one of them.")
    told = any(name in given for name in (*LABEL_NAMES, *SPAN_NAMES, "text", "input_ids"))
    ids = given.get("input_ids", [[]])
    are_columns = told and all(map(_is_several, [*given.values(), ids[0] if len(ids) else None]))
    if not are_columns or len({*map(len, given.values())}) > 1:
        return [given]
    return [dict(zip(given, row, strict=True)) for row in zip(*given.values(), strict=True)]


def _is_several(value: Any) -> bool:
    return isinstance(value, list | tuple) or (isinstance(value, Tensor | np.ndarray) and value.ndim > 0)


def padding_collator(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Any]], Mapping[str, Any]]:
    """The collator of a `Trainer` with this tokenizer; it also pads labels of tokens, with -100."""
    of_rows, of_tokens = DataCollatorWithPadding(tokenizer), DataCollatorForSeq2Seq(tokenizer)

    def collate(items: list[Any]) -> Mapping[str, Any]:
        labels = next((items[0][name] for name in LABEL_NAMES if name in items[0]), 0)
        return (of_tokens if np.asarray(labels).dtype.kind == "i" and np.ndim(labels) else of_rows)(items)

    return collate


class RowReader:
    """Rows of a map-style dataset, read by index and collated as the `Trainer` does."""

    def __init__(
        self,
        dataset: Any,
        model: FunctionalModel,
        *,
        data_collator: DataCollator | None = None,
        remove_unused_columns: bool = True,
        columns: Collection[str] = (),
        what: str = "train_dataset",
        predict_labels: bool = False,
        loss: str | None = None,
    ) -> None:
        dataset = as_rows(dataset)
        if not hasattr(dataset, "__len__"):
            raise TypeError(
                f"`{what}` must be a map-style dataset with a length, got {type(dataset).__name__}. "
                "Materialise streaming data first, for example with `datasets.Dataset.from_list(list(stream))`."
            )
        if len(dataset) == 0:
            raise ValueError(f"`{what}` is empty. Pass the rows to work on.")
        keep = {*model.forward_arguments, *LABEL_NAMES, *columns}  # `columns`: what else the collator takes
        if remove_unused_columns and isinstance(dataset, datasets.Dataset):
            columns = [name for name in dataset.column_names if name in keep]
            if not {*columns} - {*LABEL_NAMES}:
                raise ValueError(
                    f"`{what}` has the columns {', '.join(dataset.column_names)}; the model's forward takes none of "
                    f"them as input ({', '.join(model.forward_arguments)}). Tokenise or rename them as for training "
                    "(command line: `--prepare`), or pass `remove_unused_columns=False` with a `data_collator`."
                )
            dataset = dataset.select_columns(columns)
        self.dataset = dataset
        self.what = what
        self._keep = keep if remove_unused_columns else None
        if isinstance(data_collator, PreTrainedTokenizerBase):
            data_collator = padding_collator(data_collator)
        self._collate = data_collator or default_data_collator
        self.model = model
        self._predict_labels = predict_labels
        self._loss = loss  # a key of `LOSSES_OF_NUMBERS`: what a predicted label is

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, rows: Sequence[int] | np.ndarray) -> tuple[dict[str, Tensor], Tensor]:
        """Collates rows to inputs (float32) and labels `(num_rows, *positions)`, on the model's device."""
        return self.tensors(self.collated(rows), rows)

    def collated(self, rows: Sequence[int] | np.ndarray, *, seed: int = 0) -> dict[str, Any]:
        """Rows as the model gets them in training; what is drawn at random is always the same for the same rows."""
        indices = [int(row) for row in rows]
        with random_state_kept(zlib.crc32(np.array([*indices, seed], np.int64).tobytes())):
            if isinstance(self.dataset, datasets.Dataset):
                items = self.dataset.__getitems__(indices)  # all at once, as PyTorch's `DataLoader` reads them
            else:
                items = [self.dataset[index] for index in indices]
            if self._keep is not None and isinstance(items[0], Mapping):
                items = [{name: value for name, value in item.items() if name in self._keep} for item in items]
            return dict(self._collate_items(items))

    def tensors(
        self, collated: Mapping[str, Any], rows: Sequence[int] | np.ndarray
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs and labels of a collated batch, as `batch` gives them."""
        batch = dict(collated)
        labels = all_labels(batch)
        for name in (*LABEL_NAMES, *SPAN_NAMES):
            batch.pop(name, None)
        if labels is None and not self._predict_labels:
            raise ValueError(
                f"Rows of `{self.what}` have no {' / '.join(LABEL_NAMES)} after collating (they have: "
                f"{', '.join(batch) or 'nothing'}). Attribution compares losses, so every row needs its label."
            )
        if labels is not None and len(labels) != len(rows):
            raise NotImplementedError(
                f"The `data_collator` turns {len(rows)} rows of `{self.what}` into {len(labels)}, so that one cannot "
                "be told from another. Train and distil with one that pads rows and does not flatten them into one "
                "sequence (`DataCollatorWithFlattening`, `padding_free=True`)."
            )
        inputs = {}
        for name, value in batch.items():
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"Column `{name}` of `{self.what}` is collated to {type(value).__name__}, not to a tensor. Pass "
                    "the `data_collator` that the Trainer used."
                )
            if value.is_floating_point():
                finite = torch.isfinite(value).reshape(len(value), -1).all(1)
                if not finite.all():
                    bad = [int(rows[i]) for i in torch.nonzero(~finite).flatten().tolist()]
                    raise ValueError(f"`{name}` of `{self.what}` has NaN or infinite values in rows {bad[:10]}.")
                value = value.float()
            inputs[name] = value.to(self.model.device)
        if labels is None:
            labels = self._own_labels(inputs)
        labels = (labels.float() if labels.is_floating_point() else labels).to(self.model.device)
        if self.model.shifts_labels:  # to where they are predicted, one position to the left
            labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED_LABEL)], dim=1)
        return inputs, labels

    def warn_of_draws(self) -> None:
        """Warns if rows, or their batches, are drawn at random."""
        rows = range(min(TRIED_ROWS, len(self)))
        batch, again, otherwise = (self.collated(rows, seed=seed) for seed in (0, 0, 1))
        if not _same(batch, again):
            logger.warning(
                "Rows of `%s` differ whenever they are read: they, or the `data_collator`, draw at random from a "
                "generator of their own. Scores will differ from call to call. Give it no seed or generator, so that "
                "it draws from the global ones.",
                self.what,
            )
        elif not _same(batch, otherwise):
            logger.warning(
                "Rows of `%s` are drawn at random when they are read, by themselves or by the `data_collator` (masks, "
                "augmentation). One draw is taken for all computations, which training did not see.",
                self.what,
            )

    def labels_per_row(self, batch_size: int = 256, *, as_trained: bool = False) -> float:
        """Mean number of labels of a row that are not -100; `as_trained`: counted by the Trainer otherwise."""
        count, known = 0, self.classes()
        for start in range(0, len(self), batch_size):
            rows = range(start, min(start + batch_size, len(self)))
            collated = self.collated(rows)
            labels = self.counted_labels(collated) if as_trained else self.tensors(collated, rows)[1]
            if known is not None and np.array_equal(labels.cpu().numpy(), known[:batch_size]):
                count = int((known != IGNORED_LABEL).sum())
                break
            count, known = count + int((labels != IGNORED_LABEL).sum()), None
        if count == 0:
            raise ValueError(
                f"No row of `{self.what}` has a label other than {IGNORED_LABEL}: nothing is learned from it."
            )
        return count / len(self)

    def counted_labels(self, collated: Mapping[str, Any]) -> Tensor:
        """Labels that a Trainer may count: those given, or without a prompt's first one, whatever is predicted."""
        labels = all_labels(collated)
        if labels is None:
            return torch.empty(0)
        return labels[:, 1:] if self.model.prompt_length and labels.dim() == 2 else labels

    def classes(self) -> np.ndarray | None:
        """Labels of all rows, `(num_rows,)`, int64, where a column of the dataset holds them."""
        dataset = self.dataset
        if not isinstance(dataset, datasets.Dataset) or dataset.format["type"] == "custom":
            return None
        name = next((name for name in LABEL_NAMES if name in dataset.column_names), None)
        if name is None:
            return None
        kind = dataset.features[name]
        if not isinstance(kind, datasets.Value | datasets.ClassLabel) or not kind.dtype.startswith(("int", "uint")):
            return None
        return np.asarray(dataset.select_columns([name]).with_format("numpy")[:][name], np.int64)

    def longest_input(self) -> int | None:
        """Tokens of the longest row, where a column of the dataset holds them."""
        dataset, name = self.dataset, "input_ids"
        known = isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom"
        if not known or name not in dataset.column_names:
            return None
        tables: Iterable[Any] = dataset.select_columns([name]).with_format("arrow").iter(READ_AT_ONCE)
        lengths = (pc.max(pc.list_value_length(table[name])).as_py() for table in tables)  # type: ignore
        return max(filter(None, lengths), default=None)

    def _collate_items(self, items: list[Any]) -> Mapping[str, Any]:
        strange = next((item for item in items if not isinstance(item, Mapping)), None)
        if strange is not None:
            raise ValueError(
                f"Rows of `{self.what}` must be dictionaries as the Trainer gets them, such as tokenised texts with "
                f"their labels, got a {type(strange).__name__}. Tokenise them as for training, or give the pipeline "
                "the `tokenizer`."
            )
        try:
            return self._collate(items)
        except (ValueError, TypeError) as error:
            if self._collate is not default_data_collator:
                raise
            raise ValueError(
                f"Rows of `{self.what}` do not collate by `default_data_collator` ({error}). Pass the `data_collator` "
                "that the Trainer used, or its tokenizer in place of one (`data_collator=tokenizer`)."
            ) from error

    def _own_labels(self, inputs: dict[str, Tensor]) -> Tensor:
        """The text itself for causal language models, else what the model predicts."""
        mask = inputs.get("attention_mask")
        if (self.model.shifts_labels or self.model.prompt_length) and "input_ids" in inputs:
            labels = inputs["input_ids"]
        else:
            with torch.no_grad():
                logits = self.model.logits(self.model.parameters(), inputs)
            if self._loss is not None:
                return (logits > 0).float() if self._loss == "binary_cross_entropy" else logits
            labels = logits.argmax(-1)
        return labels if mask is None or labels.shape != mask.shape else labels.masked_fill(mask == 0, IGNORED_LABEL)


def _same(batch: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two batches hold equal tensors."""
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    return all(
        isinstance(other.get(name), Tensor) and torch.equal(value.nan_to_num(), other[name].nan_to_num())
        for name, value in tensors.items()
    )


def all_labels(collated: Mapping[str, Any]) -> Tensor | None:
    """Labels of a collated batch as they are given, also those that no token predicts; `(num_rows, 2)` of spans."""
    if all(name in collated for name in SPAN_NAMES):
        return torch.stack([collated[name] for name in SPAN_NAMES], dim=1)
    return next((collated[name] for name in LABEL_NAMES if name in collated), None)


class CachedBatches:
    """Batches over fixed groups of rows, collated once and kept while they fit in `max_bytes`."""

    def __init__(
        self,
        reader: RowReader,
        groups: Sequence[Sequence[int] | np.ndarray],
        *,
        batch_size: int,
        max_bytes: int = 2**30,
    ) -> None:
        self._reader = reader
        self._kept: dict[tuple[int, int], tuple[dict[str, Tensor], Tensor]] = {}
        self._free = max_bytes
        self._groups = groups
        self._batch_size = batch_size

    def __len__(self) -> int:
        return len(self._groups)

    def rows(self, index: int) -> np.ndarray:
        """Row numbers of one group, in the order of its batches."""
        return np.asarray(self._groups[index])

    def num_rows(self, index: int) -> int:
        return len(self._groups[index])

    def sample(
        self, index: int, at_most: int, generator: torch.Generator
    ) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Batches of at most `at_most` rows of a group, drawn at random and not kept."""
        rows = np.asarray(self._groups[index])
        if len(rows) <= at_most:
            yield from self.group(index)
            return
        drawn = rows[torch.randperm(len(rows), generator=generator)[:at_most].numpy()]
        for start in range(0, at_most, self._batch_size):
            yield self._reader.batch(drawn[start : start + self._batch_size])

    def group(self, index: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Batches `(inputs, labels)` of one group."""
        rows = self._groups[index]
        for start in range(0, len(rows), self._batch_size):
            key = (index, start)
            batch = self._kept.get(key)
            if batch is None:
                batch = self._reader.batch(rows[start : start + self._batch_size])
                size = sum(t.nbytes for t in (*batch[0].values(), batch[1]))
                if size <= self._free:
                    self._kept[key] = batch
                    self._free -= size
            yield batch
