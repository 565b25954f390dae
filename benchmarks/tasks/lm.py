"""
Language modelling of the sentences: 2,400 rows, 30 clusters, a small GPT-2 from scratch, AdamW.

167,680 parameters, among them the tied embeddings of 1,024 tokens; the tokenizer is learned from the training rows.
There is no dropout. The objective is the mean log-probability of a held-out sentence's tokens. Clusters are ten
k-means cells of latent semantic features (truncated SVD of TF-IDF) for each source.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from datasets import Dataset
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, set_seed

from benchmarks.tasks import Task
from benchmarks.tasks.texts import codes, load_sentences, token_dataset
from benchmarks.tasks.trainers import quiet_trainer
from hf_rgm import ClusterMap
from hf_rgm.model.losses import IGNORED_LABEL

NUM_TRAIN, NUM_QUERIES, NUM_TUNING_QUERIES = 2400, 100, 40
VOCABULARY, MAX_LENGTH = 1024, 32
PADDING, END = "<pad>", "<end>"
NUM_TOPIC_FEATURES = 20


def build_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE of lower-case text, with `<end>` before and after each text, padded to one length."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[PADDING, END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A {END}", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    tokenizer.enable_truncation(MAX_LENGTH)
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(PADDING), pad_token=PADDING, length=MAX_LENGTH)
    return tokenizer


def build_trainer(dataset: Dataset, seed: int, callbacks=(), **overrides) -> Trainer:
    """
    A GPT-2 of two layers and width 64, AdamW at 3e-3 with linear decay, batches of 32, no clipping.

    `overrides` go to `TrainingArguments` and say how long to train.
    """
    set_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=MAX_LENGTH,
        n_embd=64,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return quiet_trainer(
        GPT2LMHeadModel(config),
        dataset,
        seed,
        callbacks,
        **{"per_device_train_batch_size": 32, "learning_rate": 3e-3, **overrides},
    )


def topics(texts: list[str], sources: list[str]) -> ClusterMap:
    """Ten clusters of each source."""
    features = make_pipeline(
        TfidfVectorizer(stop_words="english", sublinear_tf=True, min_df=2),
        TruncatedSVD(NUM_TOPIC_FEATURES, random_state=0),
        Normalizer(),
    ).fit_transform(texts)
    groups, names = codes(sources)
    return ClusterMap.from_embeddings(features, labels=groups, label_names=names, num_clusters_per_class=10, seed=0)


def load() -> Task:
    """The task with a fixed number of steps."""
    sentences = load_sentences()
    texts = [sentence.text for sentence in sentences]
    tokenizer = build_tokenizer(texts[:NUM_TRAIN])
    encoded = tokenizer.encode_batch(texts)
    ids = np.array([row.ids for row in encoded])
    mask = np.array([row.attention_mask for row in encoded])
    labels = np.where(mask == 1, ids, IGNORED_LABEL)

    def part(start: int, count: int) -> Dataset:
        rows = slice(start, start + count)
        return token_dataset(ids[rows], mask[rows], labels[rows])

    return Task(
        name="lm",
        train=part(0, NUM_TRAIN),
        queries=part(NUM_TRAIN, NUM_QUERIES),
        tuning_queries=part(NUM_TRAIN + NUM_QUERIES, NUM_TUNING_QUERIES),
        clusters=topics(texts[:NUM_TRAIN], [sentence.source for sentence in sentences[:NUM_TRAIN]]),
        build_trainer=partial(build_trainer, max_steps=300),
        num_cluster_masks=30,
        num_row_masks=30,
        seeds=(1, 2, 3),
        objective="log_probability",
        num_distances=0,
    )
