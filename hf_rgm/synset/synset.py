"""The synset: a few synthetic samples per cluster that stand for the training data."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_rgm.clusters.cluster_map import ClusterMap
from hf_rgm.exceptions import ParameterMismatchError
from hf_rgm.files.reading import ArtefactFolder, shortened
from hf_rgm.files.writing import staged_folder
from hf_rgm.hub.artefact import CardOptions, DatasetArtefact
from hf_rgm.model.functional_model import FunctionalModel, parameters_sha256
from hf_rgm.synset.compatibility import other_function
from hf_rgm.synset.inputs import SOFT_TOKENS
from hf_rgm.synset.matched_states import MatchedState
from hf_rgm.synset.responses import Responses
from hf_rgm.synset.samples import SyntheticSamples
from hf_rgm.synset.synset_files import CONFIG_FILE, FILES, read_synset, synset_card, with_pictures, write_synset
from hf_rgm.trajectory.trajectory import Trajectory

logger = logging.getLogger(__name__)


@dataclass(repr=False)
class Synset(DatasetArtefact):
    """
    A distilled training set, with the clusters and the recorded run that its use needs.

    Args:
        samples (`SyntheticSamples`): Inputs `(num_clusters, samples_per_cluster, *input_shape)`, target logits
            `(num_clusters, samples_per_cluster, *positions, num_labels)`, log-weights
            `(num_clusters, samples_per_cluster, *positions)`, all float32.
        clusters (`ClusterMap`): Which training row belongs to which cluster.
        trajectories (`tuple[Trajectory, ...]`): The recorded training runs, saved without row ids. The first trained
            the synset's model, others repeat it with other seeds.
        residuals (`Tensor`): `(num_matched_states, num_clusters)`, float32, relative squared matching error
            `|g_k - G_k|^2 / |G_k|^2`.
        matched_states (`tuple[MatchedState, ...]`): Run and training step of the matched states, in training order.
        parameters_sha256 (`str`): Identity of the trained parameters.
        input_name (`str`): Forward argument the inputs are for.
        config (`dict`): The `DistillationConfig` that was used.
        metadata (`dict`, *optional*): Model id, dataset fingerprint, seconds, library versions.
        fidelity (`dict`, *optional*): [`~hf_rgm.FidelityReport.to_dict`] of this synset, kept in `synset.json` and
            shown on the card.
        responses (`Responses`, *optional*): Changes of the trained parameters if a cluster is left out. Those of a
            loaded synset are read, or downloaded from the Hub, when they are decoded.

    Raises:
        ValueError: If the parts do not belong together, or samples are NaN or infinite.

    Example:

    ```python
    >>> from hf_rgm import Synset
    >>> from hf_rgm.testing import tiny_synset
    >>> synset = tiny_synset()
    >>> _ = synset.save_pretrained("my-synset")
    >>> Synset.from_pretrained("my-synset").num_samples == synset.num_samples
    True

    ```
    """

    marker: ClassVar = CONFIG_FILE
    files: ClassVar = FILES
    kind: ClassVar = "synset"

    samples: SyntheticSamples
    clusters: ClusterMap
    trajectories: tuple[Trajectory, ...]
    residuals: Tensor
    matched_states: tuple[MatchedState, ...]
    parameters_sha256: str
    input_name: str
    config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    fidelity: dict[str, Any] | None = None
    responses: Responses | None = None

    def __post_init__(self) -> None:
        inputs, targets, log_weights = self.samples.tensors()
        matched = (len(self.matched_states), self.clusters.num_clusters)
        for name, tensor in self.samples.named_tensors().items():
            if tensor.shape[0] != self.clusters.num_clusters:
                raise ValueError(
                    f"Synset {name} hold {tensor.shape[0]} clusters, but the cluster map has "
                    f"{self.clusters.num_clusters}. The files do not belong together."
                )
            if not torch.isfinite(tensor).all():
                bad = torch.nonzero(~torch.isfinite(tensor).flatten(1).all(1)).flatten().tolist()
                raise ValueError(
                    f"Synset {name} are NaN or infinite in clusters {[self.clusters.names[k] for k in bad[:5]]}. "
                    "Distil again with lower learning rates."
                )
        if inputs.shape[:2] != log_weights.shape[:2] or targets.shape[:-1] != log_weights.shape:
            raise ValueError(
                f"Synset inputs {tuple(inputs.shape)}, targets {tuple(targets.shape)} and log_weights "
                f"{tuple(log_weights.shape)} do not belong together: they hold different numbers of samples."
            )
        for name, learned in (("input_ids", inputs), ("target_ids", targets)):
            ids = getattr(self.samples, name)
            if ids is not None and (ids.shape != learned.shape or ids.is_floating_point() or bool((ids < 0).any())):
                raise ValueError(
                    f"Synset {name} {tuple(ids.shape)}, {ids.dtype}, do not belong to logits {tuple(learned.shape)}: "
                    "they must be the integers, not negative, that these choose from. Copy or distil it again."
                )
        if (self.samples.input_ids is None) == (self.input_name == SOFT_TOKENS):
            raise ValueError(
                f"The synset's inputs are `{self.input_name}`, but it holds "
                f"{'no' if self.samples.input_ids is None else 'its own'} input_ids. Copy or distil it again."
            )
        if not self.input_name.isidentifier():
            raise ValueError(f"`input_name` must be a forward argument, got {shortened(self.input_name)!r}.")
        if self.residuals.shape != matched:
            raise ValueError(
                f"Synset residuals have shape {tuple(self.residuals.shape)} for {matched[0]} matched states and "
                f"{matched[1]} clusters. The files do not belong together."
            )
        self._check_additions()

    def _check_additions(self) -> None:
        """Checks responses and fidelity, which are often set on a finished synset."""
        if self.responses is not None:
            self.responses.check_belongs(self)
        if self.fidelity is None:
            return
        if not isinstance(self.fidelity, dict):
            raise ValueError(
                f"`fidelity` must be a dictionary, got {type(self.fidelity).__name__}. Use `FidelityReport.to_dict()`."
            )
        measured = shortened(self.fidelity.get("samples_sha256"), 64)
        if measured != self.samples_sha256:
            raise ValueError(
                f"`fidelity` was measured for the samples {measured[:12]}, the synset's are "
                f"{self.samples_sha256[:12]}. Measure this synset, or set `fidelity` to None."
            )

    @property
    def trajectory(self) -> Trajectory:
        """The recorded run of the synset's model."""
        return self.trajectories[0]

    @property
    def num_clusters(self) -> int:
        """Number of clusters."""
        return self.clusters.num_clusters

    def __repr__(self) -> str:
        return (
            f"Synset({self.num_samples} samples for {self.clusters.num_rows} rows in {self.num_clusters} clusters, "
            f"{len(self.trajectories)} recorded run(s), matching error {self.matching_error:.3g})"
        )

    @property
    def num_samples(self) -> int:
        """Number of synthetic samples."""
        return self.samples.log_weights.shape[:2].numel()

    @property
    def matching_error(self) -> float:
        """Relative squared matching error, mean over clusters and matched states."""
        return float(self.residuals.mean())

    @property
    def samples_sha256(self) -> str:
        """Identity of the synthetic samples."""
        return parameters_sha256(self.samples.named_tensors())

    @property
    def model_description(self) -> dict[str, Any]:
        """The recorded run's description of the model: `class`, `name_or_path` and `commit_hash`, as far as known."""
        described = self.trajectory.metadata.get("model")
        return dict(described) if isinstance(described, dict) else {}

    def check_model(self, model: FunctionalModel, *, force: bool = False) -> None:
        """Raises a [`ParameterMismatchError`], or warns with `force`, unless the synset belongs to the model."""
        parameters = model.parameters()
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        if shapes != self.trajectory.parameter_shapes:
            other = next(name for name, shape in shapes.items() if self.trajectory.parameter_shapes[name] != shape)
            raise ParameterMismatchError(
                f"The synset belongs to a model whose {other!r} has shape {self.trajectory.parameter_shapes[other]}, "
                f"the model's has {shapes[other]}. Load the model that was recorded."
            )
        found = parameters_sha256(parameters)
        frozen = self.metadata.get("frozen_sha256")
        if found != self.parameters_sha256:
            message = (
                f"The synset belongs to trained parameters {self.parameters_sha256[:12]}, but the model's are "
                f"{found[:12]}. Load the model that was recorded (the weights after training, in the dtype they were "
                "trained in), distil a synset for this one, or pass `force=True` to use them together anyway."
            )
        elif frozen is not None and frozen != model.frozen_sha256():
            message = (
                "The synset's trained parameters are the model's, but the parameters that were not trained differ. "
                "Load the same base model (same revision, same dtype) under the trained part, or pass `force=True` to "
                "use them together anyway."
            )
        else:
            other = other_function(model, self.trajectory)
            if other is None:
                return
            message = f"{other} Load the model that was recorded, or pass `force=True` to use it anyway."
        if not force:
            raise ParameterMismatchError(message)
        logger.warning(message)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        state_precision: str | None = None,
        with_responses: bool = True,
        tokenizer: PreTrainedTokenizerBase | None = None,
        card: CardOptions | None = None,
    ) -> Path:
        """
        Writes the synset to a folder (safetensors, parquet, JSON and a card; replaces a synset already there).

        Args:
            save_directory (`str` or `Path`): The folder.
            state_precision (`str`, *optional*): `"float32"`, `"bfloat16"` or `"int8"` for the recorded states, but
                not for the last one, the trained model. Defaults to the precision they have.
            with_responses (`bool`, *optional*, defaults to `True`): Keep the responses, if there are any. A
                repository's earlier commits keep theirs.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): Adds the samples' nearest texts to the table that the
                Hub shows.
            card (`CardOptions`, *optional*): Licence, links or another template for the card.

        Returns:
            `Path`: The folder.

        Raises:
            FileExistsError: If the folder holds something else.
            ValueError: If `fidelity` is incomplete or of other samples, or the precision is unknown.
        """
        self._check_additions()
        kept = self if with_responses else replace(self, responses=None)
        text = synset_card(kept, card)
        frame = self.to_pandas()
        if tokenizer is not None:
            frame.insert(0, "text", self.texts(tokenizer))
        samples = with_pictures(frame, self.samples.inputs.flatten(0, 1))
        with staged_folder(save_directory, CONFIG_FILE) as folder:
            write_synset(kept, folder, text, samples=samples, state_precision=state_precision)
        return Path(save_directory)

    @classmethod
    def _from_folder(cls, folder: ArtefactFolder) -> Synset:
        arguments = read_synset(folder)
        try:
            return cls(**arguments)
        except ValueError as error:
            raise ValueError(f"The synset in {folder} is damaged: {error}") from error

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """
        Synthetic texts in words: the likeliest token at each position, or the one with the nearest embedding.

        Args:
            tokenizer (`PreTrainedTokenizerBase`): The model's.

        Returns:
            `list[str]`: One per sample, cluster by cluster. They give the right gradients, but read badly.

        Raises:
            ValueError: If the samples are not texts.
        """
        if self.metadata.get("tokens") is None:
            raise ValueError(f"The synset's samples are `{self.input_name}` without tokens: there is no text to read.")
        return [cast(str, tokenizer.decode(tokens)) for tokens in self.metadata["tokens"]]

    def to_pandas(self) -> pd.DataFrame:
        """
        Table of the synthetic samples: cluster, cluster size, most likely label (one per token for language models),
        weight, matching error and input.

        Returns:
            `pd.DataFrame`: One line per sample.
        """
        flat = self.samples.flatten()
        per_cluster = self.samples.log_weights.shape[1]
        cluster = torch.arange(self.num_clusters).repeat_interleave(per_cluster).tolist()
        likeliest = flat.targets.argmax(-1)
        if flat.target_ids is not None:
            likeliest = flat.target_ids.gather(-1, likeliest[..., None])[..., 0]
        tokens = self.metadata.get("tokens")
        return pd.DataFrame(
            {
                **({} if tokens is None else {"tokens": tokens}),
                "cluster": [self.clusters.names[k] for k in cluster],
                "cluster_size": [int(self.clusters.sizes[k]) for k in cluster],
                "label": likeliest.tolist(),
                "weight": flat.log_weights.exp().reshape(len(cluster), -1).sum(1).tolist(),
                "matching_error": [float(self.residuals[:, k].mean()) for k in cluster],
                self.input_name: [sample.flatten().tolist() for sample in flat.inputs],
            }
        )
