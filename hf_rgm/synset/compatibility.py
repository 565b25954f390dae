"""Whether a model can be asked about synthetic samples at all, and whether it is worth it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_rgm.artefacts import printable
from hf_rgm.modeling import FunctionalModel
from hf_rgm.synset.inputs import InputSpace
from hf_rgm.synset.samples import SyntheticSamples
from hf_rgm.synset.states import MatchedState

logger = logging.getLogger(__name__)


def check_samples(model: FunctionalModel, inputs: InputSpace, samples: SyntheticSamples) -> None:
    """
    Tries the model on one synthetic sample.

    Token ids are compared with the vocabulary first: on a GPU an id out of range would end the process.

    Args:
        model (`FunctionalModel`): The trained model.
        inputs (`InputSpace`): The space of the synthetic inputs.
        samples (`SyntheticSamples`): Samples of every cluster.

    Raises:
        ValueError: If the model does not take the samples, or their targets are not its labels.
    """
    ids = samples.input_ids
    if ids is not None and int(ids.max()) >= model.vocabulary_size:
        raise ValueError(
            f"The synset has token {int(ids.max())}, but the model's vocabulary has {model.vocabulary_size}. It is "
            "not a synset of this model."
        )
    flat = samples[:1].flatten()
    one = flat[:1]
    try:
        with torch.no_grad():
            logits = model.logits(model.parameters(), inputs.to_forward(one))
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        shape = tuple(one.inputs.shape[1:])
        raise ValueError(
            f"The model does not take the synset's samples, `{inputs.name}` of shape {shape} "
            f"({printable(str(error))[:300]}). It is not a synset of this model."
        ) from error
    num_labels = logits.shape[-1]
    targets = one.targets.shape[-1] if samples.target_ids is None else int(samples.target_ids.max()) + 1
    fits = targets == num_labels if samples.target_ids is None else targets <= num_labels
    if logits.shape[:-1] != one.log_weights.shape or not fits:
        raise ValueError(
            f"The synset's samples have {targets} labels at positions {tuple(one.log_weights.shape[1:])}, the model "
            f"gives logits of shape {tuple(logits.shape[1:])}. It is not a synset of this model."
        )


def warn_unless_matched(matched_states: Sequence[MatchedState], matching_errors: Tensor) -> None:
    """
    Warns where most clusters' synthetic gradients are no nearer to the data's than none at all would be.

    Args:
        matched_states (`Sequence[MatchedState]`): The states that were matched.
        matching_errors (`Tensor`): `(num_matched_states, num_clusters)`, relative squared errors.
    """
    for matched, residuals in zip(matched_states, matching_errors, strict=True):
        if float(residuals.median()) >= 1:
            logger.warning(
                "At %s the synthetic samples of most clusters match the data's gradients no better than no samples "
                "would (relative squared error %.3g): scores will be noise. Distil again with more "
                "`samples_per_cluster` or `num_iterations`, or record a run with a lower learning rate.",
                matched,
                float(residuals.median()),
            )
            return
