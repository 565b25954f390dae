"""The whole path on sound and on plain tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    set_seed,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_rgm import Attributor, ClusterMap, DistillationConfig, ReverseGradientMatchingDistiller
from tests.training import recorded_model


class Table(nn.Module):
    """Two layers on the columns of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, features, labels=None):
        logits = self.layers(features)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def wav2vec2():
    return Wav2Vec2ForSequenceClassification(
        Wav2Vec2Config(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=12,
            conv_dim=(4, 4),
            conv_stride=(4, 2),
            conv_kernel=(8, 4),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            classifier_proj_size=6,
            num_labels=3,
            mask_time_prob=0.0,
        )
    )


def ast():
    return ASTForAudioClassification(
        ASTConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=12,
            patch_size=4,
            frequency_stride=4,
            time_stride=4,
            max_length=8,
            num_mel_bins=8,
            num_labels=3,
        )
    )


MODELS = {
    "table": (Table, "features", (5,)),
    "spectrogram": (ast, "input_values", (8, 8)),
    "waveform": (wav2vec2, "input_values", (160,)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_whole_path(kind, tmp_path):
    make, name, shape = MODELS[kind]
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(24) % 3
    values = torch.randn(24, *shape, generator=generator) + labels.reshape(-1, *[1] * len(shape))
    dataset = Dataset.from_dict({name: values.numpy(), "labels": labels.numpy()}).with_format("torch")
    set_seed(0)
    model = recorded_model(make(), dataset, tmp_path, num_states=4, num_train_epochs=8)
    clusters = ClusterMap.from_ids(labels.numpy())
    errors = []
    for iterations in (1, 60):
        config = DistillationConfig(samples_per_cluster=2, num_iterations=iterations)
        synset = ReverseGradientMatchingDistiller(
            model, tmp_path / "trajectory", dataset, clusters, config=config, disable_tqdm=True
        ).distill()
        errors.append(synset.matching_error)
    assert errors[1] < 0.7 * errors[0]
    assert synset.input_name == name
    result = Attributor(model, synset, disable_tqdm=True).attribute(
        dataset.select(range(3)), engine="adjoint", rows=dataset, rewind=0.5
    )
    np.testing.assert_allclose(
        result.row_scores @ np.eye(3)[clusters.cluster_ids], result.scores, rtol=1e-3, atol=1e-6
    )
