"""Segments of many steps: as the optimizer's own steps, one after the other, and forwards as backwards."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from hf_rgm.engines import segment_map as module
from hf_rgm.engines import segments as segments_module
from hf_rgm.engines.curvature import CurvatureRows
from hf_rgm.engines.segment_map import SegmentMap
from hf_rgm.engines.segments import Segment, segments_of
from tests.engines.long_segments import NUM_CLUSTERS, NUM_PARAMETERS, long_run, path_of, random_rows, stepwise

EXACT = 1e-6
"""The preconditioner is float32; all else here is float64."""

MASKS = torch.tensor([[1.0, 1, 1], [0, 1, 1], [0.5, 1, 0], [2, 0.5, 1]], dtype=torch.float64)
SETTINGS = {
    "sgd": ("sgd", {}),
    "plain sgd": ("sgd", {"momentum": 0.0}),
    "dampening": ("sgd", {"dampening": 0.3}),
    "nesterov": ("sgd", {"nesterov": True}),
    "sgd with decay": ("sgd", {"decays": (0.3, 0.3)}),
    "adam": ("adam", {}),
    "adamw": ("adamw", {}),
    "adamw with decay": ("adamw", {"decays": (0.3, 0.3)}),
    "clipping": ("adamw", {"clips": True}),
    "clipping and decay": ("sgd", {"clips": True, "decays": (0.3, 0.3)}),
    "skipped": ("adamw", {"skipped": (0, 1, 7, 15, 23)}),
    "warm-up": ("adam", {"warmup": 5}),
    "warm-up and decay": ("sgd", {"warmup": 5, "decays": (0.3, 0.3)}),
    "rates of groups": ("adamw", {"rates": (1.0, 4.0), "clips": True}),
    "rates of groups, sgd": ("sgd", {"rates": (1.0, 0.25)}),
    "a group that is frozen": ("sgd", {"rates": (1.0, 0.0)}),
    "elements without a moment": ("adamw", {"still": (1, 5), "decays": (0.2, 0.2)}),
}


@pytest.fixture(autouse=True)
def no_cap(monkeypatch):
    monkeypatch.setattr(Segment, "stable_curvature", float("inf"))


def vectors(*shape, seed=0, still=()):
    made = torch.randn(*shape, NUM_PARAMETERS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    made[..., list(still)] = 0.0
    return made


def still_of(segment):
    return torch.nonzero(segment.precondition.expand(NUM_PARAMETERS) == 0).flatten().tolist()


def through(run, curvature, segments=None, masks=MASKS):
    """Deviation, momentum after all segments: by the map, and step by step."""
    found, expected = [], []
    for which in (0, 1):
        deviations = vectors(len(masks), seed=1)
        momenta = vectors(len(masks), seed=2)
        forces = vectors(len(masks), seed=3)
        for segment in segments or segments_of(path_of(run)):
            still = still_of(segment)
            deviations[:, still] = 0.0
            if which == 0:
                deviations, momenta = SegmentMap(segment, curvature).forward(deviations, momenta, forces, masks)
            else:
                ends = [
                    stepwise(run, segment.first, segment.last, curvature, *own)
                    for own in zip(deviations, momenta, forces, masks, strict=True)
                ]
                deviations, momenta = (torch.stack(values) for values in zip(*ends, strict=True))
        (found, expected)[which].extend([deviations, momenta])
    return found, expected, still_of((segments or segments_of(path_of(run)))[-1])


@pytest.mark.parametrize("rank", [3, 30], ids=["few rows", "more rows than parameters"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_segment_is_its_steps(setting, rank):
    name, constants = SETTINGS[setting]
    run = long_run(name, **constants)
    segments = segments_of(path_of(run))
    assert [(segment.state, segment.first, segment.last) for segment in segments] == [
        (0, 0, 6), (12, 6, 18), (24, 18, 24),
    ]  # fmt: skip
    found, expected, still = through(run, random_rows(rank))
    moving = [index for index in range(NUM_PARAMETERS) if index not in still]
    torch.testing.assert_close(found[0], expected[0], atol=EXACT, rtol=1e-5)
    torch.testing.assert_close(found[1][:, moving], expected[1][:, moving], atol=EXACT, rtol=1e-5)
    assert bool((found[0][:, still] == 0).all())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_columns_go_in_parts(optimizer, monkeypatch):
    monkeypatch.setattr(module, "COLUMNS_AT_ONCE", 3)
    run = long_run(optimizer, rates=(1.0, 4.0))
    found, expected, _ = through(run, random_rows())
    torch.testing.assert_close(found[0], expected[0], atol=EXACT, rtol=1e-5)


@pytest.mark.parametrize("decays", [(0.3, 0.3), (0.0, 0.4)], ids=["alike", "different"])
@pytest.mark.parametrize("setting", [name for name in SETTINGS if "decay" not in name])
@pytest.mark.parametrize("rank", [3, 30])
def test_backward_is_the_transpose_of_forward(setting, decays, rank):
    """<F(x), y> = <x, F'(y)> at p = 1 for what begins a segment, what ends it, and the force."""
    name, constants = SETTINGS[setting]
    run, curvature = long_run(name, **{**constants, "decays": decays}), random_rows(rank)
    for segment in segments_of(path_of(run)):
        segment_map = SegmentMap(segment, curvature)
        still = still_of(segment)
        begin = [vectors(1, seed=seed, still=still) for seed in (1, 2, 3)]
        end = [vectors(1, seed=seed, still=still) for seed in (4, 5)]
        forward = segment_map.forward(*begin, torch.ones(1, NUM_CLUSTERS, dtype=torch.float64))
        backward = segment_map.backward(*end)
        left = sum(float((a * b).sum()) for a, b in zip(forward, end, strict=True))
        right = sum(float((a * b).sum()) for a, b in zip(begin, backward, strict=True))
        assert left == pytest.approx(right, rel=1e-6, abs=1e-6)


