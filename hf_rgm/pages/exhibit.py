"""What pages show: attributions with their synset, model, rows and queries where given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_rgm.model.functional_model import LABEL_NAMES
from hf_rgm.model.row_reader import DataCollator
from hf_rgm.pages.html import Card, signed
from hf_rgm.pages.shown_rows import card_of, png_of, shortened, shown_row
from hf_rgm.synset.synset import Synset

if TYPE_CHECKING:
    from hf_rgm.attribution.attributor import Attributor
    from hf_rgm.results.result import AttributionResult

SHOWN_EXAMPLES = 4


@dataclass
class Exhibit:
    """Attributions with what makes them visible; all but the result is optional, and must belong to the result."""

    result: AttributionResult
    synset: Synset | None = None
    rows: Any = None  # the training dataset
    queries: Any = None  # in the order of the result
    attributor: Attributor | None = None  # predicts, with the queries, what the model would be without clusters
    tokenizer: PreTrainedTokenizerBase | None = None
    data_collator: DataCollator | None = None
    label_names: Mapping[int, str] = field(init=False)

    def __post_init__(self) -> None:
        result = self.result
        self.tokenizer = self.tokenizer or result.tokenizer
        if self.synset is None and self.attributor is not None:
            self.synset = self.attributor.synset
        if self.synset is not None:
            synset, told = self.synset, result.metadata.get("parameters_sha256")
            names_differ = list(synset.clusters.names) != list(result.cluster_names)
            if names_differ or told not in (None, synset.parameters_sha256):
                raise ValueError(
                    f"The synset (parameters {synset.parameters_sha256[:12]}, {synset.num_clusters} clusters) is not "
                    f"that of the result (parameters {str(told)[:12]}, {result.num_clusters} clusters). Pass the one "
                    "that the result was computed with."
                )
        num_rows = int(result.cluster_sizes.sum())
        if self.rows is not None and len(self.rows) != num_rows:
            raise ValueError(
                f"`rows` has {len(self.rows)} rows, the result was computed for {num_rows}. Pass the training dataset."
            )
        if self.queries is not None and not self.values_are_of_sets and len(self.queries) != result.num_queries:
            raise ValueError(
                f"`queries` has {len(self.queries)} rows, the result has {result.num_queries} queries. Pass the "
                "queries that were attributed, in the same order."
            )
        self.label_names = self._known_labels()

    def _known_labels(self) -> dict[int, str]:
        for dataset in (self.rows, self.queries):
            for name in LABEL_NAMES:
                feature = (getattr(dataset, "features", None) or {}).get(name)
                if isinstance(feature, datasets.ClassLabel):
                    return dict(enumerate(feature.names))
        config: Any = None if self.attributor is None else getattr(self.attributor.model.module, "config", None)
        names = getattr(config, "id2label", None) or {}
        # Names that transformers generates tell less than the number.
        return {} if all(name == f"LABEL_{label}" for label, name in names.items()) else dict(names)

    @property
    def values_are_of_sets(self) -> bool:
        """Whether the objective is one value for all queries together, such as the mean loss."""
        return self.result.num_queries == 1 and self.queries is not None and len(self.queries) != 1

    @property
    def can_replay(self) -> bool:
        """Whether models without clusters can be asked."""
        return self.attributor is not None and self.queries is not None

    def query(self, position: int) -> Card | None:
        """Card of the query at a position; `None` if unknown."""
        if self.queries is None or self.values_are_of_sets:
            return None
        return self._card(shown_row(self.queries, position), "query")

    def row_card(self, row: int, score: float | None = None) -> Card:
        """Card of a training row: its number and score, and what it looks like if rows are given."""
        card = Card(f"row {row}") if self.rows is None else self._card(shown_row(self.rows, row), f"row {row}")
        return card if score is None else replace(card, notes=[signed(score)])

    def _card(self, row: Any, title: str) -> Card:
        return replace(card_of(row, tokenizer=self.tokenizer, label_names=self.label_names), title=title)

    def cluster_rows(self, cluster: int, position: int | None) -> list[Card]:
        """Cards of some rows of a cluster; if rows are scored, those that push most in its direction first."""
        ids = self.result.cluster_ids
        if ids is None:
            return []
        members = np.flatnonzero(ids == cluster)
        if self.result.row_scores is None:
            return [self.row_card(int(row)) for row in members[:SHOWN_EXAMPLES]]
        scores = of_query(self.result.row_scores, position)
        direction = 1.0 if of_query(self.result.scores, position)[cluster] >= 0 else -1.0
        members = members[np.argsort(-direction * scores[members], kind="stable")]
        return [self.row_card(int(row), float(scores[row])) for row in members[:SHOWN_EXAMPLES]]

    def cluster_samples(self, cluster: int) -> list[Card]:
        """Cards of some synthetic samples of a cluster: pictures, texts with a tokenizer, or tokens."""
        synset = self.synset
        if synset is None:
            return []
        inputs, tokens = synset.samples.inputs[cluster], synset.metadata.get("tokens")
        weights = synset.samples.log_weights[cluster].exp()
        cards = []
        for number, sample in enumerate(inputs[:SHOWN_EXAMPLES]):
            text, notes = "", [f"weight {float(weights[number].sum()):.3g}"]
            picture = png_of(sample) if sample.dim() == 3 else None
            if tokens is not None:
                ids = tokens[cluster * len(inputs) + number]
                text = f"tokens {', '.join(map(str, ids))}"
                if self.tokenizer is not None:
                    text = str(self.tokenizer.decode(ids))
                    notes.append("read as its nearest tokens")
            elif picture is None:
                text = f"{synset.input_name} of shape {tuple(sample.shape)}"
            cards.append(Card("synthetic", picture, shortened(text), self._soft_label(synset, cluster, number), notes))
        return cards

    def _soft_label(self, synset: Synset, cluster: int, number: int) -> str | None:
        samples = synset.samples
        if samples.targets.dim() != 3:
            return None
        target = samples.targets[cluster, number].softmax(-1)
        best = int(target.argmax())
        label = best if samples.target_ids is None else int(samples.target_ids[cluster, number, best])
        return f"{self.label_names.get(label, label)} ({float(target[best]):.0%})"


def of_query(matrix: np.ndarray, position: int | None) -> np.ndarray:
    """Scores of one query, or the mean over queries: `(matrix.shape[1],)`."""
    return matrix.mean(axis=0) if position is None else matrix[position]
