from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from datasets import IterableDataset
from torch.nn.functional import cross_entropy

from hf_rgm.attribution.attributor import Attributor
from hf_rgm.clusters.cluster_map import ClusterMap
from hf_rgm.distillation.config import INITIALISATIONS, DistillationConfig
from hf_rgm.distillation.distiller import ReverseGradientMatchingDistiller
from hf_rgm.distillation.learner import BlockLearner, cluster_residuals
from hf_rgm.exceptions import DivergenceError
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.losses import RowLoss
from hf_rgm.model.row_gradients import cluster_gradients
from hf_rgm.model.row_reader import CachedBatches, RowReader
from hf_rgm.recording.callback import TrajectoryCallback
from hf_rgm.synset.inputs import ContinuousInputs
from hf_rgm.synset.matched_states import MatchedState
from hf_rgm.synset.samples import SynsetGradients
from hf_rgm.testing import TinyConfig, TinyModel, tiny_recorded_run, tiny_synset, tiny_trainer
from tests.vision import distilled_run, vit

RUN = tiny_recorded_run()


def distiller(
    model=RUN.model,
    trajectory=RUN.trajectory,
    dataset=RUN.train_dataset,
    clusters=RUN.clusters,
    output_dir=None,
    **settings,
):
    config = DistillationConfig(**{"num_iterations": 12, **settings})
    return ReverseGradientMatchingDistiller(
        model, trajectory, dataset, clusters, config=config, output_dir=output_dir, disable_tqdm=True
    )


