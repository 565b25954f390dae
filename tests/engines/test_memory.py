"""Scores do not depend on the memory that is allowed, and less memory is taken where less is allowed."""

from __future__ import annotations

import numpy as np
import pytest

from hf_rgm import Attributor
from hf_rgm.engines.memory import MemoryShares
from hf_rgm.synset.memory import PeakTensors
from hf_rgm.testing import tiny_recorded_run, tiny_synset

RUN = tiny_recorded_run()
JACOBIAN_BYTES = 4 * 6 * 5 * 3 * 171
"""Clusters, samples, classes, parameters."""


def attributed(max_memory, **options):
    attributor = Attributor(RUN.model, tiny_synset(), max_memory=max_memory, disable_tqdm=True)
    with PeakTensors() as memory:
        result = attributor.attribute(RUN.queries.select(range(3)), **options)
    return result, memory.peak_bytes


@pytest.mark.parametrize("with_rows", [False, True])
def test_no_more_is_given_out_than_there_is(with_rows):
    shares = MemoryShares.of(1_600, with_rows=with_rows)
    assert sum(vars(shares).values()) == 1_600
    assert (shares.row_jacobian > 0) == (shares.kept > 0) == with_rows
    assert shares.jacobian == max(vars(shares).values())
    without = MemoryShares.of(1_600, with_rows=with_rows, with_jacobians=False)
    assert sum(vars(without).values()) == 1_600
    assert without.vectors == shares.vectors + shares.jacobian + shares.row_jacobian
    assert without.jacobian == without.row_jacobian == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"engine": "adjoint"},
        {"engine": "replay"},
        {"rows": RUN.train_dataset, "rewind": 0.8},
        {"engine": "adjoint", "rows": RUN.train_dataset, "rewind": 0.8},
    ],
    ids=["linearised", "adjoint", "replay", "linearised with rows", "adjoint with rows"],
)
def test_little_memory_gives_the_same_scores(options):
    """Other parts go together, so sums are in another order: float32 tolerance, times some hundred steps."""
    plenty, most = attributed("1GB", **options)
    tight, least = attributed("30KB", **options)
    np.testing.assert_allclose(tight.scores, plenty.scores, rtol=2e-4, atol=2e-6)
    if plenty.row_scores is not None:
        np.testing.assert_allclose(tight.row_scores, plenty.row_scores, rtol=2e-4, atol=2e-6)
    assert least < most
    if not options:
        assert most > JACOBIAN_BYTES


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
