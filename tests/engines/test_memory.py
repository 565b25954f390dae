"""Scores do not depend on the memory that is allowed, and less memory is taken where less is allowed."""

from __future__ import annotations

import numpy as np
import pytest

from hf_rgm import Attributor
from hf_rgm.engines import gradient_sources as sources
from hf_rgm.engines.memory_shares import MemoryShares
from hf_rgm.engines.recorded_run import MAX_RANK
from hf_rgm.model.peak_memory import PeakTensors
from hf_rgm.testing import tiny_recorded_run, tiny_synset

RUN = tiny_recorded_run()
NUM_PARAMETERS = RUN.model.num_parameters()
ROW_BYTES = 4 * NUM_PARAMETERS


def attributed(max_memory, **options):
    attributor = Attributor(RUN.model, tiny_synset(), max_memory=max_memory, disable_tqdm=True)
    with PeakTensors() as memory:
        result = attributor.attribute(RUN.queries.select(range(3)), **options)
    return result, memory.peak_bytes


@pytest.mark.parametrize("with_rows", [False, True])
def test_no_more_is_given_out_than_there_is(with_rows):
    shares = MemoryShares.of(1_600, with_rows=with_rows)
    assert sum(vars(shares).values()) == 1_600
    assert (shares.kept > 0) == with_rows
    assert shares.curvature == max(vars(shares).values())
    without = MemoryShares.of(1_600, with_rows=with_rows, with_curvature=False)
    assert sum(vars(without).values()) == 1_600
    assert without.vectors == shares.vectors + shares.curvature
    assert without.curvature == 0


@pytest.mark.parametrize(
    ("little", "options"),
    [
        ("220KB", {}),
        ("220KB", {"engine": "adjoint"}),
        ("30KB", {"engine": "replay", "num_masks": 40}),
        ("420KB", {"rows": RUN.train_dataset, "rewind": 0.8}),
        ("420KB", {"engine": "adjoint", "rows": RUN.train_dataset, "rewind": 0.8}),
    ],
    ids=["linearised", "adjoint", "replay", "linearised with rows", "adjoint with rows"],
)
def test_little_memory_gives_the_same_scores(little, options):
    """
    As long as there is a row of the curvature for each of its terms; models, queries and rows go in parts.

    Sums are then in another order: float32 tolerance, times some hundred steps.
    """
    plenty, most = attributed("1GB", **options)
    tight, least = attributed(little, **options)
    np.testing.assert_allclose(tight.scores, plenty.scores, rtol=2e-4, atol=2e-6)
    if plenty.row_scores is not None:
        np.testing.assert_allclose(tight.row_scores, plenty.row_scores, rtol=2e-4, atol=2e-6)
    assert least < most


@pytest.mark.parametrize(("little", "options"), [("60KB", {}), ("120KB", {"rows": RUN.train_dataset})])
def test_with_less_the_curvature_is_a_random_choice_of_its_rows(little, options):
    plenty, most = attributed("1GB", **options)
    tight, least = attributed(little, **options)
    assert least < most / 2
    assert not np.array_equal(tight.scores, plenty.scores)
    assert np.corrcoef(tight.scores.ravel(), plenty.scores.ravel())[0, 1] > 0.9
    again, _ = attributed(little, **options)
    np.testing.assert_array_equal(again.scores, tight.scores)


@pytest.mark.parametrize("engine", ["linearized_replay", "adjoint"])
@pytest.mark.parametrize("rows", [None, RUN.train_dataset], ids=["synset", "rows"])
@pytest.mark.parametrize("objective", ["margin", "accuracy"])
def test_too_little_for_any_curvature_is_told_before_the_rows_are_read(engine, rows, objective, monkeypatch):
    monkeypatch.setattr(sources, "cluster_gradients", lambda *_: pytest.fail("the rows were read"))
    if objective == "accuracy" and engine == "adjoint":
        return
    attributor = Attributor(RUN.model, tiny_synset(), max_memory="40KB", disable_tqdm=True)
    with pytest.raises(ValueError, match=r"`max_memory` leaves room for \d+ rows of curvature of 163 parameters"):
        attributor.attribute(RUN.queries, engine=engine, rows=rows, objective=objective)


def test_rows_of_curvature_are_as_many_as_fit():
    run = Attributor(RUN.model, tiny_synset(), max_memory="100KB")._runs(None, None)[0]
    assert run.rank == (100_000 - 8 * 6 * NUM_PARAMETERS) * 10 // 16 // (2 * ROW_BYTES)
    assert Attributor(RUN.model, tiny_synset())._runs(None, None)[0].rank == MAX_RANK[True]


def test_where_not_even_the_states_fit_the_way_out_is_named():
    num_states = len(tiny_synset().trajectory.state_steps)
    num_parameters = sum(parameter.numel() for parameter in RUN.model.parameters())
    fitting = 8 * num_states * num_parameters // 1000
    told = f"`max_memory='{fitting}KB'` is too little for {num_states} states of {num_parameters} parameters.*LoRA"
    with pytest.raises(ValueError, match=told):
        Attributor(RUN.model, tiny_synset(), max_memory=f"{fitting}KB")
    Attributor(RUN.model, tiny_synset(), max_memory=f"{fitting + 1}KB")
    with pytest.raises(ValueError, match="`max_memory` must be a size such as '4GB'"):
        Attributor(RUN.model, tiny_synset(), max_memory="much")
