"""Responses for tests: random deviations in the place of what training without a cluster would change."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hf_rgm import Synset
from hf_rgm.synset.responses import RESPONSES_FILE, Responses
from hf_rgm.testing import tiny_synset
from tests.hub.hostile.edits import set_json

REWIND_STEP = 10


def tiny_deviations() -> Tensor:
    """`(num_clusters, num_parameters)` of the tiny synset, of sizes from 1e-4 to 1e2."""
    synset = tiny_synset()
    sizes = [math.prod(shape) for shape in synset.trajectory.parameter_shapes.values()]
    generator = torch.Generator().manual_seed(3)
    powers = torch.linspace(-4, 2, synset.num_clusters)[:, None]
    return torch.randn(synset.num_clusters, sum(sizes), generator=generator) * 10**powers


def tiny_responses(precision: str = "int8") -> Responses:
    """The deviations, rounded."""
    shapes = tiny_synset().trajectory.parameter_shapes
    return Responses.encode(tiny_deviations(), shapes, precision, rewind_step=REWIND_STEP)


def with_responses(precision: str = "int8") -> Synset:
    """The tiny synset with them."""
    return replace(tiny_synset(), responses=tiny_responses(precision))


def add_responses(folder: Path, precision: str = "int8") -> None:
    """Adds them to the folder of the tiny synset."""
    responses = tiny_responses(precision)
    responses.write(folder / RESPONSES_FILE, tiny_synset().parameters_sha256)
    set_json("synset.json", ("responses",), responses.describe())(folder)