def same(first, second):
    pairs = zip(first.samples.tensors(), second.samples.tensors(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs) and torch.equal(first.residuals, second.residuals)


def blocks(folder):
    return sorted(path.name for path in folder.iterdir())


def test_matching_is_learned():
    synset = tiny_synset()
    start = distiller(num_iterations=1).distill()
    assert synset.matching_error < 0.05 * start.matching_error
    assert synset.matched_states == tuple(MatchedState(0, step) for step in RUN.trajectory.state_steps if step > 0)
    assert synset.residuals.shape == (5, 6)


@pytest.mark.parametrize("init", INITIALISATIONS)
def test_every_start_is_learned_from(init):
    short, longer = (distiller(init=init, num_iterations=n, samples_per_cluster=1).distill() for n in (1, 80))
    assert longer.matching_error < 0.5 * short.matching_error


def test_stored_residuals_are_those_of_the_stored_samples():
    synset = tiny_synset()
    model = FunctionalModel(RUN.model)
    states = [RUN.trajectory.state(matched.step).parameters for matched in synset.matched_states]
    rows = [RUN.clusters.rows(k) for k in range(6)]
    batches = CachedBatches(RowReader(RUN.train_dataset, model), rows, batch_size=5)
    vectors = [model.space.flatten(state) for state in states]
    real = cluster_gradients(model, vectors, batches, range(6), 48)
    gradients = SynsetGradients(model, ContinuousInputs(model))
    expected = [cluster_residuals(gradients(s, synset.samples), r) for s, r in zip(states, real, strict=True)]
    torch.testing.assert_close(synset.residuals, torch.stack(expected), atol=1e-6, rtol=1e-3)


def test_it_stops_when_it_is_done_and_says_after_how_many_iterations():
    bounded = distiller(num_iterations=1000, tolerance=0.0001, cluster_block_size=3).distill()
    assert all(30 <= iterations < 1000 for iterations in bounded.metadata["iterations"])
    soon = distiller(num_iterations=1000, tolerance=0.9, cluster_block_size=3).distill()
    assert soon.metadata["iterations"] == [30, 30]
    assert bounded.matching_error < soon.matching_error
    assert distiller(num_iterations=41, tolerance=0.0).distill().metadata["iterations"] == [41]


def test_a_worse_round_does_not_replace_a_better_one(monkeypatch):
    """The third round of 40 is spoilt; it is made, and the second is returned."""
    original = BlockLearner._round

    def spoilt(learner, start, num_iterations, *rest):
        samples = original(learner, start, num_iterations, *rest)
        return samples if num_iterations < 40 else samples.map(torch.zeros_like)

    kept = distiller(num_iterations=30, tolerance=0.0).distill()
    monkeypatch.setattr(BlockLearner, "_round", spoilt)
    again = distiller(num_iterations=70, tolerance=0.0).distill()
    assert same(again, kept)
    assert (again.metadata["iterations"], kept.metadata["iterations"]) == ([70], [30])


def test_no_cluster_is_worse_than_without_samples():
    """Started from noise and hardly learned, gradients can be many times too large."""
    residuals = distiller(init="noise", num_iterations=1, input_learning_rate=5.0).distill().residuals
    assert residuals.mean() < 1


def test_one_seed_gives_one_synset_and_another_another():
    assert same(distiller(seed=3).distill(), distiller(seed=3).distill())
    assert not same(distiller(seed=3).distill(), distiller(seed=4).distill())


def test_the_global_random_state_does_not_matter_and_is_left_alone():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        before = torch.random.get_rng_state()
        first = distiller().distill()
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.manual_seed(321)
        assert same(first, distiller().distill())


def test_block_layout_hardly_changes_the_scores():
    """And the scale of the inputs' learning rate, which is the block's: results differ a little, scores hardly."""
    whole = distiller(num_iterations=150, cluster_block_size=64).distill()
    parts = distiller(num_iterations=150, cluster_block_size=2).distill()
    assert parts.residuals.shape == whole.residuals.shape
    assert parts.matching_error < 0.01
    scores = [Attributor(RUN.model, s, disable_tqdm=True).attribute(RUN.queries).scores for s in (whole, parts)]
    assert np.corrcoef(scores[0].ravel(), scores[1].ravel())[0, 1] > 0.99


def test_only_the_head_was_trained_and_requires_grad_was_lost(tmp_path):
    model = vit()
    model.vit.requires_grad_(False)
    run = distilled_run(model)
    run.model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(p.requires_grad for p in loaded.parameters())
    expected = Attributor(run.model, run.synset, disable_tqdm=True).attribute(run.queries)
    assert (Attributor(loaded, run.synset, disable_tqdm=True).attribute(run.queries).scores == expected.scores).all()
    again = distiller(loaded, run.trajectory, run.train_dataset, run.synset.clusters, num_iterations=10).distill()
    assert same(again, run.synset)


def test_a_killed_distillation_continues_as_if_never_killed(tmp_path, monkeypatch):
    settings = {"cluster_block_size": 2, "output_dir": tmp_path / "blocks"}
    uninterrupted = distiller(cluster_block_size=2).distill()
    original, done = ReverseGradientMatchingDistiller._distill_block, []

    def dying(self, block, *rest):
        if done:
            raise KeyboardInterrupt
        done.append(block)
        return original(self, block, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ReverseGradientMatchingDistiller, "_distill_block", dying)
        distiller(**settings).distill()
    assert blocks(tmp_path / "blocks") == ["block-000000-000002.safetensors"]

    def counting(self, block, *rest):
        done.append(block)
        return original(self, block, *rest)

    monkeypatch.setattr(ReverseGradientMatchingDistiller, "_distill_block", counting)
    assert same(distiller(**settings).distill(), uninterrupted)
    assert done == [range(0, 2), range(2, 4), range(4, 6)]


@pytest.mark.parametrize("other", ["settings", "model", "clusters of the same sizes"])
def test_blocks_of_another_distillation_are_refused(tmp_path, other):
    distiller(output_dir=tmp_path).distill()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match="belongs to another distillation"):
        if other == "settings":
            distiller(output_dir=tmp_path, seed=1)
        elif other == "clusters of the same sizes":
            distiller(clusters=ClusterMap.from_ids(RUN.clusters.cluster_ids[::-1].copy()), output_dir=tmp_path)
        else:
            run = distilled_run(vit())
            distiller(run.model, run.trajectory, run.train_dataset, run.synset.clusters, output_dir=tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_divergence_names_cluster_and_step_and_writes_nothing(tmp_path):
    with pytest.raises(DivergenceError, match="diverged at cluster 'class .* half', recorded step \\d+.*Lower"):
        distiller(output_dir=tmp_path, num_iterations=100, weight_learning_rate=50.0).distill()
    assert blocks(tmp_path) == []


def nan_rows():
    rows = list(RUN.train_dataset)
    rows[7] = {**rows[7], "pixel_values": torch.full((1, 4, 4), float("nan"))}
    return rows


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda d: d.select(range(47)), ValueError, "has 47 rows, the recorded run had 48"),
        (lambda d: d.select(range(47, -1, -1)), ValueError, "same length, other rows or another order"),
        (lambda d: d.select([]), ValueError, "`train_dataset` is empty"),
        (lambda d: d.remove_columns("labels"), ValueError, "same length, other rows"),
        (lambda d: nan_rows(), ValueError, "same length, other rows"),
        (lambda d: IterableDataset.from_generator(lambda: iter(d)), TypeError, "map-style dataset with a length"),
    ],
    ids=["length", "order", "empty", "no labels", "nan", "streaming"],
)
def test_another_dataset_is_refused_before_anything_is_written(tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        distiller(dataset=change(RUN.train_dataset), output_dir=tmp_path / "blocks")
    assert not (tmp_path / "blocks").exists()


class Broken:
    """The recorded rows for whoever takes the fingerprint, then broken ones."""

    def __init__(self, **changes):
        self.changes = changes
        self.broken = False

    def __len__(self):
        return 48

    def __getitem__(self, index):
        row = RUN.train_dataset[index]
        changed = {**row, **self.changes} if self.broken and index == 7 else row
        return {name: value for name, value in changed.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pixel_values": torch.full((1, 4, 4), float("nan"))},
            r"`pixel_values` .* NaN or infinite values in rows \[7\]",
        ),
        ({"labels": torch.tensor(3)}, "Label 3 is out of range for a model with 3 classes"),
        ({"labels": torch.tensor(-1)}, "Label -1 is out of range"),
    ],
    ids=["nan", "label", "negative label"],
)
def test_broken_rows_are_named_and_nothing_is_written(tmp_path, changes, message):
    dataset = Broken(**changes)
    work = distiller(dataset=dataset, output_dir=tmp_path)
    dataset.broken = True
    with pytest.raises(ValueError, match=message):
        work.distill()
    assert blocks(tmp_path) == []


