"""The card of a result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_rgm.hub.artefact import LOCAL, CardOptions
from hf_rgm.hub.cards import TAGS, escaped, fidelity_section, model_name, recorded_model, render, table

if TYPE_CHECKING:
    from hf_rgm.results.result import AttributionResult

NUM_EXTREMES = 5
USAGE = """\
from datasets import load_dataset
from hf_rgm import AttributionResult

result = AttributionResult.from_pretrained("{repo_id}")  # exact
top = load_dataset("{repo_id}", split="train")  # a table"""


def attribution_card(result: AttributionResult, options: CardOptions | None = None) -> str:
    """The `README.md` of a result."""
    options = options or CardOptions()
    described = result.metadata.get("model")
    repo_id = options.repo_id or LOCAL
    return render(
        "attribution_card.md",
        options,
        base_model=recorded_model(described),
        tags=[*TAGS, "attribution"],
        configs=[
            {"config_name": name, "data_files": f"{name}/*.parquet", **({"default": True} if name == "top" else {})}
            for name in ("top", "scores", "clusters", "queries")
        ],
        model=model_name(options, described),
        objective=escaped(result.objective),
        engine=escaped(result.engine),
        num_queries=result.num_queries,
        num_clusters=result.num_clusters,
        num_rows=0 if result.row_scores is None else result.row_scores.shape[1],
        sign_convention=result.SIGN_CONVENTION,
        extremes=_extremes(result),
        usage=USAGE.format(repo_id=repo_id),
        fidelity=fidelity_section(result.metadata.get("fidelity")),
    )


def _extremes(result: AttributionResult) -> str:
    count = min(NUM_EXTREMES, result.num_clusters)
    highest, lowest = (result.top(count, largest=largest) for largest in (True, False))
    rows = [
        [escaped(high["cluster"]), f"{high['score']:+.3g}", escaped(low["cluster"]), f"{low['score']:+.3g}"]
        for (_, high), (_, low) in zip(highest.iterrows(), lowest.iterrows(), strict=True)
    ]
    return table(["highest", "score", "lowest", "score"], rows)
