"""What a folder or repository is, whether it is whole, and what can be done with it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import LocalEntryNotFoundError

from hf_rgm.agreement.fidelity_figures import sizes_in_short
from hf_rgm.engines.registry import ENGINES
from hf_rgm.fidelity.report import FidelityReport
from hf_rgm.files.reading import ArtefactFolder, printable
from hf_rgm.files.writing import format_size
from hf_rgm.hub.repository import in_cache, open_artefact
from hf_rgm.results.result import AttributionResult
from hf_rgm.synset.synset import Synset
from hf_rgm.trajectory.trajectory import METADATA_FILE, Trajectory

HIGH_ERROR = 0.5


@dataclass(frozen=True)
class Description:
    """What is known of an artefact: `problem` says why it cannot be used, `uses` what can be done with it."""

    kind: str
    where: str
    problem: str | None
    facts: dict[str, Any] = field(default_factory=dict)  # JSON-safe
    uses: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"whole": self.problem is None}

    def __str__(self) -> str:
        lines = [f"{self.kind} in {self.where}"]
        lines += [f"  {name}: {value}" for name, value in self.facts.items()]
        lines.append("  whole: yes" if self.problem is None else f"  whole: NO. {self.problem}")
        return "\n".join(map(printable, [*lines, *(f"  -> {use}" for use in self.uses)]))


def describe(name_or_path: str | Path, *, revision: str | None = None) -> Description:
    """Description of a folder, or of a dataset repository on the Hub."""
    # What is in the cache first: without a connection, nothing else can be asked for.
    for marker in sorted(KINDS, key=lambda marker: not in_cache(name_or_path, marker, revision)):
        kind, read = KINDS[marker]
        try:
            folder = open_artefact(name_or_path, marker, revision=revision)
        except FileNotFoundError as error:
            if isinstance(error.__cause__, LocalEntryNotFoundError):
                raise  # the Hub is not reached: nobody knows what is there
            continue
        if folder.at_hand(marker):
            try:
                facts, uses = read(folder, str(name_or_path))
            except (FileNotFoundError, MemoryError, ValueError) as error:
                return Description(kind, str(folder), str(error))
            if kind != "trajectory" and not folder.is_remote:
                uses.append(f"share: hf-rgm push {name_or_path} NAMESPACE/NAME")
            return Description(kind, str(folder), None, facts, uses)
    held = [path.parent.name for marker in KINDS for path in Path(name_or_path).glob(f"*/{marker}")]
    if held:
        raise FileNotFoundError(
            f"{str(name_or_path)!r} is no trajectory, synset or attributions itself, but holds {', '.join(held)}: "
            f"name one, such as {Path(name_or_path) / held[0]}. `hf-rgm explore` takes the folder as it is."
        )
    raise FileNotFoundError(
        f"{str(name_or_path)!r} is no folder or dataset repository with a trajectory, synset or attributions: none of "
        f"{', '.join(KINDS)} is there."
    )


def _trajectory(folder: ArtefactFolder, name: str) -> tuple[dict[str, Any], list[str]]:
    trajectory = Trajectory.load(folder)
    facts = {
        "model": _model(trajectory),
        "parameters": sum(tensor.numel() for tensor in trajectory.final.parameters.values()),
        "optimizer": trajectory.optimizer.name,
        "steps": trajectory.num_steps,
        "recorded states": f"{len(trajectory.state_steps)}, {format_size(trajectory.states_bytes)}",
        "training rows": trajectory.num_rows,
    }
    return facts, [
        f"ask it: hf-rgm attribute MODEL {name} QUERIES -o FOLDER --rows DATASET --cluster-column COLUMN",
        f"distil it: hf-rgm distill {name} MODEL DATASET -o SYNSET --cluster-column COLUMN",
        f"or: ReverseGradientMatchingDistiller(model, {name!r}, train_dataset, clusters).distill()",
    ]


def _synset(folder: ArtefactFolder, name: str) -> tuple[dict[str, Any], list[str]]:
    synset = Synset.from_pretrained(folder)
    num_runs, responses = len(synset.trajectories), synset.responses
    facts = {
        "model": f"{_model(synset.trajectory)}, trained parameters with SHA-256 {synset.parameters_sha256[:16]}",
        "samples": f"{synset.num_samples} of {synset.input_name}, {synset.num_clusters} clusters, "
        f"{num_runs} recorded {'run' if num_runs == 1 else 'runs'}",
        "training rows": synset.clusters.num_rows,
        "matching error": round(synset.matching_error, 4),
        "fidelity": _fidelity(synset.fidelity),
    }
    if synset.matching_error > HIGH_ERROR and responses is None:
        facts["caution"] = "the matching error is high: give the training rows, or distil again with more samples"
    if responses is not None:
        if responses.at_hand:
            responses.check()  # reads all of them
        facts["responses"] = (
            f"{responses.precision}, {format_size(responses.num_bytes)}: the parameter changes of leaving each of "
            f"{responses.num_clusters} clusters out, from real rows' gradients, followed from step "
            f"{responses.rewind_step} of {synset.trajectory.num_steps}"
            f"{'' if responses.at_hand else '; fetched when asked for'}"
        )
    uses = [
        f"attribute: hf-rgm attribute MODEL {name} QUERIES -o ATTRIBUTIONS",
        f'or: pipeline("data-attribution", model=..., synset={name!r}), whose model_without([...]) unlearns',
    ]
    if synset.fidelity is None:
        uses.append(f"measure: hf-rgm validate MODEL {name} QUERIES DATASET --build-trainer FILE.py:NAME")
    return facts, uses


def _attributions(folder: ArtefactFolder, name: str) -> tuple[dict[str, Any], list[str]]:
    result = AttributionResult.from_pretrained(folder)
    facts = {
        "scores": f"{result.num_queries} queries x {result.num_clusters} clusters, {sizes_in_short(result.factors)}",
        "training rows scored": 0 if result.row_scores is None else result.row_scores.shape[1],
        "objective": result.objective,
        "engine": result.engine,
        "sign": result.SIGN_CONVENTION,
        "fidelity": _fidelity(result.metadata.get("fidelity")),
    }
    drift, engine = result.metadata.get("drift"), ENGINES.get(result.engine)
    if isinstance(drift, float) and engine and engine.max_drift is not None and drift > engine.max_drift:
        facts["caution"] = f"replays drifted by {drift:.3g}: do not rely on these scores"
    return facts, [f"look: hf-rgm explore {name}", f"or: AttributionResult.from_pretrained({name!r}).top()"]


KINDS = {
    METADATA_FILE: ("trajectory", _trajectory),
    Synset.marker: ("synset", _synset),
    AttributionResult.marker: ("attributions", _attributions),
}
"""Kinds of artefacts and their readers, by the file that tells one."""


def _model(trajectory: Trajectory) -> str:
    described = trajectory.metadata.get("model")
    return str(described.get("class", "not known"))[:200] if isinstance(described, dict) else "not known"


def _fidelity(fidelity: dict[str, Any] | None) -> str:
    if fidelity is None:
        return "not measured"
    report = FidelityReport.from_dict(fidelity)
    return ", ".join(f"{name} {agreement.estimate}" for name, agreement in report.agreements.items())