def decay_error(optimizer, decays, states):
    """Relative to the deviations after 384 steps, in which `b` loses a third to the decay."""
    run = long_run(optimizer, decays=decays, num_steps=384, states=tuple(states), rate=0.0025)
    found, expected, _ = through(run, random_rows(), masks=MASKS[1:3])
    return float((found[0] - expected[0]).norm() / expected[0].norm())


def test_decoupled_decay_that_differs_is_split_to_second_order():
    """Half of a segment's decay before it, half after: the error of half as long segments tends to a quarter."""
    coarse, fine, finest = (decay_error("adamw", (0.0, 0.5), range(0, 385, every)) for every in (96, 48, 24))
    assert coarse < 0.002
    assert fine < coarse / 2.8 and finest < fine / 2.8
    assert decay_error("adamw", (0.5, 0.5), (0, 384)) < EXACT


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_coupled_decay_that_differs_is_held_at_the_start_of_pieces(optimizer, monkeypatch):
    """Of first order in how much an element loses in a piece."""
    errors = []
    for most in (0.4, 0.2, segments_module.MAX_FROZEN_DECAY):
        monkeypatch.setattr(segments_module, "MAX_FROZEN_DECAY", most)
        errors.append(decay_error(optimizer, (0.0, 0.5), (0, 384)))
    assert errors[1] < 0.65 * errors[0] and errors[2] < 0.65 * errors[1]
    assert errors[2] < 0.01


def test_pieces_cover_a_segment_and_are_bounded(monkeypatch):
    run = long_run("adam", decays=(0.0, 5.0), num_steps=96, states=(0, 96))
    whole = [(0, 0, 48), (96, 48, 96)]
    segments = segments_of(path_of(run))
    for state, first, last in whole:
        own = [segment for segment in segments if segment.state == state]
        assert len(own) == segments_module.MAX_PIECES
        assert own[0].first == first and own[-1].last == last
        assert all(a.last == b.first for a, b in zip(own, own[1:], strict=False))
    monkeypatch.setattr(segments_module, "MAX_PIECES", 1)
    assert [(s.state, s.first, s.last) for s in segments_of(path_of(run))] == whole


