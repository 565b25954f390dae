"""The card of a model without some of its training data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_rgm.hub.artefact import CardOptions
from hf_rgm.hub.cards import TAGS, escaped, fidelity_section, model_name, recorded_model, render, table

if TYPE_CHECKING:
    from hf_rgm.results.unlearned import UnlearnedModel


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
