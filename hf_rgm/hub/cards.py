"""Cards of artefacts: pure functions from what is known to Markdown."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import DatasetCard, DatasetCardData, ModelCard, ModelCardData

from hf_rgm.artefacts import printable
from hf_rgm.attribution.result import AttributionResult
from hf_rgm.fidelity.report import DESCRIPTIONS, FidelityReport
from hf_rgm.files import format_size
from hf_rgm.hub.artefact import LOCAL, CardOptions
from hf_rgm.hub.repository import dataset_address, is_repo_id, model_address
from hf_rgm.synset.responses_file import RESPONSES_FILE

if TYPE_CHECKING:
    from hf_rgm.attribution.unlearned import UnlearnedModel
    from hf_rgm.synset.responses import Responses
    from hf_rgm.synset.synset import Synset

PACKAGE = Path(__file__).parents[1]
TEMPLATE_FOLDER = "model_card_templates"
LIBRARY = "hf_rgm"
TAGS = ("hf-rgm", "data-attribution")
NOT_MEASURED = (
    "Not measured: how well the scores of this synset agree with retraining is not known. `FidelityReport.measure` of "
    "hf_rgm retrains within a budget and says."
)
CITATION = """```bibtex
@inproceedings{ye2024distilled,
  title = {Distilled Datamodel with Reverse Gradient Matching},
  author = {Ye, Jingwen and Yu, Ruonan and Liu, Songhua and Wang, Xinchao},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year = {2024}
}
```"""
NUM_EXTREMES = 5


def synset_card(synset: Synset, options: CardOptions | None = None) -> str:
    """
    The `README.md` of a synset.

    Args:
        synset (`Synset`): Its `fidelity` is shown with intervals, or it is said that it was not measured.
        options (`CardOptions`, *optional*): What else is known.

    Returns:
        `str`: Markdown with a YAML header.

    Raises:
        ValueError: If the fidelity is not a whole report.
    """
    options = options or CardOptions()
    described = synset.trajectory.metadata.get("model")
    repo_id = options.repo_id or LOCAL
    return _render(
        "synset_card.md",
        options,
        base_model=_recorded_model(described),
        tags=[*TAGS, "synset"],
        configs=[
            {"config_name": "default", "data_files": "data/*.parquet", "default": True},
            {"config_name": "clusters", "data_files": "clusters/*.parquet"},
        ],
        model=_model_name(options, described),
        num_samples=synset.num_samples,
        input_name=synset.input_name,
        num_clusters=synset.num_clusters,
        num_rows=synset.clusters.num_rows,
        num_runs=len(synset.trajectories),
        matching_error=synset.matching_error,
        parameters_sha256=synset.parameters_sha256,
        sign_convention=AttributionResult.SIGN_CONVENTION,
        usage="\n".join(
            [
                "import hf_rgm",
                "from transformers import pipeline",
                "",
                f'attribute = pipeline("data-attribution", model="{options.model_id or "the/model"}", '
                f'synset="{repo_id}")',
                "result = attribute(queries)",
            ]
        ),
        fidelity=fidelity_section(synset.fidelity),
        privacy=privacy_section(synset.metadata.get("privacy")),
        responses=responses_section(synset.responses, synset.trajectory.num_steps),
    )


def attribution_card(result: AttributionResult, options: CardOptions | None = None) -> str:
    """
    The `README.md` of a result.

    Args:
        result (`AttributionResult`): With `fidelity` in its metadata, that of the synset is shown.
        options (`CardOptions`, *optional*): What else is known.

    Returns:
        `str`: Markdown with a YAML header.

    Raises:
        ValueError: If the fidelity is not a whole report.
    """
    options = options or CardOptions()
    described = result.metadata.get("model")
    repo_id = options.repo_id or LOCAL
    return _render(
        "attribution_card.md",
        options,
        base_model=_recorded_model(described),
        tags=[*TAGS, "attribution"],
        configs=[
            {"config_name": name, "data_files": f"{name}/*.parquet", **({"default": True} if name == "top" else {})}
            for name in ("top", "scores", "clusters", "queries")
        ],
        model=_model_name(options, described),
        objective=escaped(result.objective),
        engine=escaped(result.engine),
        num_queries=result.num_queries,
        num_clusters=result.num_clusters,
        num_rows=0 if result.row_scores is None else result.row_scores.shape[1],
        sign_convention=result.SIGN_CONVENTION,
        extremes=_extremes(result),
        usage="\n".join(
            [
                "from datasets import load_dataset",
                "from hf_rgm import AttributionResult",
                "",
                f'result = AttributionResult.from_pretrained("{repo_id}")  # exact',
                f'top = load_dataset("{repo_id}", split="train")  # a table',
            ]
        ),
        fidelity=fidelity_section(result.metadata.get("fidelity")),
    )


def unlearned_model_card(unlearned: UnlearnedModel, options: CardOptions | None = None) -> str:
    """
    The `README.md` of a model that some clusters were removed from.

    Args:
        unlearned (`UnlearnedModel`): What was removed, and how it was checked.
        options (`CardOptions`, *optional*): What else is known.

    Returns:
        `str`: Markdown with a YAML header.

    Raises:
        ValueError: If the fidelity is not a whole report.
    """
    options = options or CardOptions()
    rows = [[escaped(name), size] for name, size in zip(unlearned.clusters, unlearned.sizes, strict=True)]
    checks = [
        [escaped(check.what), check.num_rows, f"{check.loss_before:.4g}", f"{check.loss_after:.4g}"]
        for check in unlearned.checks
    ]
    return _render(
        "unlearned_model_card.md",
        options,
        base_model=options.model_id or _recorded_model({"name_or_path": unlearned.model_name}),
        library="peft" if hasattr(unlearned.model, "peft_config") else "transformers",
        tags=[*TAGS, "unlearning"],
        configs=None,
        model=_model_name(options, {"name_or_path": unlearned.model_name}),
        removed=_table(["cluster", "training rows"], rows),
        engine=escaped(unlearned.engine),
        rewind_step=unlearned.rewind_step,
        num_steps=unlearned.num_steps,
        parameters_sha256=unlearned.parameters_sha256,
        checks=_table(["mean loss on", "rows", "original", "this model"], checks)
        if checks
        else "Not checked: no rows to compare the two models on were given.",
        fidelity=fidelity_section(unlearned.fidelity),
    )


def fidelity_section(fidelity: dict[str, Any] | None) -> str:
    """Measured fidelity as a table with intervals and a sentence on how it was measured, or that it was not."""
    if fidelity is None:
        return NOT_MEASURED
    report = FidelityReport.from_dict(fidelity)
    rows = [
        [
            DESCRIPTIONS[name],
            agreement.estimate,
            "not measured (one seed)" if agreement.ceiling is None else agreement.ceiling,
            agreement.num_points,
        ]
        for name, agreement in report.agreements.items()
    ]
    return "\n".join(
        [
            "Rank correlation of predicted with retrained values, 95% intervals; 1 is perfect agreement, 0 none.",
            "",
            _table(["over", "agreement", "noise ceiling", "retrained subsets"], rows),
            "",
            f"Engine: {escaped(report.engine)} {report.source}. Objective: {escaped(report.objective)}. "
            f"Queries: {report.num_queries}. Retrainings: {report.num_retrainings}, seeds "
            f"{', '.join(map(str, report.seeds))}. The noise ceiling is how well retraining with one seed agrees with "
            "the others.",
        ]
    )


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
    if privacy.get("kept_tokens") is not None:
        text += (
            f". On average {privacy['kept_tokens']:.1f} of a sample's {privacy['num_tokens']} tokens are where the "
            "most similar row has them"
        )
    return f"{text}. Samples that start from rows may show parts of them; this measures it and guarantees nothing."


def responses_section(responses: Responses | None, num_steps: int) -> str | None:
    """What responses hold, how large they are and what they are made from; nothing where there are none."""
    if responses is None:
        return None
    return (
        f"`{RESPONSES_FILE}` ({format_size(responses.num_bytes)}, {responses.precision}) holds what leaving each "
        f"cluster out changes in the {responses.num_parameters} trained parameters, followed from training step "
        f"{responses.rewind_step} of {num_steps}. For privacy: that is one vector of parameter changes for each of "
        f"the {responses.num_clusters} clusters, derived from the gradients of its real training rows. What it tells "
        "of single rows was not measured."
    )


def escaped(text: Any) -> str:
    """Text from data as Markdown that shows it as it is: no markup, no HTML, no line breaks."""
    return re.sub(r"([\\`*_{}\[\]()#+!|~$:])", r"\\\1", html.escape(printable(str(text)), quote=False))


def _render(
    template: str,
    options: CardOptions,
    *,
    base_model: str | None,
    tags: list[str],
    configs: list[dict[str, Any]] | None,
    library: str = LIBRARY,
    **variables: Any,
) -> str:
    known: dict[str, Any] = {
        "base_model": base_model,
        "configs": configs,
        "license": options.license,
        "library_name": library,
        "tags": tags,
        "model": options.model_id,
        "synset": options.synset_id,
        "attribution": options.attribution_id,
    }
    header = {name: value for name, value in known.items() if value is not None}
    data: Any = ModelCardData(**header) if configs is None else DatasetCardData(**header)
    card_class: Any = ModelCard if configs is None else DatasetCard
    variables |= {"repo_id": options.repo_id or LOCAL, "links": _links(options), "citation": CITATION}
    path = options.template or _template(template)
    return str(card_class.from_template(data, template_path=str(path), **variables))


def _links(options: CardOptions) -> str:
    named = {
        "model": (options.model_id, model_address),
        "synset": (options.synset_id, dataset_address),
        "attributions": (options.attribution_id, dataset_address),
    }
    lines = [
        f"- {what}: [{escaped(repo_id)}]({address(repo_id)})"
        for what, (repo_id, address) in named.items()
        if repo_id is not None and is_repo_id(repo_id)
    ]
    return "\n".join(lines) or "None are known."


def _recorded_model(described: Any) -> str | None:
    """The checkpoint the recorded training started from, if it is one on the Hub."""
    name = described.get("name_or_path") if isinstance(described, dict) else None
    return name if isinstance(name, str) and "/" in name and is_repo_id(name) else None


def _model_name(options: CardOptions, described: Any) -> str:
    if options.model_id is not None:
        return escaped(options.model_id)
    if not isinstance(described, dict) or not isinstance(described.get("class"), str):
        return "not known"
    name = _recorded_model(described)
    return escaped(described["class"]) + ("" if name is None else f", trained from {escaped(name)}")


def _extremes(result: AttributionResult) -> str:
    count = min(NUM_EXTREMES, result.num_clusters)
    highest, lowest = (result.top(count, largest=largest) for largest in (True, False))
    rows = [
        [escaped(high["cluster"]), f"{high['score']:+.3g}", escaped(low["cluster"]), f"{low['score']:+.3g}"]
        for (_, high), (_, low) in zip(highest.iterrows(), lowest.iterrows(), strict=True)
    ]
    return _table(["highest", "score", "lowest", "score"], rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _template(name: str) -> Path:
    """In the installed package, or beside it in a source tree."""
    installed = PACKAGE / TEMPLATE_FOLDER / name
    return installed if installed.is_file() else PACKAGE.parent / TEMPLATE_FOLDER / name