def test_elements_without_a_moment_do_not_bend_others():
    """An element that never had a gradient stays, and its entries in the curvature's rows count for nothing."""
    run = long_run("adamw", still=(2,))
    curvature = random_rows()
    blind = CurvatureRows(curvature.rows.clone(), curvature.clusters)
    blind.rows[:, 2] = 0
    for segment in segments_of(path_of(run)):
        begin = [vectors(2, seed=seed) for seed in (1, 2, 3)]
        ends = [SegmentMap(segment, own).forward(*begin, MASKS[:2]) for own in (curvature, blind)]
        torch.testing.assert_close(ends[0][0], ends[1][0], atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(ends[0][0][:, 2], begin[0][:, 2])


def test_logistic_regression_in_closed_form():
    """Gradient descent without momentum on one direction: `delta_T = -f (1 - (1 - h c)^T) / c`."""
    run = long_run("sgd", momentum=0.0, states=(0, 24))
    curvature = CurvatureRows(torch.zeros(1, NUM_PARAMETERS, dtype=torch.float64), torch.zeros(1).long())
    curvature.rows[0, 3] = 0.9
    segment = segments_of(path_of(run))[0]
    zero, force = torch.zeros(1, NUM_PARAMETERS).double(), vectors(1)
    masks = torch.tensor([[0.5, 1, 1]]).double()
    rates = run.steps.learning_rates[segment.first : segment.last, 0]
    bent = 0.5 * 0.9**2
    expected = -force * rates.sum()
    expected[0, 3] = -force[0, 3] * (1 - np.prod(1 - rates * bent)) / bent
    found, _ = SegmentMap(segment, curvature).forward(zero, zero, force, masks)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


class TestCap:
    """Directions whose curvature would make the recorded steps themselves explode."""

    @pytest.fixture(autouse=True)
    def capped(self, no_cap, monkeypatch):
        monkeypatch.undo()

    def stiff(self, factor):
        """Three directions of their own, the first of which is so many times too stiff."""
        run = long_run("sgd", num_steps=80, states=(0, 80))
        segment = segments_of(path_of(run))[0]
        limit = segment.stable_curvature / float(segment.precondition)
        rows = torch.zeros(3, NUM_PARAMETERS, dtype=torch.float64)
        for index, curvature in enumerate((factor * limit, 0.3 * limit, 0.01 * limit)):
            rows[index, index] = curvature**0.5
        return segment, CurvatureRows(rows, torch.arange(3))

    def test_too_stiff_a_direction_neither_explodes_nor_changes_others(self, monkeypatch):
        segment, curvature = self.stiff(3.0)
        begin = [vectors(1, seed=seed) for seed in (1, 2, 3)]
        ones = torch.ones(1, NUM_CLUSTERS).double()
        capped = SegmentMap(segment, curvature).forward(*begin, ones)
        end = SegmentMap(segment, curvature).backward(vectors(1, seed=4), vectors(1, seed=5))
        monkeypatch.setattr(Segment, "stable_curvature", float("inf"))
        wild = SegmentMap(segment, curvature).forward(*begin, ones)
        wild_end = SegmentMap(segment, curvature).backward(vectors(1, seed=4), vectors(1, seed=5))
        for found, other in [*zip(capped, wild, strict=True), *zip(end, wild_end, strict=True)]:
            assert found[0, 0].abs() < 20 < 1e3 < other[0, 0].abs()
            torch.testing.assert_close(found[0, 1:], other[0, 1:], atol=1e-9, rtol=1e-9)

    def test_what_is_stable_is_left_alone(self, monkeypatch):
        segment, curvature = self.stiff(0.9)
        segment_map = SegmentMap(segment, curvature)
        rows, gram = segment_map._stable(1.0)
        assert rows is curvature.rows and gram is segment_map._gram
        rows, gram = segment_map._stable(2.0)
        assert float(torch.linalg.eigvalsh(gram)[-1]) == pytest.approx(segment.stable_curvature / 2, rel=1e-6)
        torch.testing.assert_close((rows * segment.precondition) @ rows.T, gram, atol=1e-9, rtol=1e-6)

    def test_weights_above_one_are_counted(self):
        segment, curvature = self.stiff(0.9)
        begin = [vectors(1, seed=seed) for seed in (1, 2, 3)]
        heavy, _ = SegmentMap(segment, curvature).forward(*begin, torch.full((1, 3), 3.0).double())
        assert heavy.abs().max() < 20


def test_a_segment_of_skipped_steps_does_nothing():
    run = long_run("sgd", skipped=tuple(range(6)))
    first = segments_of(path_of(run))[0]
    assert first.steps == () and first.precondition.tolist() == [0.0]
    assert dataclasses.replace(first, first=0).stable_curvature == float("inf")
