"""A model without some of its training data: what was removed, how it was checked, and the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from hf_rgm.clusters import ClusterMap
from hf_rgm.engines.anchored_replay import AnchoredReplayEngine
from hf_rgm.engines.linear import LinearEngine
from hf_rgm.engines.objectives import Queries, resolve_objective
from hf_rgm.engines.registry import default_engine
from hf_rgm.engines.training_on import TrainingOnEngine
from hf_rgm.files import staged_folder, write_json
from hf_rgm.hub.artefact import CardOptions, HubArtefact
from hf_rgm.modeling import FunctionalModel
from hf_rgm.rows import RowReader

FORMAT_VERSION = 1
CONFIG_FILE = "unlearning.json"
ROWS_AT_ONCE = 256
MAX_LINEAR_SHARE = 0.25


@dataclass(frozen=True)
class UnlearningCheck:
    """
    The mean loss of some rows, before and after.

    Args:
        what (`str`): Which rows.
        num_rows (`int`): How many.
        loss_before, loss_after (`float`): Mean cross entropy under the original model and under the new one.
    """

    what: str
    num_rows: int
    loss_before: float
    loss_after: float

    def __str__(self) -> str:
        return f"mean loss on {self.what} ({self.num_rows} rows): {self.loss_before:.4g} -> {self.loss_after:.4g}"


def chosen_clusters(clusters: Iterable[str | int], known: ClusterMap) -> list[int]:
    """
    Indices of clusters that are to be removed, in order.

    Args:
        clusters (`Iterable[str | int]`): Their names or indices; or one.
        known (`ClusterMap`): All clusters.

    Raises:
        KeyError, IndexError: If there is no cluster of a name or index.
        ValueError: If none or all are named.
    """
    named = [clusters] if isinstance(clusters, str | int) else clusters
    chosen = sorted({known.index(cluster) for cluster in named})
    if not 0 < len(chosen) < known.num_clusters:
        raise ValueError(
            f"{len(chosen)} of {known.num_clusters} clusters are to be removed. Name at least one, and leave at least "
            "one."
        )
    return chosen


def engine_without(
    chosen: list[int],
    clusters: ClusterMap,
    available: dict[str, bool],
    *,
    rewind: float | None = None,
    whole: bool = True,
) -> str:
    """
    The engine that comes nearest to retraining without some clusters.

    Measured with 2% of the data removed, where linearised replay is nearer and anchored replay may be farther off than
    the trained model itself, and with half of it, where it is the other way round, and training on from a recorded
    state is nearer still.

    Args:
        chosen (`list[int]`): Indices of the clusters that are removed.
        clusters (`ClusterMap`): All clusters.
        available (`dict[str, bool]`): Whether there are `"rows"`, `"samples"` and `"responses"`.
        rewind (`float`, *optional*): The rewind point that is asked for.
        whole (`bool`, *optional*, defaults to `True`): Whether the linear engine gives models.
    """
    share = clusters.sizes[chosen].sum() / clusters.num_rows
    linear = default_engine(available, rewind=rewind)
    if share <= MAX_LINEAR_SHARE and (whole or linear != LinearEngine.name):
        return linear
    return TrainingOnEngine.name if available["rows"] else AnchoredReplayEngine.name


def groups_to_compare(
    chosen: Sequence[int], clusters: ClusterMap, rows: RowReader | None, queries: RowReader | None
) -> list[tuple[str, RowReader, np.ndarray]]:
    """Rows whose losses tell what was removed, as far as there are any: how they are called, their reader, which."""
    groups: list[tuple[str, RowReader, np.ndarray]] = []
    if rows is not None:
        removed = np.isin(clusters.cluster_ids, chosen)
        groups.append(("removed rows", rows, np.flatnonzero(removed)))
        groups.append(("the other training rows", rows, np.flatnonzero(~removed)))
    if queries is not None:
        groups.append(("queries", queries, np.arange(len(queries))))
    return groups


def compare_losses(
    model: FunctionalModel, before: Tensor, after: Tensor, what: str, reader: RowReader, rows: np.ndarray
) -> UnlearningCheck:
    """
    The mean loss of some rows under two vectors of parameters.

    Args:
        model (`FunctionalModel`): The model, within its `differentiable()`.
        before, after (`Tensor`): `(num_parameters,)`.
        what (`str`): How the rows are called.
        reader (`RowReader`): Reads them.
        rows (`np.ndarray`): Which, `(num_rows,)`, int64.
    """
    objective = resolve_objective("loss")
    totals = [0.0, 0.0]
    for start in range(0, len(rows), ROWS_AT_ONCE):
        batch = Queries(*reader.batch(rows[start : start + ROWS_AT_ONCE]))
        for index, vector in enumerate((before, after)):
            totals[index] += float(objective.values(model, vector, batch).sum())
    return UnlearningCheck(what, len(rows), *(total / len(rows) for total in totals))


@dataclass(eq=False)
class UnlearnedModel(HubArtefact):
    """
    The model as it would be had some clusters never been trained on. Made by [`Attributor.unlearn`].

    Args:
        model (`nn.Module`): A model of the same class, in evaluation mode.
        clusters (`Sequence[str]`): Names of the removed clusters.
        sizes (`Sequence[int]`): Their numbers of training rows.
        checks (`Sequence[UnlearningCheck]`): What was compared; none without rows and queries.
        engine (`str`): What computed it.
        rewind_step, num_steps (`int`): Training step that it was computed from, of all steps.
        parameters_sha256 (`str`): Identity of the original model's trained parameters.
        model_name (`str`, *optional*): The checkpoint that the original's training started from.
        fidelity (`dict`, *optional*): How well the synset agrees with retraining; see [`Synset`].

    Example:

    ```python
    >>> from hf_rgm import Attributor
    >>> from hf_rgm.testing import tiny_recorded_run, tiny_synset
    >>> run = tiny_recorded_run()
    >>> unlearned = Attributor(run.model, tiny_synset(), disable_tqdm=True).unlearn(
    ...     ["class 0, first half"], rows=run.train_dataset
    ... )
    >>> [check.what for check in unlearned.checks]
    ['removed rows', 'the other training rows']
    >>> unlearned.checks[0].loss_after > unlearned.checks[0].loss_before
    True

    ```
    """

    marker: ClassVar = CONFIG_FILE
    files: ClassVar = ("README.md", CONFIG_FILE, "*.safetensors", "*.safetensors.index.json")
    kind: ClassVar = "model without some of its training data"
    repo_type: ClassVar = "model"

    model: nn.Module = field(repr=False)
    clusters: Sequence[str]
    sizes: Sequence[int]
    checks: Sequence[UnlearningCheck]
    engine: str
    rewind_step: int
    num_steps: int
    parameters_sha256: str
    model_name: str | None = None
    fidelity: dict[str, Any] | None = field(default=None, repr=False)

    def save_pretrained(self, save_directory: str | Path, *, card: CardOptions | None = None) -> Path:
        """
        Writes the model with a card and `unlearning.json` (replaces such a folder); it loads like any other model.

        What reads its inputs, a tokenizer or processor, is not saved: use the original model's.

        Args:
            save_directory (`str` or `Path`): The folder.
            card (`CardOptions`, *optional*): What its card says besides.

        Returns:
            `Path`: the folder.

        Raises:
            FileExistsError: If the folder holds something else.
            TypeError: If the model cannot be saved.
        """
        from hf_rgm.hub.cards import unlearned_model_card

        save: Any = getattr(self.model, "save_pretrained", None)
        if save is None:
            raise TypeError(
                f"{type(self.model).__name__} has no `save_pretrained`. Save its `state_dict()` with safetensors."
            )
        text = unlearned_model_card(self, card)
        content = {
            name: value
            for name, value in vars(self).items()
            if name not in ("model", "checks", "clusters", "sizes", "fidelity")
        }
        with staged_folder(save_directory, CONFIG_FILE) as folder:
            save(folder)
            write_json(
                folder / CONFIG_FILE,
                {
                    "format_version": FORMAT_VERSION,
                    **content,
                    "removed": dict(zip(self.clusters, map(int, self.sizes), strict=True)),
                    "checks": [asdict(check) for check in self.checks],
                    "fidelity": self.fidelity,
                },
            )
            (folder / "README.md").write_text(text, encoding="utf-8")
        return Path(save_directory)
