"""A model without some of its training data, and how it was checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from hf_rgm.files.writing import staged_folder, write_json
from hf_rgm.hub.artefact import CardOptions, HubArtefact
from hf_rgm.hub.cards import TAGS, escaped, fidelity_section, model_name, recorded_model, render, table

FORMAT_VERSION = 1
CONFIG_FILE = "unlearning.json"


@dataclass(frozen=True)
class UnlearningCheck:
    """Mean cross entropy of some rows under the original model and under the new one."""

    what: str
    num_rows: int
    loss_before: float
    loss_after: float

    def __str__(self) -> str:
        return f"mean loss on {self.what} ({self.num_rows} rows): {self.loss_before:.4g} -> {self.loss_after:.4g}"


@dataclass(eq=False)
class UnlearnedModel(HubArtefact):
    """
    The model as it would be had some clusters never been trained on. Made by [`Attributor.unlearn`].

    Args:
        model (`nn.Module`): A model of the same class, in evaluation mode.
        clusters (`Sequence[str]`): Names of the removed clusters.
        sizes (`Sequence[int]`): Their numbers of training rows.
        checks (`Sequence[UnlearningCheck]`): Mean losses that were compared; none without rows and queries.
        engine (`str`): Name of the engine that computed it.
        rewind_step, num_steps (`int`): Training step that it was computed from, and number of all steps.
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

        A tokenizer or processor is not saved: use the original model's.

        Args:
            save_directory (`str` or `Path`): The folder.
            card (`CardOptions`, *optional*): Licence, links or another template for the card.

        Returns:
            `Path`: the folder.

        Raises:
            FileExistsError: If the folder holds something else.
            TypeError: If the model cannot be saved.
        """
        save: Any = getattr(self.model, "save_pretrained", None)
        if save is None:
            raise TypeError(
                f"{type(self.model).__name__} has no `save_pretrained`. Save its `state_dict()` with safetensors."
            )
        text = unlearned_model_card(self, card)
        content = {
            "format_version": FORMAT_VERSION,
            "engine": self.engine,
            "rewind_step": self.rewind_step,
            "num_steps": self.num_steps,
            "parameters_sha256": self.parameters_sha256,
            "model_name": self.model_name,
            "removed": dict(zip(self.clusters, map(int, self.sizes), strict=True)),
            "checks": [asdict(check) for check in self.checks],
            "fidelity": self.fidelity,
        }
        with staged_folder(save_directory, CONFIG_FILE) as folder:
            save(folder)
            write_json(folder / CONFIG_FILE, content)
            (folder / "README.md").write_text(text, encoding="utf-8")
        return Path(save_directory)


def unlearned_model_card(unlearned: UnlearnedModel, options: CardOptions | None = None) -> str:
    """The `README.md` of a model without some clusters."""
    options = options or CardOptions()
    rows = [[escaped(name), size] for name, size in zip(unlearned.clusters, unlearned.sizes, strict=True)]
    checks = [
        [escaped(check.what), check.num_rows, f"{check.loss_before:.4g}", f"{check.loss_after:.4g}"]
        for check in unlearned.checks
    ]
    described = {"name_or_path": unlearned.model_name}
    return render(
        "unlearned_model_card.md",
        options,
        base_model=options.model_id or recorded_model(described),
        library="peft" if hasattr(unlearned.model, "peft_config") else "transformers",
        tags=[*TAGS, "unlearning"],
        configs=None,
        model=model_name(options, described),
        removed=table(["cluster", "training rows"], rows),
        engine=escaped(unlearned.engine),
        rewind_step=unlearned.rewind_step,
        num_steps=unlearned.num_steps,
        parameters_sha256=unlearned.parameters_sha256,
        checks=table(["mean loss on", "rows", "original", "this model"], checks)
        if checks
        else "Not checked: no rows to compare the two models on were given.",
        fidelity=fidelity_section(unlearned.fidelity),
    )
