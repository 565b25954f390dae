from __future__ import annotations

import pytest
import torch

from hf_rgm import DistillationConfig
from hf_rgm.distillation.initialisation import initial_samples
from hf_rgm.distillation.privacy import measure_privacy
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.losses import CROSS_ENTROPY
from hf_rgm.model.row_reader import CachedBatches, RowReader
from hf_rgm.synset.inputs import ContinuousInputs, input_space
from hf_rgm.synset.samples import SyntheticSamples
from hf_rgm.synset.synset_files import privacy_section
from hf_rgm.testing import tiny_recorded_run, tiny_synset
from tests.text import classifier, texts

RUN = tiny_recorded_run()


def test_distances_are_those_of_a_loop():
    model = FunctionalModel(RUN.model)
    rows = [RUN.clusters.rows(k) for k in range(6)]
    batches = CachedBatches(RowReader(RUN.train_dataset, model), rows, batch_size=3)
    samples = tiny_synset().samples
    privacy = measure_privacy(ContinuousInputs(model), samples, batches)
    pixels = torch.stack([row["pixel_values"] for row in RUN.train_dataset])
    nearest = [
        min(float((sample - pixels[int(row)]).norm()) for row in rows[k])
        for k in range(6)
        for sample in samples.inputs[k]
    ]
    between = [
        min(float((pixels[int(a)] - pixels[int(b)]).norm()) for b in own if b != a) for own in rows for a in own
    ]
    assert privacy["distance"] == pytest.approx(float(torch.tensor(nearest).median()), rel=1e-5)
    assert privacy["row_distance"] == pytest.approx(float(torch.tensor(between).median()), rel=1e-5)
    typical = privacy["row_distance"]
    assert privacy["share_nearer"] == pytest.approx(sum(n < typical for n in nearest) / len(nearest))
    assert "kept_tokens" not in privacy
    assert tiny_synset().metadata["privacy"] == privacy


def text_parts(kind):
    model = FunctionalModel(classifier("bert"))
    rows = [torch.arange(24).numpy()[k::3] for k in range(3)]
    batches = CachedBatches(RowReader(texts(), model), rows, batch_size=5)
    space = input_space(model, kind, num_tokens=4, num_choices=5)
    config = DistillationConfig(samples_per_cluster=2)
    return space, initial_samples(batches, range(3), space, 3, CROSS_ENTROPY, config), batches


@pytest.mark.parametrize("kind", ["inputs_embeds", "soft_tokens"])
def test_samples_that_are_rows_keep_all_of_their_tokens(kind):
    space, samples, batches = text_parts(kind)
    privacy = measure_privacy(space, samples, batches)
    assert (privacy["kept_tokens"], privacy["num_tokens"]) == (4.0, 4)
    assert privacy["distance"] == pytest.approx(0, abs=1e-3) or kind == "soft_tokens"


def test_a_token_that_changed_is_not_kept():
    space, samples, batches = text_parts("soft_tokens")
    logits = samples.inputs.clone()
    logits[:, :, 1] = 0
    logits[:, :, 1, -1] = 9
    ids = samples.input_ids.clone()
    ids[:, :, 1, -1] = 1  # no row has it
    changed = SyntheticSamples(logits, samples.targets, samples.log_weights, input_ids=ids)
    assert measure_privacy(space, changed, batches)["kept_tokens"] == 3.0
    assert (space.tokens(changed.flatten())[:, 1] == 1).all()


def test_the_card_says_it_in_words():
    assert privacy_section(None).startswith("Not measured")
    text = privacy_section(
        {"distance": 1.234, "row_distance": 2.0, "share_nearer": 0.25, "kept_tokens": 2.5, "num_tokens": 16}
    )
    assert "nearest training row of its cluster is 1.23; that of a row to the nearest other row is 2." in text
    assert "25% of the samples" in text and "2.5 of a sample's 16 tokens" in text
    assert "guarantees nothing" in text
    assert "nearest other row" not in privacy_section({"distance": 1.0, "row_distance": None, "share_nearer": None})
