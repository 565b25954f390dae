"""What training losses of clusters are known by: samples and rows."""

from __future__ import annotations

import pytest
import torch

from hf_rgm.clusters.cluster_map import ClusterMap
from hf_rgm.engines import gradient_sources as module
from hf_rgm.engines.gradient_sources import RowSource, SampleSource, force, training_rows
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.losses import RowLoss
from hf_rgm.model.processes import Processes
from hf_rgm.model.row_reader import RowReader
from hf_rgm.trajectory.path import RecordedPath
from tests.engines.parts import flat, row_run, sample_run
from tests.recorded import TinyNet, record
from tests.text import language_model, texts


@pytest.fixture(scope="module")
def recorded():
    return record("sgd", model_class=TinyNet)


def path_of(run, rewind=0.0):
    return RecordedPath(run.trajectory, run.model.space, torch.device("cpu"), rewind=rewind, stride=1)


def loop_losses(run, vector, row_weights):
    """Each cluster's share of the training loss, one row at a time, with a graph."""
    named = run.model.space.unflatten(vector)
    result = torch.zeros(4)
    for row in range(12):
        inputs, labels = run_rows.batch([row])
        own = torch.nn.functional.cross_entropy(run.model.logits(named, inputs), labels)
        result = result + torch.eye(4)[row // 3] * own * row_weights[row]
    return result


@pytest.fixture(scope="module", autouse=True)
def rows_at_hand(recorded):
    global run_rows
    run_rows = row_run(recorded).rows.reader


@pytest.mark.parametrize("make", [sample_run, row_run], ids=["samples", "rows"])
class TestBoth:
    def test_losses_are_the_clusters_shares_of_the_training_loss(self, recorded, make):
        run = make(recorded)
        vector = flat(run, 7)
        expected = loop_losses(run, vector, torch.full((12,), 1 / 12))
        torch.testing.assert_close(run.source.losses(vector), expected.double(), atol=1e-6, rtol=1e-5)

    def test_gradients_are_those_of_the_losses(self, recorded, make):
        run = make(recorded)
        gradients = run.source.gradients(path_of(run), run.form)
        for state in (0, 13):
            expected = torch.autograd.functional.jacobian(
                lambda vector: loop_losses(run, vector, torch.full((12,), 1 / 12)), flat(run, state)
            )
            torch.testing.assert_close(gradients(state, range(4)), expected, atol=1e-6, rtol=1e-4)
            torch.testing.assert_close(gradients(state, range(1, 3)), expected[1:3], atol=1e-6, rtol=1e-4)

    def test_weighted_inputs_weigh_one_in_all_and_clusters_are_side_by_side(self, recorded, make):
        found = make(recorded).source.weighted_inputs
        assert float(found.weights.sum()) == pytest.approx(1)
        assert found.clusters.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
        assert found.inputs["features"].shape == (12, 5)

    def test_a_force_is_the_change_of_the_gradient_in_any_parts(self, recorded, make):
        run = make(recorded)
        gradients = run.source.gradients(path_of(run), run.form)
        masks = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
        expected = (masks - 1) @ gradients(3, range(4))
        for max_bytes in (1, 12 * 57 * 3, 2**30):
            found = force(gradients, 3, masks, length=57, max_bytes=max_bytes)
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_losses_of_samples_go_in_parts(recorded, monkeypatch):
    run = sample_run(recorded)
    expected = run.source.losses(run.final)
    monkeypatch.setattr(module, "LOSS_ROWS", 6)
    torch.testing.assert_close(run.source.losses(run.final), expected)


class TestRows:
    def source(self, recorded, ids, **settings):
        model = FunctionalModel(recorded.model.float())
        items = [{"features": x.float(), "labels": int(y)} for x, y in zip(recorded.features, recorded.labels)]  # noqa: B905
        options = {"max_bytes": 2**30, "processes": Processes(), **settings}
        return RowSource(model, RowReader(items, model), ClusterMap.from_ids(ids), RowLoss(), **options)

    def test_few_stand_for_their_cluster_by_its_size(self, recorded, monkeypatch):
        monkeypatch.setattr(module, "LOSS_ROWS", 4)
        source = self.source(recorded, [0] * 9 + [1] * 3)
        vector = source.model.space.flatten(source.model.parameters())
        each = torch.stack([
            torch.nn.functional.cross_entropy(source.model.logits(source.model.parameters(), inputs), labels)
            for inputs, labels in (source.reader.batch([row]) for row in range(12))
        ])  # fmt: skip
        expected = torch.stack([each[:2].mean() * 9 / 12, each[9:11].mean() * 3 / 12])
        torch.testing.assert_close(source.losses(vector), expected.detach().double(), atol=1e-6, rtol=1e-5)

    def test_of_many_rows_some_are_looked_at_evenly(self, recorded, monkeypatch):
        monkeypatch.setattr(module, "MAX_CANDIDATES", 8)
        found = self.source(recorded, [0] * 6 + [1] * 3 + [0] * 3).weighted_inputs
        assert found.clusters.tolist() == [0] * 6 + [1] * 2
        assert found.weights.tolist() == pytest.approx([1 / 8] * 8)

    def test_the_rows_are_read_once_for_all_states_and_shorter_paths(self, recorded, monkeypatch):
        run = row_run(recorded)
        calls = []
        original = module.cluster_gradients
        monkeypatch.setattr(module, "cluster_gradients", lambda *a, **k: calls.append(len(a[1])) or original(*a, **k))
        first = run.rows.gradients(path_of(run), run.form)(15, range(4))
        assert calls == [20]
        again = run.rows.gradients(path_of(run, 0.5), run.form)(15, range(4))
        assert calls == [20] and torch.equal(first, again)

    def test_with_little_memory_they_are_read_at_every_state_anew(self, recorded, monkeypatch):
        plenty = row_run(recorded)
        expected = plenty.rows.gradients(path_of(plenty), plenty.form)(15, range(1, 3))
        run = row_run(recorded, max_bytes=10_000)
        calls = []
        original = module.cluster_gradients
        monkeypatch.setattr(module, "cluster_gradients", lambda *a, **k: calls.append(len(a[1])) or original(*a, **k))
        gradients = run.rows.gradients(path_of(run), run.form)
        assert calls == []
        torch.testing.assert_close(gradients(15, range(1, 3)), expected)
        assert calls == [1]

    def test_gradients_that_are_known_are_kept(self, recorded, monkeypatch):
        run = row_run(recorded)
        monkeypatch.setattr(module, "cluster_gradients", lambda *_: pytest.fail("the rows were read"))
        states = [state for state, _, _ in path_of(run).segments()]
        known = torch.randn(len(states), 4, run.model.num_parameters)
        run.rows.keep(run.trajectory, run.form, states, known)
        torch.testing.assert_close(run.rows.gradients(path_of(run), run.form)(states[3], range(2)), known[3, :2])

    def test_another_run_s_gradients_are_not_taken_for_them(self, recorded):
        run, other = row_run(recorded), record("sgd", model_class=TinyNet, seed=3)
        run.rows.gradients(path_of(run), run.form)
        foreign = RecordedPath(other.trajectory, run.model.space, torch.device("cpu"), rewind=0.0, stride=1)
        found = run.rows.gradients(foreign, run.form)(10, range(4))
        expected = torch.autograd.functional.jacobian(
            lambda vector: loop_losses(run, vector, torch.full((12,), 1 / 12)), foreign.state(10)
        )
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)

    def test_tokens_without_a_label_weigh_nothing(self):
        model = FunctionalModel(language_model("gpt2"))
        reader = RowReader(texts(6, labels="text"), model)
        clusters = ClusterMap.from_ids([0, 0, 0, 1, 1, 1])
        row_loss = RowLoss(labels_per_row=reader.labels_per_row())
        source = RowSource(model, reader, clusters, row_loss, max_bytes=2**30, processes=Processes())
        weighted = source.weighted_inputs
        assert weighted.weights.shape == weighted.inputs["input_ids"].shape
        assert float(weighted.weights.sum()) == pytest.approx(1)

    def test_the_curvature_s_rows_do_not_depend_on_memory_or_order_within_calls(self, recorded):
        one, two = (self.source(recorded, [0, 1] * 6, max_bytes=size).weighted_inputs for size in (2**30, 1))
        assert torch.equal(one.inputs["features"], two.inputs["features"])
        assert one.clusters.tolist() == [0] * 6 + [1] * 6

    def test_another_number_of_rows_is_refused(self, recorded):
        model = FunctionalModel(recorded.model.float())
        items = [{"features": torch.zeros(5), "labels": 0}] * 3
        with pytest.raises(ValueError, match="`rows` has 3 rows, but the clusters have 12"):
            training_rows(items, model, ClusterMap.from_ids([0] * 12), None, recorded.trajectory)


def test_a_run_has_rows_or_samples(recorded):
    run = sample_run(recorded)
    assert isinstance(run.source, SampleSource)
    run.samples = None
    with pytest.raises(RuntimeError, match="A run has rows or samples"):
        _ = run.source
