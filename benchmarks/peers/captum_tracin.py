"""captum's TracInCP: inner products of gradients at recorded states, times the learning rate there."""

from __future__ import annotations

import time

import numpy as np
from datasets import Dataset
from torch import nn

from benchmarks.peers.common import (
    Logits,
    as_tensors,
    load_peer,
    loader,
    negative_objective,
    num_bytes,
    prediction,
    summed_loss,
)
from benchmarks.recorded import Method, Prediction, Recorded
from hf_rgm.synset.inputs import TOKENS
from hf_rgm.trajectory.trajectory import Trajectory

BATCH_SIZE = 256


def tracin(num_checkpoints: int | None = None) -> Method:
    """
    TracInCP over recorded states.

    captum takes a checkpoint's learning rate from what its load function returns, and 1.0 from its default one. The
    initial state is left out: the states are ends of steps. Gradients are those of linear and convolutional layers:
    embeddings and layer norms are left out, of tied embeddings only their use as the head counts.

    Args:
        num_checkpoints (`int`, *optional*): States, evenly chosen, the last one always; all by default.
    """

    def run(recorded: Recorded, queries: Dataset) -> Prediction:
        influence = load_peer("captum.influence")
        trajectory = Trajectory.load(recorded.folder)
        steps = [step for step in trajectory.state_steps if step > 0]
        count = min(num_checkpoints or len(steps), len(steps))
        chosen = [steps[i] for i in np.linspace(len(steps) - 1, 0, count).round().astype(int)]
        parameters = {step: trajectory.state(step).parameters for step in chosen}

        def load_checkpoint(model: nn.Module, step: int) -> float:
            model.load_state_dict(model.checkpoint(parameters[step]))
            return float(trajectory.steps.learning_rates[step - 1].mean())

        train, tests = (as_tensors(part, recorded.model) for part in (recorded.task.train, queries))
        start = time.process_time()
        model = Logits(recorded.model)
        if model.input_name == TOKENS:
            model.model.enable_input_require_grads()  # captum's hooks fail on layers whose inputs need no gradient
        peer = influence.TracInCP(
            model,
            loader(train, BATCH_SIZE),
            checkpoints=chosen,
            checkpoints_load_func=load_checkpoint,
            layers=model.trained_layers(),
            loss_fn=summed_loss,
            test_loss_fn=negative_objective(recorded.task.objective),
            sample_wise_grads_per_batch=True,
        )
        scores = peer.influence(loader(tests, BATCH_SIZE))
        return prediction(
            recorded,
            scores,
            offline_seconds=0.0,
            online_seconds=time.process_time() - start,
            kept_bytes=sum(num_bytes(values.values()) for values in parameters.values()),
            num_checkpoints=count,
        )

    return run
