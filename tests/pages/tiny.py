"""An exhibit of the tiny run, everything at hand."""

from __future__ import annotations

import functools

from hf_rgm import Attributor
from hf_rgm.pages.exhibit import Exhibit
from hf_rgm.testing import tiny_recorded_run, tiny_synset


@functools.cache
def tiny_exhibit() -> Exhibit:
    """Twelve queries by six clusters, scored with the training rows."""
    run = tiny_recorded_run()
    attributor = Attributor(run.model, tiny_synset(), disable_tqdm=True)
    result = attributor.attribute(run.queries, rows=run.train_dataset)
    return Exhibit(result, rows=run.train_dataset, queries=run.queries, attributor=attributor)
