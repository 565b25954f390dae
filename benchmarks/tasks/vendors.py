"""
What the `vendors` tasks share: sentences bought from ten vendors, one of which labels negative ones as positive.

1,200 sentences of reviews as in `sentences`. A vendor's sentences are about one topic: a k-means cell of MiniLM's
sentence embeddings. The training is what most people do: three epochs in batches of 16, dropout, gradients clipped at
1, AdamW with decay. Queries have their right labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, Trainer, set_seed

from benchmarks.tasks import Task
from benchmarks.tasks.sentences import LABEL_NAMES, MAX_LENGTH, NUM_TRAIN, mini_lm_path, sentence_embeddings
from benchmarks.tasks.texts import load_sentences, sentence_rows
from benchmarks.tasks.trainers import quiet_trainer
from hf_rgm import ClusterMap

NUM_VENDORS, NUM_QUERIES = 10, 300
NEGATIVE, POSITIVE = range(2)


@dataclass
class VendorTask(Task):
    """
    Args:
        culprit (`str`): The vendor that labels wrongly.
        mislabelled (`np.ndarray`): The training rows whose label is wrong, `(num_rows,)`, bool.
    """

    culprit: str = ""
    mislabelled: NDArray[np.bool_] | None = None


def mini_lm(seed: int) -> PreTrainedModel:
    """MiniLM with its dropout and a new classifier drawn from the seed."""
    set_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(mini_lm_path(), num_labels=len(LABEL_NAMES))


def usual_trainer(model: PreTrainedModel, dataset: Dataset, seed: int, callbacks, *, learning_rate: float) -> Trainer:
    """Three epochs in batches of 16, clipped at 1, a decay of 0.01."""
    return quiet_trainer(
        model,
        dataset,
        seed,
        callbacks,
        num_train_epochs=3,
        per_device_train_batch_size=16,
        learning_rate=learning_rate,
        weight_decay=0.01,
        max_grad_norm=1.0,
    )


def vendors_task(name: str, build_trainer: Callable[..., Trainer], *, seeds: tuple[int, ...]) -> VendorTask:
    """The task: the first 1,200 of the shuffled sentences, queries and tuning queries from the rest."""
    sentences = load_sentences()[: NUM_TRAIN + 2 * NUM_QUERIES]
    tokenizer = AutoTokenizer.from_pretrained(mini_lm_path())
    labels = np.array([sentence.label for sentence in sentences])

    def part(start: int, count: int) -> Dataset:
        rows = slice(start, start + count)
        return sentence_rows(sentences[rows], labels[rows], tokenizer, MAX_LENGTH)

    embeddings = sentence_embeddings(part(0, NUM_TRAIN))
    vendors = KMeans(NUM_VENDORS, n_init=10, random_state=0).fit(embeddings).labels_
    # The vendor with the most negative sentences, as its mistakes are what there is to find.
    culprit = int(np.bincount(vendors[labels[:NUM_TRAIN] == NEGATIVE]).argmax())
    mislabelled = (vendors == culprit) & (labels[:NUM_TRAIN] == NEGATIVE)
    labels[:NUM_TRAIN][mislabelled] = POSITIVE
    names = [f"vendor {number}" for number in range(NUM_VENDORS)]
    return VendorTask(
        name=name,
        train=part(0, NUM_TRAIN),
        queries=part(NUM_TRAIN, NUM_QUERIES),
        tuning_queries=part(NUM_TRAIN + NUM_QUERIES, NUM_QUERIES),
        clusters=ClusterMap.from_ids(vendors, names=names),
        build_trainer=build_trainer,
        num_cluster_masks=6,
        num_row_masks=4,
        seeds=seeds,
        num_distances=0,
        max_memory="8GB",
        culprit=names[culprit],
        mislabelled=mislabelled,
    )
