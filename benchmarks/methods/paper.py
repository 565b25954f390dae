"""
The plain forms of the paper (Ye et al., "Distilled Datamodel with Reverse Gradient Matching", CVPR 2024).

Both perturb a model for every question: without one cluster for leave-cluster-out, without the others for a subset.
Both use a synset that matches gradients only, as the paper does (our distiller can match curvature too), but are given
our distiller: every state counts by its own gradient energy, targets and weights are learned beside the pictures.
"""

from __future__ import annotations

import time
from unittest.mock import patch

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from benchmarks.methods.ours import replay
from benchmarks.methods.plain_replay import PlainReplayEngine
from benchmarks.recorded import Method, Prediction, Recorded
from benchmarks.truth import LOGITS
from hf_rgm import DistillationConfig, Synset
from hf_rgm.engines.objectives import Objective, Queries, resolve_objective
from hf_rgm.engines.perturbations import leave_one_out
from hf_rgm.engines.registry import ENGINES
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.row_reader import RowReader
from hf_rgm.synset.inputs import SPACES, input_space
from hf_rgm.synset.samples import soft_cross_entropies


def ascent(samples_per_cluster: int, *, num_steps: int, learning_rate: float, **distillation) -> Method:
    """
    Gradient ascent from the trained parameters on the synthetic samples of what is absent.

    `theta <- theta + learning_rate * grad sum over absent k of sum_j exp(w_kj) CE_kj`, `num_steps` times, for each
    cluster alone and for the absent half of each subset: plain ascent, without the recorded optimizer's moments and
    without the clusters that stay. The score is f(trained) - f(ascended).

    Differs from the paper, whose step counts and rates belong to its own networks, in that both come from a grid.
    """

    def run(recorded: Recorded, queries: Dataset) -> Prediction:
        config = DistillationConfig(samples_per_cluster=samples_per_cluster, **distillation)
        synset, seconds = recorded.synset(config)
        start = time.process_time()
        model = FunctionalModel(recorded.model)
        reader = RowReader(queries, model, what="queries")
        batch = Queries(*reader.batch(range(len(reader))))
        objective = resolve_objective(recorded.task.objective)

        def ascended(masks: Tensor, what: Objective) -> np.ndarray:
            """Values under each mask: `(num_masks, num_values)`."""
            parameters = (_ascend(model, synset, mask < 0.5, num_steps, learning_rate) for mask in masks)
            return np.stack([what.values(model, values, batch).numpy() for values in parameters])

        unperturbed = objective.values(model, model.space.flatten(model.parameters()), batch).numpy()
        scores = (unperturbed - ascended(leave_one_out(synset.num_clusters), objective)).T
        scored = time.process_time()
        masks = recorded.task.cluster_masks()
        subsets = ascended(_as_weights(masks), objective).T
        subset_seconds = time.process_time() - scored
        return Prediction(
            scores,
            cluster_subset_values=subsets,
            outputs={
                part: ascended(_as_weights(chosen), LOGITS).reshape(len(chosen), len(batch), -1)
                for part, chosen in recorded.task.distance_masks().items()
            },
            offline_seconds=seconds,
            online_seconds=scored - start,
            model_seconds=subset_seconds / len(masks),
            details={
                "matching_error": synset.matching_error,
                "kept_bytes": sum(tensor.nbytes for tensor in synset.samples.named_tensors().values()),
            },
        )

    return run


def _as_weights(masks: np.ndarray) -> Tensor:
    return torch.from_numpy(masks.astype(np.float32))


def _ascend(model: FunctionalModel, synset: Synset, absent: Tensor, num_steps: int, learning_rate: float) -> Tensor:
    """Parameters after the ascent: `(num_parameters,)`."""
    samples = synset.samples[absent].flatten()
    inputs = input_space(model, synset.input_name if synset.input_name in SPACES else "auto")
    parameters = model.parameters()
    for _ in range(num_steps):
        leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        logits = model.logits(leaves, inputs.to_forward(samples))
        loss = soft_cross_entropies(logits, samples.targets, samples.log_weights, samples.target_ids).sum()
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        parameters = {
            name: value.detach() + learning_rate * gradient
            for (name, value), gradient in zip(leaves.items(), gradients, strict=True)
        }
    return model.space.flatten(parameters)


def matched(samples_per_cluster: int, **distillation) -> Method:
    """
    DDM-match: training from scratch on the synset without what is absent.

    From the recorded run's initial parameters, with its optimizer, learning rates and number of steps, on all
    remaining synthetic samples at once: plain replay from step 0, halves weighted up as for our own. The score is
    f(all clusters) - f(without the cluster), both trained on the synset.

    Differs from the paper in that gradients are matched at states of the recorded run other than the initial one
    rather than along fresh trainings, in the distiller's own order, last states first; only from the middle of the
    iterations on are all states matched alike. The paper starts from random parameters; these are the recorded run's
    own, which favours the method.
    """
    settings = {"samples_per_cluster": samples_per_cluster, **distillation}
    method = replay(engine=PlainReplayEngine.name, distillation=settings, rewind=0.0)

    def run(recorded: Recorded, queries: Dataset) -> Prediction:
        with patch.dict(ENGINES, {PlainReplayEngine.name: PlainReplayEngine}):
            return method(recorded, queries)

    return run


METHODS: dict[str, dict[str, Method]] = {
    "ascent": {
        f"{num_steps} steps of {rate:g}": ascent(5, num_steps=num_steps, learning_rate=rate)
        for num_steps in (1, 5)
        for rate in (0.001, 0.01, 0.1)
    },
    # Labelled as in the results of the time when tau weighed a match of the summed gradient.
    "DDM-match": {"tau 0": matched(5)},
}
