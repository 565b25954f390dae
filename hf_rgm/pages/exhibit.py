"""What there is to look at: attributions, and whatever of their synset, model, rows and queries is at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_rgm.model.functional_model import LABEL_NAMES
from hf_rgm.model.row_reader import DataCollator
from hf_rgm.pages.html import Card, signed
from hf_rgm.pages.shown_rows import Item, item_of, png_of, shortened
from hf_rgm.synset.synset import Synset

if TYPE_CHECKING:
    from hf_rgm.attribution.attributor import Attributor
    from hf_rgm.results.result import AttributionResult

SHOWN_EXAMPLES = 4


@dataclass
class Exhibit:
    """
    Attributions with what makes them visible. All but the result can be left out; less is shown then.

    Args:
        result ([`AttributionResult`]): What is shown.
        synset ([`Synset`], *optional*): Its synthetic samples are shown.
        rows (*optional*): The training dataset, for pictures or texts of training rows.
        queries (*optional*): The queries in the order of the result, for their pictures or texts.
        attributor ([`Attributor`], *optional*): With the queries, predicts what the model would be without clusters.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Reads tokens. Defaults to the result's.
        data_collator (`Callable`, *optional*): Collates queries for the attributor.

    Raises:
        ValueError: If synset, rows or queries are not those of the result.

    Example:

    ```python
    >>> from hf_rgm import Attributor
    >>> from hf_rgm.pages.exhibit import Exhibit
    >>> from hf_rgm.testing import tiny_recorded_run, tiny_synset
    >>> run = tiny_recorded_run()
    >>> attributor = Attributor(run.model, tiny_synset(), disable_tqdm=True)
    >>> result = attributor.attribute(run.queries, rows=run.train_dataset)
    >>> exhibit = Exhibit(result, rows=run.train_dataset, queries=run.queries, attributor=attributor)
    >>> exhibit.query(4).label, exhibit.can_replay
    ('1', True)
    >>> {card.title for card in exhibit.cluster_samples(0)}
    {'synthetic'}

    ```
    """

    result: AttributionResult
    synset: Synset | None = None
    rows: Any = None
    queries: Any = None
    attributor: Attributor | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    data_collator: DataCollator | None = None
    label_names: Mapping[int, str] = field(init=False)

    def __post_init__(self) -> None:
        result = self.result
        self.tokenizer = self.tokenizer or result.tokenizer
        if self.synset is None and self.attributor is not None:
            self.synset = self.attributor.synset
        if self.synset is not None:
            self._check_synset(self.synset)
        num_rows = int(result.cluster_sizes.sum())
        if self.rows is not None and len(self.rows) != num_rows:
            raise ValueError(
                f"`rows` has {len(self.rows)} rows, the result was computed for {num_rows}. Pass the training dataset."
            )
        if self.queries is not None and not self.values_are_of_sets and len(self.queries) != result.num_queries:
            raise ValueError(
                f"`queries` has {len(self.queries)} rows, the result has {result.num_queries} queries. Pass those "
                "that were attributed, in their order."
            )
        self.label_names = self._known_labels()

    def _check_synset(self, synset: Synset) -> None:
        told = self.result.metadata.get("parameters_sha256")
        if list(synset.clusters.names) != list(self.result.cluster_names) or told not in (
            None,
            synset.parameters_sha256,
        ):
            raise ValueError(
                f"The synset (parameters {synset.parameters_sha256[:12]}, {synset.num_clusters} clusters) is not that "
                f"of the result (parameters {str(told)[:12]}, {self.result.num_clusters} clusters). Pass the one that "
                "the result was computed with."
            )

    def _known_labels(self) -> dict[int, str]:
        for dataset in (self.rows, self.queries):
            if isinstance(dataset, datasets.Dataset):
                for name in LABEL_NAMES:
                    feature = dataset.features.get(name)
                    if isinstance(feature, datasets.ClassLabel):
                        return dict(enumerate(feature.names))
        model: Any = None if self.attributor is None else self.attributor.model.module
        names = getattr(getattr(model, "config", None), "id2label", None) or {}
        # What transformers makes up for want of names says less than the number.
        return {} if all(name == f"LABEL_{label}" for label, name in names.items()) else dict(names)

    @property
    def values_are_of_sets(self) -> bool:
        """Whether the objective is one value for all queries together, as the mean loss is."""
        return self.result.num_queries == 1 and self.queries is not None and len(self.queries) != 1

    @property
    def can_replay(self) -> bool:
        """Whether models without clusters can be asked."""
        return self.attributor is not None and self.queries is not None

    def query(self, position: int) -> Item | None:
        """What the query at a position looks like, if that is known."""
        return None if self.queries is None or self.values_are_of_sets else self._item(self.queries[position])

    def row(self, row: int) -> Item | None:
        """What a training row looks like, if that is known."""
        return None if self.rows is None else self._item(self.rows[row])

    def _item(self, row: Any) -> Item:
        return item_of(row, tokenizer=self.tokenizer, label_names=self.label_names)

    def row_card(self, row: int, score: float | None = None) -> Card:
        """A training row with its number, label and score."""
        notes = [] if score is None else [signed(score)]
        return card_of(self.row(row), f"row {row}", notes)

    def cluster_rows(self, cluster: int, position: int | None, count: int = SHOWN_EXAMPLES) -> list[Card]:
        """
        Some training rows of a cluster: those that most push the way the cluster does where rows are scored.

        Args:
            cluster (`int`): Which cluster.
            position (`int`, *optional*): The query's. Defaults to the mean over queries.
            count (`int`, *optional*, defaults to `4`): How many.
        """
        ids = self.result.cluster_ids
        if ids is None:
            return []
        members = np.flatnonzero(ids == cluster)
        scores = scores_of(self.result.row_scores, position)
        if scores is None:
            return [self.row_card(int(row)) for row in members[:count]]
        direction = 1.0 if of_query(self.result.scores, position)[cluster] >= 0 else -1.0
        members = members[np.argsort(-direction * scores[members], kind="stable")]
        return [self.row_card(int(row), float(scores[row])) for row in members[:count]]

    def cluster_samples(self, cluster: int, count: int = SHOWN_EXAMPLES) -> list[Card]:
        """The synthetic samples of a cluster: pictures, or texts where there is a tokenizer."""
        if self.synset is None:
            return []
        inputs = self.synset.samples.inputs[cluster]
        per_cluster = len(inputs)
        tokens = self.synset.metadata.get("tokens")
        weights = self.synset.samples.log_weights[cluster].exp()
        cards = []
        for number in range(min(per_cluster, count)):
            picture, text, read = None, f"{self.synset.input_name} of shape {tuple(inputs.shape[1:])}", False
            if inputs.dim() == 4 and inputs.shape[1] in (1, 3):
                picture, text = png_of(inputs[number]), ""
            elif tokens is not None:
                ids = tokens[cluster * per_cluster + number]
                read = self.tokenizer is not None
                text = str(self.tokenizer.decode(ids)) if self.tokenizer else f"tokens {', '.join(map(str, ids))}"
            item = Item(picture, shortened(text), self._soft_label(cluster, number))
            notes = [f"weight {float(weights[number].sum()):.3g}"] + ["read as its nearest tokens"] * read
            cards.append(card_of(item, "synthetic", notes))
        return cards

    def _soft_label(self, cluster: int, number: int) -> str | None:
        samples = self.synset.samples if self.synset is not None else None
        if samples is None or samples.targets.dim() != 3:
            return None
        target = samples.targets[cluster, number].softmax(-1)
        best = int(target.argmax())
        label = best if samples.target_ids is None else int(samples.target_ids[cluster, number, best])
        return f"{self.label_names.get(label, label)} ({float(target[best]):.0%})"


def card_of(item: Item | None, title: str, notes: Sequence[str] = ()) -> Card:
    """A card of an item, or of what is not at hand."""
    if item is None:
        return Card(title, note="\n".join(notes))
    label = [] if item.label is None else [f"label {item.label}"]
    return Card(title, item.picture, item.text, "\n".join([*label, *notes]))


def of_query(matrix: np.ndarray, position: int | None) -> np.ndarray:
    """The line of a query, or the mean over queries: `(matrix.shape[1],)`."""
    return matrix.mean(axis=0) if position is None else matrix[position]


def scores_of(matrix: np.ndarray | None, position: int | None) -> np.ndarray | None:
    """The same where there may be none."""
    return None if matrix is None else of_query(matrix, position)