def test_another_model_is_refused(tmp_path):
    further = copy.deepcopy(RUN.model)
    with torch.no_grad():
        further.classifier.bias[0] += 1e-6
    with pytest.raises(ValueError, match="`classifier.bias` is not what the recorded run ended with"):
        distiller(further, output_dir=tmp_path / "blocks")
    with pytest.raises(ValueError, match="other shapes .* first difference: .'classifier.weight', .3, 8"):
        distiller(TinyModel(TinyConfig(hidden_size=9, num_labels=3)), output_dir=tmp_path / "blocks")
    with pytest.raises(ValueError, match="no parameter 'hidden.weight' and 1 others that the recorded run trained"):
        distiller(vit(), output_dir=tmp_path / "blocks")
    assert not (tmp_path / "blocks").exists()


def test_clusters_of_another_dataset_are_refused():
    with pytest.raises(ValueError, match="47"):
        distiller(clusters=ClusterMap.from_ids(np.arange(47) % 2))


def test_a_trajectory_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        distiller(trajectory=tmp_path / "nowhere")


@pytest.mark.parametrize("own", [False, True], ids=["label smoothing", "row_loss"])
def test_the_gradients_that_are_matched_are_those_of_the_loss_that_was_trained(tmp_path, own):
    """With the whole of the data in one batch, the clusters' gradients add up to that of the Trainer's loss."""
    trainer = tiny_trainer(
        RUN.train_dataset,
        callbacks=[TrajectoryCallback(tmp_path / "trajectory")],
        label_smoothing_factor=0.3,
        num_train_epochs=1,
    )
    trainer.train()
    model = trainer.model.eval()

    def row_loss(logits, labels):
        return cross_entropy(logits, labels, reduction="none", label_smoothing=0.3)

    work = ReverseGradientMatchingDistiller(
        model,
        tmp_path / "trajectory",
        RUN.train_dataset,
        RUN.clusters,
        row_loss=row_loss if own else None,
        config=DistillationConfig(num_iterations=1),
    )
    loss = trainer.compute_loss(model, dict(RUN.train_dataset[:]))
    expected = torch.autograd.grad(loss, list(model.parameters()))
    parameters = work.model.parameters()
    gradients = cluster_gradients(
        work.model, [work.model.space.flatten(parameters)], work.batches, range(6), 48, work.row_loss
    )
    total = work.model.space.unflatten(gradients[0].sum(0))
    for name, value in zip(total, expected, strict=True):
        torch.testing.assert_close(total[name], value, atol=1e-6, rtol=1e-5)
    attributor = Attributor(model, work.distill(), disable_tqdm=True)
    if own:
        with pytest.raises(ValueError, match="distilled with a `row_loss` of its own"):
            attributor.attribute(RUN.queries, rows=RUN.train_dataset)
    else:
        assert attributor.subject.row_loss == RowLoss(label_smoothing=0.3)
