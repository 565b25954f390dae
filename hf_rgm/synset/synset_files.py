"""Synsets as folders: what is written, with the card, and what is checked when it is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor

from hf_rgm.agreement.fidelity_figures import check_kept_report
from hf_rgm.clusters.cluster_map import ClusterMap
from hf_rgm.files.reading import WAY_OUT, ArtefactFolder, parsed
from hf_rgm.files.writing import format_size, write_json
from hf_rgm.hub.artefact import LOCAL, TABLE, CardOptions
from hf_rgm.hub.cards import SIGN_CONVENTION, TAGS, fidelity_section, model_name, recorded_model, render
from hf_rgm.model.functional_model import parameters_sha256
from hf_rgm.synset.matched_states import MatchedState
from hf_rgm.synset.responses import RESPONSES_FILE, Responses, ResponsesDescription
from hf_rgm.synset.samples import SyntheticSamples
from hf_rgm.trajectory.description import FROM_CHECKPOINTS
from hf_rgm.trajectory.exposure import Exposure
from hf_rgm.trajectory.optimizers import MAX_CONSTANT
from hf_rgm.trajectory.trajectory import Trajectory

if TYPE_CHECKING:
    from hf_rgm.synset.synset import Synset

FORMAT_VERSION = 4
TENSORS_FILE = "synset.safetensors"
CONFIG_FILE = "synset.json"
SAMPLES_FOLDER = "data"
CLUSTERS_FOLDER = "clusters"
RUNS_FOLDER = "trajectories"
# Patterns of all files of a synset.
FILES = (
    "README.md",
    CONFIG_FILE,
    TENSORS_FILE,
    RESPONSES_FILE,
    f"{SAMPLES_FOLDER}/*",
    f"{CLUSTERS_FOLDER}/*",
    f"{RUNS_FOLDER}/*/*",
    f"{RUNS_FOLDER}/*/*/*",
)

REQUIRED = {"inputs", "targets", "log_weights", "residuals"}
INTEGERS = {"input_ids", "target_ids"}
MAX_LOG_WEIGHT = 80  # beyond, weights vanish or overflow in float32
MIN_LABELS_PER_ROW, MAX_LABELS_PER_ROW = 1e-6, 1e9


@dataclass
class SynsetDescription:
    """Content of `synset.json`; see [`Synset`]."""

    parameters_sha256: str
    input_name: str
    num_runs: int
    tensors: dict[str, list[int]]  # shape of each tensor in `synset.safetensors`
    matched_states: list[list[int]]  # run and step of each
    config: dict[str, Any]
    metadata: dict[str, Any]
    fidelity: dict[str, Any] | None
    responses: dict[str, Any] | None = None  # a `ResponsesDescription`


@dataclass
class _Privacy:
    """Content of the privacy measure; see `hf_rgm.distillation.privacy.measure_privacy`."""

    distance: float
    row_distance: float | None
    share_nearer: float | None
    kept_tokens: float | None = None
    num_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, other in (("row_distance", "share_nearer"), ("kept_tokens", "num_tokens")):
            if (getattr(self, name) is None) != (getattr(self, other) is None):
                raise ValueError(f"{name} and {other} belong together")


@dataclass
class _Metadata:
    """Metadata that other modules compute with."""

    labels_per_row: float = 1.0
    label_smoothing_factor: float = 0.0
    loss_scale: float = 1.0
    custom_row_loss: bool | None = None
    frozen_sha256: str | None = None
    tokens: list[list[int]] | None = None
    privacy: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not MIN_LABELS_PER_ROW <= self.labels_per_row <= MAX_LABELS_PER_ROW:
            raise ValueError(f"labels_per_row is {self.labels_per_row}, no mean number of labels")
        if not 1 / MAX_CONSTANT <= self.loss_scale <= MAX_CONSTANT:
            raise ValueError(f"loss_scale is {self.loss_scale}, not within {MAX_CONSTANT:g} of 1")
        if not 0 <= self.label_smoothing_factor < 1:
            raise ValueError(f"label_smoothing_factor is {self.label_smoothing_factor}, which is not in [0, 1)")
        if any(not 0 <= token < 2**31 for tokens in self.tokens or [] for token in tokens):
            raise ValueError("tokens are not all ids of tokens")


def write_synset(synset: Synset, folder: Path, card: str, *, samples: Any, state_precision: str | None) -> None:
    """Writes a synset's files to an empty folder; `samples` is the `datasets.Dataset` that the Hub shows."""
    tensors = {**synset.samples.named_tensors(), "residuals": synset.residuals}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSORS_FILE)
    (folder / SAMPLES_FOLDER).mkdir()
    # The schema tells the Hub's viewer which columns are pictures.
    pq.write_table(samples.data.table.cast(samples.features.arrow_schema), folder / TABLE)
    synset.clusters.save(folder / CLUSTERS_FOLDER)
    (folder / RUNS_FOLDER).mkdir()
    for run, trajectory in enumerate(synset.trajectories):
        shared = trajectory.without_rows()
        shared.metadata |= Exposure(trajectory, synset.clusters).description(trajectory.state_steps)
        shared.save(folder / RUNS_FOLDER / str(run), precision=state_precision)
    if synset.responses is not None:
        synset.responses.write(folder / RESPONSES_FILE, synset.parameters_sha256)
    write_json(
        folder / CONFIG_FILE,
        {
            "format_version": FORMAT_VERSION,
            "parameters_sha256": synset.parameters_sha256,
            "input_name": synset.input_name,
            "num_runs": len(synset.trajectories),
            "tensors": {name: list(tensor.shape) for name, tensor in tensors.items()},
            "matched_states": [[state.run, state.step] for state in synset.matched_states],
            "matching_error": synset.residuals.mean(0).tolist(),
            "config": synset.config,
            "metadata": synset.metadata,
            "fidelity": synset.fidelity,
            "responses": None if synset.responses is None else synset.responses.describe(),
        },
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def read_synset(folder: ArtefactFolder) -> dict[str, Any]:
    """The arguments of [`Synset`] from a folder that `write_synset` wrote."""
    source = f"{folder}/{CONFIG_FILE}"
    content = folder.read_json(CONFIG_FILE, format_version=FORMAT_VERSION, again="record and distil again")
    description = parsed(SynsetDescription, content, source)
    told = parsed(_Metadata, description.metadata, f"`metadata` of {source}")
    if told.privacy:
        parsed(_Privacy, told.privacy, f"`privacy` of {source}")
    check_kept_report(description.fidelity, f"`fidelity` of {source}")
    if description.num_runs < 1 or any(len(state) != 2 for state in description.matched_states):
        raise ValueError(
            f"{source} names {description.num_runs} recorded runs and matched states "
            f"{str(description.matched_states)[:80]}; each must be a run and a step. {WAY_OUT}"
        )
    clusters = ClusterMap.load(folder.subfolder(CLUSTERS_FOLDER))
    tensors = _read_tensors(folder, description, clusters.num_clusters)
    residuals = tensors.pop("residuals")
    num_samples = tensors["log_weights"].shape[:2].numel()
    if told.tokens is not None and len(told.tokens) != num_samples:
        raise ValueError(
            f"`metadata` of {source} has the tokens of {len(told.tokens)} samples, there are {num_samples}. {WAY_OUT}"
        )
    # A wrong number of runs fails at the first that is missing.
    trajectories = [Trajectory.load(folder.subfolder(f"{RUNS_FOLDER}/{run}")) for run in range(description.num_runs)]
    _check_runs(trajectories, clusters, description, source)
    if parameters_sha256(trajectories[0].final.parameters) != description.parameters_sha256:
        raise ValueError(
            f"{folder}/{RUNS_FOLDER}/0 ends at other parameters than {source} names; they do not belong together. "
            "Copy the synset again."
        )
    responses = None
    if description.responses is not None:
        responses = Responses.open(
            folder,
            parsed(ResponsesDescription, description.responses, f"`responses` of {source}"),
            num_clusters=clusters.num_clusters,
            parameter_shapes=trajectories[0].parameter_shapes,
            parameters_sha256=description.parameters_sha256,
            source=source,
        )
    return {
        "samples": SyntheticSamples(**tensors),
        "clusters": clusters,
        "trajectories": tuple(trajectories),
        "residuals": residuals,
        "matched_states": tuple(MatchedState(run, step) for run, step in description.matched_states),
        "parameters_sha256": description.parameters_sha256,
        "input_name": description.input_name,
        "config": description.config,
        "metadata": description.metadata,
        "fidelity": description.fidelity,
        "responses": responses,
    }


def _read_tensors(folder: ArtefactFolder, description: SynsetDescription, num_clusters: int) -> dict[str, Tensor]:
    """Reads all tensors, after every announced shape has been checked."""
    announced, num_states = description.tensors, len(description.matched_states)
    source = f"{folder}/{CONFIG_FILE}"
    if not REQUIRED <= set(announced) <= REQUIRED | INTEGERS:
        raise ValueError(f"{source} announces the tensors {sorted(announced)[:10]}, not those of a synset. {WAY_OUT}")
    for name, shape in announced.items():
        fits = shape == [num_states, num_clusters] if name == "residuals" else shape[:1] == [num_clusters]
        if not fits or len(shape) < 2 or min(shape) < 1:
            raise ValueError(
                f"{source} announces {name} of shape {shape[:8]} for {num_states} matched states and {num_clusters} "
                f"clusters. The files do not belong together. {WAY_OUT}"
            )
    with folder.open_tensors(TENSORS_FILE, num_bytes=8 * sum(map(math.prod, announced.values()))) as file:
        file.check_no_others(announced)
        tensors = {
            name: file.read(name, shape=shape, dtypes=("I64",) if name in INTEGERS else ("F32",))
            for name, shape in announced.items()
        }
        residuals = tensors["residuals"]
        if not bool((torch.isfinite(residuals) & (residuals >= 0)).all()):
            raise ValueError(f"{file.path} has residuals that are NaN, infinite or negative. {WAY_OUT}")
        if bool((tensors["log_weights"].abs() > MAX_LOG_WEIGHT).any()):  # NaN is told with its cluster
            raise ValueError(f"{file.path} has log-weights beyond {MAX_LOG_WEIGHT}: no sample weighs so. {WAY_OUT}")
        return tensors


def _check_runs(
    trajectories: list[Trajectory], clusters: ClusterMap, description: SynsetDescription, source: str
) -> None:
    """Checks that all runs are of one model and dataset, and that matched states are recorded."""
    first = trajectories[0]
    for run, trajectory in enumerate(trajectories):
        if trajectory.parameter_shapes != first.parameter_shapes or trajectory.num_rows != clusters.num_rows:
            raise ValueError(
                f"Recorded run {run} of {source} is of another model than the first, or of {trajectory.num_rows} rows "
                f"where the cluster map has {clusters.num_rows}. The files do not belong together. {WAY_OUT}"
            )
    for run, step in description.matched_states:
        if not 0 <= run < len(trajectories) or step not in trajectories[run].state_steps:
            raise ValueError(
                f"{source} was matched at step {step} of run {run}, a state that is not recorded. {WAY_OUT}"
            )


def with_pictures(frame: Any, inputs: Tensor) -> datasets.Dataset:
    """A table of samples, with a column `image` where inputs are pictures, `(num_samples, 1 or 3, height, width)`."""
    table = datasets.Dataset.from_pandas(frame, preserve_index=False)
    if inputs.dim() != 4 or inputs.shape[1] not in (1, 3):
        return table
    low, high = inputs.flatten(1).amin(1), inputs.flatten(1).amax(1)
    scaled = (inputs - low[:, None, None, None]) / (high - low).clamp_min(1e-12)[:, None, None, None]
    pixels = (scaled * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    images = [picture[..., 0] if picture.shape[-1] == 1 else picture for picture in pixels]
    feature = datasets.Image()
    encoded = [feature.encode_example(image) for image in images]
    return table.add_column("image", encoded, feature=feature)


def synset_card(synset: Synset, options: CardOptions | None = None) -> str:
    """The `README.md` of a synset."""
    options = options or CardOptions()
    described = synset.model_description
    by_checkpoints = any(FROM_CHECKPOINTS in trajectory.metadata for trajectory in synset.trajectories)
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
        num_runs=f"{len(synset.trajectories)}{' (known by checkpoints)' if by_checkpoints else ''}",
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
