"""Cards of artefacts: the parts that all of them share, in Markdown."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData, ModelCard, ModelCardData

from hf_rgm.agreement.fidelity_figures import DESCRIPTIONS, FidelityFigures
from hf_rgm.files.names import MAX_NAME
from hf_rgm.files.reading import printable
from hf_rgm.hub.artefact import LOCAL, CardOptions
from hf_rgm.hub.repository import is_repo_id, web_address

PACKAGE = Path(__file__).parents[1]
TAGS = ("hf-rgm", "data-attribution")
NOT_MEASURED = (
    "Not measured: how well the scores of this synset agree with retraining is not known. `FidelityReport.measure` of "
    "hf_rgm measures it by retraining within a budget."
)
CITATION = """```bibtex
@inproceedings{ye2024distilled,
  title = {Distilled Datamodel with Reverse Gradient Matching},
  author = {Ye, Jingwen and Yu, Ruonan and Liu, Songhua and Wang, Xinchao},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year = {2024}
}
```"""
SIGN_CONVENTION = (
    "A positive score means that the presence of the cluster (or row) raises the objective: "
    "score = f(with) - f(without)."
)


def render(
    template: str,
    options: CardOptions,
    *,
    base_model: str | None,
    tags: list[str],
    configs: list[dict[str, Any]] | None,
    library: str = "hf_rgm",
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
    card: Any
    card, data = (ModelCard, ModelCardData) if configs is None else (DatasetCard, DatasetCardData)
    variables |= {"repo_id": options.repo_id or LOCAL, "links": _links(options), "citation": CITATION}
    path = options.template or _template(template)
    return str(card.from_template(data(**header), template_path=str(path), **variables))


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def escaped(text: Any) -> str:
    """Untrusted text as Markdown that shows it literally: no markup, HTML, line breaks, links or mentions."""
    text = printable(str(text)[: MAX_NAME + 1])
    text = text if len(text) <= MAX_NAME else f"{text[:MAX_NAME]}…"
    if re.search(r"://|www\.|@", text, re.IGNORECASE):
        # What the Hub makes into links and mentions stays as it is in code alone.
        fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
        return r"\|".join(f"{fence} {part} {fence}" if part.strip() else part for part in text.split("|"))
    return re.sub(r"([\\`*_{}\[\]()#+!|~$:])", r"\\\1", html.escape(text, quote=False))


def fidelity_section(fidelity: dict[str, Any] | None) -> str:
    """Measured fidelity as a table with intervals and how it was measured, or a note that it was not."""
    if fidelity is None:
        return NOT_MEASURED
    report = FidelityFigures.from_dict(fidelity)
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
            table(["over", "agreement", "noise ceiling", "retrained subsets"], rows),
            "",
            f"Engine: {escaped(report.engine)} {report.source}. Objective: {escaped(report.objective)}. "
            f"Queries: {report.num_queries}. Retrainings: {report.num_retrainings}, seeds "
            f"{', '.join(map(str, report.seeds))}. The noise ceiling is how well retraining with one seed agrees with "
            "the others.",
        ]
    )


def recorded_model(described: Any) -> str | None:
    """Checkpoint that the recorded training started from, if it is one on the Hub."""
    name = described.get("name_or_path") if isinstance(described, dict) else None
    return name if isinstance(name, str) and "/" in name and is_repo_id(name) else None


def model_name(options: CardOptions, described: Any) -> str:
    if options.model_id is not None:
        return escaped(options.model_id)
    if not isinstance(described, dict) or not isinstance(described.get("class"), str):
        return "not known"
    name = recorded_model(described)
    return escaped(described["class"]) + ("" if name is None else f", trained from {escaped(name)}")


def _links(options: CardOptions) -> str:
    named = {"model": options.model_id, "synset": options.synset_id, "attributions": options.attribution_id}
    lines = [
        f"- {what}: [{escaped(repo_id)}]({web_address(repo_id, 'model' if what == 'model' else 'dataset')})"
        for what, repo_id in named.items()
        if repo_id is not None and is_repo_id(repo_id)
    ]
    return "\n".join(lines) or "None are known."


def _template(name: str) -> Path:
    installed = PACKAGE / "model_card_templates" / name
    return installed if installed.is_file() else PACKAGE.parent / "model_card_templates" / name  # in a source tree
