"""What the peers' adapters share: tensors, the objective, models of an ensemble, scores in our shape and sign."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from benchmarks.recorded import Prediction, Recorded
from hf_rgm.engines.objectives import Queries, resolve_objective
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.losses import IGNORED_LABEL
from hf_rgm.model.row_reader import RowReader
from hf_rgm.synset.inputs import TOKENS

INSTALL = (
    'pip install -c constraints.txt -e ".[bench]" && pip install -c constraints.txt --no-deps kronfluence '
    "(kronfluence asks for torchvision, which it does not use)"
)
FIRST_ENSEMBLE_SEED = 100
Value = TypeVar("Value")


def load_peer(module: str) -> ModuleType:
    """
    A peer's module.

    Raises:
        ImportError: If it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} cannot be imported ({error}). Install the peers with: {INSTALL}") from error


class Logits(nn.Module):
    """
    A copy of a Transformers or PEFT model as a function from its main input to logits, in evaluation mode.

    Attention is eager: peers take derivatives of gradients, and gradients of single rows. What is not trained (all but
    the adapters and the classifier, with LoRA) is a buffer, so that peers attribute to the trained parameters alone;
    tied parameters stay tied. GPT-2's `Conv1D`, which peers do not know, is an `nn.Linear` of transposed weights.

    Args:
        model (`PreTrainedModel`): The model; it is not touched.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        functional = FunctionalModel(model)
        self.model = functional.module
        self.input_name = functional.main_input_name
        self.is_causal = functional.shifts_labels
        self.transposed = _replace_conv1d(self.model)
        trained = {id(self.model.get_parameter(name)) for name in functional.space.names}
        for module in self.model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) in trained:
                    parameter.requires_grad_(True)
                else:
                    delattr(module, name)
                    module.register_buffer(name, parameter.detach())
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        if self.input_name != TOKENS:
            return self.model(**{self.input_name: inputs}).logits
        # In the form that attention adds to its scores: Transformers asks whether all of a plain mask is set, which
        # vmap cannot answer. It takes a mask of this form for the whole, and adds no causal one.
        visible = self.mask(inputs)[:, None, None, :]
        if self.is_causal:
            length = inputs.shape[1]
            visible = visible & torch.ones(length, length, dtype=torch.bool, device=inputs.device).tril()
        hidden = torch.finfo(torch.float32).min * ~visible
        return self.model(input_ids=inputs, attention_mask=hidden).logits

    def mask(self, tokens: Tensor) -> Tensor:
        """Which tokens are not padding: bool, the shape of the tokens."""
        return tokens != self.model.config.pad_token_id

    def trained_layers(self) -> list[str]:
        """Names of the linear and convolutional layers that are trained."""
        return [
            name
            for name, module in self.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d) and list(module.parameters(recurse=False))
        ]

    def own(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What belongs to parameters of the Transformers model, named and transposed as they are here."""
        return {
            f"model.{name}": value.T.contiguous() if name in self.transposed else value
            for name, value in values.items()
        }

    def checkpoint(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A whole state dict of this module, with the given values of all trained parameters of the model."""
        values = self.own(parameters)
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        # A tied parameter is loaded once for each of its names.
        return self.state_dict() | {
            name: values[names[id(parameter)]] for name, parameter in self.named_parameters(remove_duplicate=False)
        }


def _replace_conv1d(model: nn.Module) -> frozenset[str]:
    """Puts linear layers in place of `Conv1D`, and gives the names of the parameters that are transposed thereby."""
    replaced = {name: module for name, module in model.named_modules() if isinstance(module, Conv1D)}
    for name, module in replaced.items():
        layer = skip_init(nn.Linear, module.nx, module.nf)
        layer.weight = nn.Parameter(module.weight.detach().T.contiguous(), requires_grad=False)
        layer.bias = module.bias
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer)
    return frozenset(f"{name}.weight" for name in replaced)


def as_tensors(dataset: Dataset, model: PreTrainedModel) -> TensorDataset:
    """
    The main input and the labels of all rows.

    Inputs are `(num_rows, ...)`, float32, or token ids; labels `(num_rows,)`, or `(num_rows, length)` for labels of
    tokens, int64. Those of a causal language model stand where they are predicted; -100 counts for nothing.
    """
    functional = FunctionalModel(model)
    inputs, labels = RowReader(dataset, functional).batch(range(len(dataset)))
    return TensorDataset(inputs[functional.main_input_name], labels)


def check_one_label_a_row(rows: TensorDataset, peer: str) -> None:
    """
    For adapters that are for classification alone.

    Raises:
        NotImplementedError: If rows have a label for each token.
    """
    if rows.tensors[1].dim() != 1:
        raise NotImplementedError(f"The adapter of {peer} is for one label a row, not for language models.")


def loader(rows: TensorDataset, batch_size: int | None = None) -> DataLoader:
    """Batches in order; all rows at once by default."""
    return DataLoader(rows, batch_size=batch_size or len(rows), shuffle=False)


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, summed over all labels of the batch that are not -100."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")


def negative_objective(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """
    A task's objective as a peer's "loss of the query": of logits and labels, summed over the batch.

    Descending on a row's loss changes the objective by -<its gradient, the loss's gradient>, so that with this sign a
    peer's inner product is positive where the presence of the row raises the objective.

    Args:
        name (`str`): [`Task.objective`], one value for each query.
    """
    objective = resolve_objective(name)

    def negative(logits: Tensor, labels: Tensor) -> Tensor:
        return -objective.function(lambda inputs: logits, Queries({}, labels)).sum()

    return negative


@dataclass(frozen=True)
class Member:
    """
    A model of an ensemble.

    Args:
        parameters (`dict[str, Tensor]`): Its parameters.
        seconds (`float`): What its training took, beyond the recorded run.
    """

    parameters: dict[str, Tensor]
    seconds: float


_SHARED: dict[tuple[Path, Hashable], Any] = {}


def shared(recorded: Recorded, key: Hashable, build: Callable[[], Value]) -> Value:
    """What several settings or peers share, built once for a recorded run in this process."""
    if (recorded.folder, key) not in _SHARED:
        _SHARED[recorded.folder, key] = build()
    return _SHARED[recorded.folder, key]


def ensemble(recorded: Recorded, size: int) -> list[Member]:
    """
    Models trained like the recorded one, which comes first; the others have the seeds 100, 101, ...

    Each is trained once, whichever setting asks first.

    Raises:
        ValueError: If one of these seeds belongs to the ground truth.
    """

    def train(seed: int) -> Member:
        trainer = recorded.task.build_trainer(recorded.task.train, seed)
        start = time.process_time()
        trainer.train()
        return Member(_parameters(trainer.model), time.process_time() - start)

    seeds = range(FIRST_ENSEMBLE_SEED, FIRST_ENSEMBLE_SEED + size - 1)
    used = sorted({*seeds} & {*recorded.task.seeds})
    if used:
        raise ValueError(
            f"Seeds {used} belong to the ground truth of {recorded.task.name}. Choose others for the task."
        )
    return [
        Member(_parameters(recorded.model), 0.0),
        *(shared(recorded, ("member", seed), partial(train, seed)) for seed in seeds),
    ]


def _parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def trained_bytes(model: PreTrainedModel) -> int:
    """Bytes that the trained parameters take."""
    return num_bytes(parameter for parameter in model.parameters() if parameter.requires_grad)


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that the tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def folder_bytes(folder: Path, pattern: str) -> int:
    """Bytes of the files under a folder whose names match."""
    return sum(path.stat().st_size for path in folder.rglob(pattern))


def prediction(
    recorded: Recorded,
    row_scores: Tensor,
    *,
    offline_seconds: float,
    online_seconds: float,
    kept_bytes: int,
    **details: object,
) -> Prediction:
    """
    Scores of rows, and their sums over clusters.

    Args:
        recorded (`Recorded`): The recorded run.
        row_scores (`Tensor`): `(num_queries, num_rows)`; positive where the row's presence raises the objective.
        offline_seconds, online_seconds (`float`): Before any query is known, and after.
        kept_bytes (`int`): What must be kept to answer new queries, training rows aside.
        details: What else to report.

    Raises:
        ValueError: If a score is NaN or infinite.
    """
    scores = row_scores.detach().cpu().numpy().astype(np.float32)
    if not np.isfinite(scores).all():
        raise ValueError(
            f"{int((~np.isfinite(scores)).sum())} of {scores.size} scores are NaN or infinite. "
            "Choose a stronger regularisation."
        )
    clusters = recorded.task.clusters
    membership = np.eye(clusters.num_clusters, dtype=np.float32)[clusters.cluster_ids]
    return Prediction(
        scores @ membership,
        scores,
        offline_seconds=offline_seconds,
        online_seconds=online_seconds,
        details={"kept_bytes": kept_bytes, **details},
    )
