"""Measured agreement with retraining, in artefacts, on pages and on cards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from hf_rgm.agreement.budget import LDS_CLUSTERS, LDS_ROWS, LEAVE_CLUSTER_OUT, MEASURES
from hf_rgm.agreement.correlations import Estimate
from hf_rgm.files.names import checked_names
from hf_rgm.files.reading import shortened

FORMAT_VERSION = 1
DESCRIPTIONS = {
    LDS_CLUSTERS: "random halves of the clusters (LDS)",
    LEAVE_CLUSTER_OUT: "single clusters left out",
    LDS_ROWS: "random halves of the rows (LDS)",
}


@dataclass(frozen=True)
class Agreement:
    """One measure: mean over queries of the rank correlation of predicted with retrained values."""

    estimate: Estimate
    num_points: int  # subsets, each retrained once per seed
    ceiling: Estimate | None = None  # one seed's retraining against the others: the most a perfect method can reach
    slope: Estimate | None = None  # of retrained effects on the scores, or on their sums over subsets


NOT_CALIBRATED = "sizes not calibrated"

Factors = tuple[Estimate, Estimate | None]
"""What scores of clusters, and of rows unless `None`, are multiplied by to have the size of retrained effects."""


def sizes_in_short(factors: Factors | None, *, rows: bool = False) -> str:
    """Whether sizes of the scores of clusters, or rows, are calibrated, for labels."""
    return NOT_CALIBRATED if factors is None or factors[int(rows)] is None else "sizes calibrated"


def describe_sizes(factors: Factors | None) -> str:
    """How far the sizes of scores can be trusted, in words."""
    if factors is None:
        return "Sizes are not calibrated: compare scores with each other, not with what retraining would change."
    rows = "those of rows are not" if factors[1] is None else f"those of rows by {factors[1]}"
    return f"Sizes are calibrated by retraining: scores of clusters were multiplied by {factors[0]}, {rows}."


@dataclass(frozen=True)
class FidelityFigures:
    """Measured agreement with retraining, as artefacts keep it; [`FidelityReport`] says what the fields are."""

    agreements: dict[str, Agreement]
    engine: str
    objective: str
    num_queries: int
    seeds: tuple[int, ...]
    rows: bool
    samples_sha256: str
    parameters_sha256: str = ""
    settings: dict[str, float] = field(default_factory=dict)
    points: dict[str, tuple[NDArray[np.floating], NDArray[np.floating]]] = field(
        default_factory=dict, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        if not self.agreements or not set(self.agreements) <= set(MEASURES):
            raise ValueError(
                f"`agreements` must hold some of {', '.join(MEASURES)}, got {', '.join(self.agreements) or 'nothing'}."
            )

    @property
    def num_retrainings(self) -> int:
        """Models that were trained."""
        return sum(agreement.num_points for agreement in self.agreements.values()) * len(self.seeds)

    @property
    def source(self) -> str:
        """What the engine worked on, in words."""
        if not self.rows:
            return "on the synset alone"
        return "on synset and training rows" if self.samples_sha256 else "on the training rows"

    def __str__(self) -> str:
        seeds = f"{'seeds' if len(self.seeds) > 1 else 'seed'} {' and '.join(map(str, self.seeds))}"
        queries = "1 query" if self.num_queries == 1 else f"{self.num_queries} queries"
        lines = [
            f"Agreement of the {self.engine} engine {self.source} with {self.num_retrainings} retrainings "
            f"({seeds}), objective {self.objective}, mean over {queries}, 95% intervals:"
        ]
        for name, agreement in self.agreements.items():
            ceiling = "" if agreement.ceiling is None else f"; noise ceiling {agreement.ceiling}"
            slope = "" if agreement.slope is None else f"; retrained effects are {agreement.slope} times the scores"
            over = f"over {agreement.num_points} retrained subsets"
            lines.append(f"- {DESCRIPTIONS[name]}: {agreement.estimate} {over}{ceiling}{slope}")
        ceiling = "With one seed the noise ceiling, what retraining itself reaches, is unknown."
        if len(self.seeds) > 1:
            ceiling = "Noise ceiling: how well retraining with one seed agrees with the others."
        return "\n".join([*lines, f"1 is perfect agreement, 0 none. {ceiling}"])

    def factors(self, **origin: Any) -> Factors:
        """Factors for scores with these fields (`None`: not known); raises a `ValueError` for other scores."""
        for name, value in origin.items():
            if value is not None and getattr(self, name) not in (value, ""):
                raise ValueError(
                    f"The fidelity report is about other scores: its `{name}` is {getattr(self, name)!r}, that of "
                    f"these scores {value!r}. Measure them with `FidelityReport.measure`."
                )
        slopes = {name: agreement.slope for name, agreement in self.agreements.items()}
        # Single clusters left out say more about the score of one than halves do.
        clusters, rows = slopes.get(LEAVE_CLUSTER_OUT) or slopes.get(LDS_CLUSTERS), slopes.get(LDS_ROWS)
        if clusters is None:
            raise ValueError(
                "The fidelity report has no slope of retrained effects on scores of clusters. Measure again, with "
                '`measures=["leave_cluster_out"]` for engines that train or replay every model.'
            )
        for slope in (clusters, rows):
            if slope is not None and (slope.low is None or slope.low <= 0):
                raise ValueError(
                    f"Retrained effects are {slope} times the scores, too uncertain to multiply by. Measure again "
                    "with a larger `budget`."
                )
        return clusters, rows

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-safe values, with a `format_version`."""
        content = asdict(replace(self, points={}))
        del content["points"]
        return {"format_version": FORMAT_VERSION, **content, "seeds": list(self.seeds)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """The inverse of [`FidelityFigures.to_dict`]; raises a `ValueError` if the report is not whole."""
        if not isinstance(content, Mapping) or content.get("format_version") != FORMAT_VERSION:
            found = content.get("format_version") if isinstance(content, Mapping) else type(content).__name__
            raise ValueError(
                f"The fidelity report has format version {found}, this release of hf_rgm reads {FORMAT_VERSION}. "
                "Install the release that wrote it, or measure again."
            )
        try:
            return cls(
                agreements={name: _read_agreement(part) for name, part in content["agreements"].items()},
                engine=checked_names([content["engine"]], "an engine")[0],
                objective=checked_names([content["objective"]], "an objective")[0],
                num_queries=int(content["num_queries"]),
                seeds=tuple(int(seed) for seed in content["seeds"]),
                rows=bool(content["rows"]),
                samples_sha256=str(content["samples_sha256"]),
                parameters_sha256=str(content.get("parameters_sha256", "")),
                settings={shortened(name): _number(value) for name, value in content["settings"].items()},
            )
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"The fidelity report is damaged ({error!r}). Measure again.") from error


def check_kept_report(content: Mapping[str, Any] | None, where: str) -> None:
    """Checks the report that an artefact keeps, if it has one; `where` names it in the error."""
    if content is not None:
        try:
            FidelityFigures.from_dict(content)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return value


def _read_agreement(content: Mapping[str, Any]) -> Agreement:
    ceiling, slope = content["ceiling"], content.get("slope")  # earlier releases kept no slope
    return Agreement(
        _read_estimate(content["estimate"]),
        int(content["num_points"]),
        None if ceiling is None else _read_estimate(ceiling),
        None if slope is None else _read_estimate(slope),
    )


def _read_estimate(content: Mapping[str, Any]) -> Estimate:
    value, low, high = (None if content[name] is None else float(content[name]) for name in ("value", "low", "high"))
    if value is None or not all(math.isfinite(bound) for bound in (value, low, high) if bound is not None):
        raise ValueError(f"{dict(content)} is not an estimate")
    return Estimate(value, low, high, int(content["num_nan"]))
