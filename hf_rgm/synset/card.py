"""The card of a synset."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_rgm.files.writing import format_size
from hf_rgm.hub.artefact import LOCAL, CardOptions
from hf_rgm.hub.cards import SIGN_CONVENTION, TAGS, fidelity_section, model_name, recorded_model, render
from hf_rgm.synset.responses import RESPONSES_FILE, Responses

if TYPE_CHECKING:
    from hf_rgm.synset.synset import Synset


def synset_card(synset: Synset, options: CardOptions | None = None) -> str:
    """The `README.md` of a synset."""
    options = options or CardOptions()
    described = synset.trajectory.metadata.get("model")
    return render(
        "synset_card.md",
        options,
        base_model=recorded_model(described),
        tags=[*TAGS, "synset"],
        configs=[
            {"config_name": "default", "data_files": "data/*.parquet", "default": True},
            {"config_name": "clusters", "data_files": "clusters/*.parquet"},
        ],
        model=model_name(options, described),
        num_samples=synset.num_samples,
        input_name=synset.input_name,
        num_clusters=synset.num_clusters,
        num_rows=synset.clusters.num_rows,
        num_runs=len(synset.trajectories),
        matching_error=synset.matching_error,
        parameters_sha256=synset.parameters_sha256,
        sign_convention=SIGN_CONVENTION,
        usage=(
            "import hf_rgm\nfrom transformers import pipeline\n\n"
            f'attribute = pipeline("data-attribution", model="{options.model_id or "the/model"}", '
            f'synset="{options.repo_id or LOCAL}")\nresult = attribute(queries)'
        ),
        fidelity=fidelity_section(synset.fidelity),
        privacy=privacy_section(synset.metadata.get("privacy")),
        responses=responses_section(synset.responses, synset.trajectory.num_steps),
    )


def privacy_section(privacy: dict[str, Any] | None) -> str:
    if not privacy:
        return "Not measured: how near the samples are to training rows is not known."
    text = (
        "The median distance of a synthetic sample to the nearest training row of its cluster is "
        f"{privacy['distance']:.3g}"
    )
    if privacy["row_distance"] is not None:
        text += (
            f"; that of a row to the nearest other row is {privacy['row_distance']:.3g}. "
            f"{privacy['share_nearer']:.0%} of the samples are nearer to a row than that"
        )
    if privacy.get("kept_tokens") is not None:
        text += (
            f". On average {privacy['kept_tokens']:.1f} of a sample's {privacy['num_tokens']} tokens are where the "
            "most similar row has them"
        )
    return f"{text}. Samples that start from rows may show parts of them; this measures it and guarantees nothing."


def responses_section(responses: Responses | None, num_steps: int) -> str | None:
    if responses is None:
        return None
    return (
        f"`{RESPONSES_FILE}` ({format_size(responses.num_bytes)}, {responses.precision}) holds what leaving each "
        f"cluster out changes in the {responses.num_parameters} trained parameters, followed from training step "
        f"{responses.rewind_step} of {num_steps}. For privacy: that is one vector of parameter changes for each of "
        f"the {responses.num_clusters} clusters, derived from the gradients of its real training rows. What it tells "
        "of single rows was not measured."
    )
