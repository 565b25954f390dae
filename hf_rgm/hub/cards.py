"""Cards of artefacts: pure functions from what is known to Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import DatasetCard, DatasetCardData

from hf_rgm.fidelity.report import DESCRIPTIONS, SOURCES, FidelityReport

if TYPE_CHECKING:
    from hf_rgm.synset.synset import Synset

PACKAGE = Path(__file__).parents[1]
TEMPLATE_FOLDER = "model_card_templates"
NOT_MEASURED = (
    "Not measured: how well the scores of this synset agree with retraining is not known. `FidelityReport.measure` of "
    "hf_rgm retrains within a budget and says."
)


def synset_card(synset: Synset) -> str:
    """
    The `README.md` of a synset.

    Args:
        synset (`Synset`): Its `fidelity` is shown with intervals, or it is said that it was not measured.

    Returns:
        `str`: Markdown with a YAML header.

    Raises:
        ValueError: If the fidelity is not a whole report.
    """
    card = DatasetCard.from_template(
        DatasetCardData(tags=["hf-rgm", "synset", "data-attribution"]),
        template_path=str(_template("synset_card.md")),
        num_samples=synset.num_samples,
        input_name=synset.input_name,
        num_clusters=synset.num_clusters,
        num_rows=synset.clusters.num_rows,
        matching_error=synset.matching_error,
        parameters_sha256=synset.parameters_sha256,
        fidelity=fidelity_section(synset.fidelity),
        privacy=privacy_section(synset.metadata.get("privacy")),
    )
    return str(card)


def fidelity_section(fidelity: dict[str, Any] | None) -> str:
    """Measured fidelity as a table with intervals and a sentence on how it was measured, or that it was not."""
    if fidelity is None:
        return NOT_MEASURED
    report = FidelityReport.from_dict(fidelity)
    lines = [
        "Rank correlation of predicted with retrained values, 95% intervals; 1 is perfect agreement, 0 none.",
        "",
        "| over | agreement | noise ceiling | retrained subsets |",
        "|---|---|---|---|",
    ]
    for name, agreement in report.agreements.items():
        ceiling = "not measured (one seed)" if agreement.ceiling is None else str(agreement.ceiling)
        lines.append(f"| {DESCRIPTIONS[name]} | {agreement.estimate} | {ceiling} | {agreement.num_points} |")
    lines += [
        "",
        f"Engine: {report.engine} {SOURCES[report.rows]}. Objective: {report.objective}. Queries: "
        f"{report.num_queries}. Retrainings: {report.num_retrainings}, seeds {', '.join(map(str, report.seeds))}. The "
        "noise ceiling is how well retraining with one seed agrees with the others.",
    ]
    return "\n".join(lines)


def privacy_section(privacy: dict[str, Any] | None) -> str:
    """How near samples are to training rows, or that it was not measured."""
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
    if "kept_tokens" in privacy:
        text += (
            f". On average {privacy['kept_tokens']:.1f} of a sample's {privacy['num_tokens']} tokens are where the "
            "most similar row has them"
        )
    return f"{text}. Samples that start from rows may show parts of them; this measures it and guarantees nothing."


def _template(name: str) -> Path:
    """In the installed package, or beside it in a source tree."""
    installed = PACKAGE / TEMPLATE_FOLDER / name
    return installed if installed.is_file() else PACKAGE.parent / TEMPLATE_FOLDER / name
