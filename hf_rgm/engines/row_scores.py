"""Scores of every training row, block by block: in memory, or in a folder as they come."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import write_array_header_1_0
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from hf_rgm.clusters.cluster_map import ClusterMap
from hf_rgm.engines.adjoint import AdjointEngine
from hf_rgm.engines.gradient_sources import RowSource
from hf_rgm.engines.request import Evaluation
from hf_rgm.files.writing import remove_unfinished, replacing
from hf_rgm.model.cost_estimates import PieceOfWork, measured
from hf_rgm.model.functional_model import parameters_sha256
from hf_rgm.model.padding import batches_by_length
from hf_rgm.model.row_gradients import row_derivatives

DIGITS = 16
MAX_ROWS_AT_ONCE, FIRST_ROWS = 256, 8
TEXTS_AT_ONCE = 1024
"""Texts that are read together: the more, the more of them have one length and go through the model together."""

MIN_BLOCK_ROWS, MAX_BLOCK_ROWS, MAX_BLOCK_BYTES = 1024, 2**16, 2**26
BLOCKS = 64
"""Blocks of rows, as long as none is shorter or longer than the bounds above: few files, and work for many."""


@dataclass(frozen=True)
class ScoreBlock:
    """
    Scores that are computed, and saved, together.

    Args:
        values (`range`): Values of the objective.
        rows (`range`): Training rows.
    """

    values: range
    rows: range

    @property
    def size(self) -> int:
        """Number of scores."""
        return len(self.values) * len(self.rows)

    @property
    def place(self) -> tuple[slice, slice]:
        """Where they are in the matrix."""
        return slice(self.values.start, self.values.stop), slice(self.rows.start, self.rows.stop)


def score_blocks(num_values: int, num_rows: int, *, values_at_once: int) -> list[list[ScoreBlock]]:
    """
    The layout of the matrix, the same for any number of processes: for each group of values its blocks of rows.

    Args:
        num_values, num_rows (`int`): Shape of the matrix.
        values_at_once (`int`): Values of the objective in a group.
    """
    size = -(-num_rows // (BLOCKS * MIN_BLOCK_ROWS)) * MIN_BLOCK_ROWS
    size = max(1, min(size, MAX_BLOCK_ROWS, MAX_BLOCK_BYTES // (4 * min(num_values, values_at_once))))
    rows = [range(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]
    values = [range(start, min(start + values_at_once, num_values)) for start in range(0, num_values, values_at_once)]
    return [[ScoreBlock(group, part) for part in rows] for group in values]


class RowScorer:
    """
    Scores rows by the adjoint along one recorded run or several, whose mean counts.

    Args:
        evaluations (`Sequence[Evaluation]`): The objective along each run, which has rows.
        rewinds (`Sequence[float]`): Fraction of each training down to which effects are followed.
        disable_tqdm (`bool`): No progress bar.
    """

    def __init__(self, evaluations: Sequence[Evaluation], rewinds: Sequence[float], *, disable_tqdm: bool) -> None:
        self._engines = [AdjointEngine(evaluation.run) for evaluation in evaluations]
        self._rewinds = rewinds
        self._gradients = [own.gradients(engine.form) for own, engine in zip(evaluations, self._engines, strict=True)]
        self._rows = _rows_of(evaluations[0])
        self._processes = evaluations[0].run.processes
        self._disable_tqdm = disable_tqdm
        self._at_once = min(engine.queries_at_once for engine in self._engines)
        self.shape = (len(self._gradients[0]), len(self._rows.reader))

    def scores(self, folder: ScoreFolder | None = None) -> NDArray[np.float32]:
        """
        Scores of all rows.

        Args:
            folder (`ScoreFolder`, *optional*): Where blocks go as they are finished; those that are there are not
                computed again. Several processes need one that all of them see.

        Returns:
            `np.ndarray`: `(num_values, num_rows)`, float32; with a folder mapped from the file in it.

        Raises:
            RuntimeError: If another process failed.
        """
        groups = score_blocks(*self.shape, values_at_once=self._at_once)
        # One process looks at what is left, so that all agree.
        look = folder.finished if folder is not None and self._processes.is_main else lambda _: set()
        finished = self._processes.gather(lambda: look([block for group in groups for block in group]))[0]
        matrix = np.empty(self.shape if folder is None else 0, dtype=np.float32)
        with self._progress() as bar:
            for group in groups:
                pending = [block for block in group if block not in finished]
                if not pending:
                    bar.update(sum(block.size for block in group))
                    continue
                work = functools.partial(
                    self._score, directions=self._directions(group[0].values), folder=folder, matrix=matrix, bar=bar
                )
                for block, others in zip(pending, self._processes.map(work, pending), strict=True):
                    if others is not None:
                        matrix[block.place] = others
        if folder is None:
            return matrix
        self._processes.gather(lambda: folder.join(groups, self.shape) if self._processes.is_main else None)
        return folder.matrix()

    def _progress(self) -> tqdm:
        return tqdm(
            total=self.shape[0] * self.shape[1],
            desc="Scoring rows",
            unit=" scores",
            unit_scale=True,
            disable=self._disable_tqdm or not self._processes.shows_progress,
        )

    def _directions(self, values: range) -> list[dict[int, Tensor]]:
        """For each run; every process follows its share of the objectives back."""
        parts = self._processes.parts(len(values), at_most=len(values))

        def follow(part: range) -> list[dict[int, Tensor]]:
            chosen = values[part.start : part.stop]
            return [
                {state: direction.cpu() for state, direction in engine.directions(gradients(chosen), rewind).items()}
                for engine, gradients, rewind in zip(self._engines, self._gradients, self._rewinds, strict=True)
            ]

        found = self._processes.map(follow, parts)
        device = self._engines[0].run.model.device
        return [
            {state: torch.cat([part[run][state] for part in found]).to(device) for state in found[0][run]}
            for run in range(len(self._engines))
        ]

    def _score(
        self,
        block: ScoreBlock,
        *,
        directions: list[dict[int, Tensor]],
        folder: ScoreFolder | None,
        matrix: NDArray[np.float32],
        bar: tqdm,
    ) -> NDArray[np.float32] | None:
        """Scores a block into the folder or the matrix; returns what other processes have to be told."""
        by_run = [
            row_scores(engine, own, self._rows, block.rows)
            for engine, own in zip(self._engines, directions, strict=True)
        ]
        scores = torch.stack(by_run).mean(0).cpu().numpy()
        bar.update(min(self._processes.count * block.size, bar.total - bar.n))
        if folder is not None:
            folder.write(block, scores)
            return None
        matrix[block.place] = scores
        return scores if self._processes.count > 1 else None


def row_scores(engine: AdjointEngine, directions: dict[int, Tensor], source: RowSource, rows: range) -> Tensor:
    """
    Effect of the presence of some training rows, from their own gradients at the recorded states.

    Args:
        engine (`AdjointEngine`): The engine.
        directions (`dict[int, Tensor]`): What [`LinearEngine.directions`] gave.
        source (`RowSource`): All training rows.
        rows (`range`): Which of them.

    Returns:
        `Tensor`: `(num_values, len(rows))`, float32.
    """
    run, reader = engine.run, source.reader
    at_once, path = _rows_at_once(engine), run.path(engine.rewind)
    read_at_once = TEXTS_AT_ONCE if run.model.main_input_name == "input_ids" else at_once
    result = torch.zeros(len(next(iter(directions.values()))), len(rows), device=run.model.device)
    kept = {state: source.kept_rows(path, engine.form, state) for state in directions}
    for state, gradients in kept.items():
        if gradients is not None:
            result += directions[state] @ gradients[rows.start : rows.stop].float().T / len(reader)
    directions = {state: direction for state, direction in directions.items() if kept[state] is None}
    if not directions:
        return result
    for start in range(0, len(rows), read_at_once):
        batch = rows[start : start + read_at_once]
        inputs, labels = reader.batch(batch)
        for part, some, own in batches_by_length(run.model, inputs, labels, at_once):
            for state, direction in directions.items():
                named = engine.form.named(path.state(state))
                form = None if engine.form.is_whole else engine.form
                change = row_derivatives(run.model, named, direction, some, own, source.row_loss, form)
                result[:, start + part] += change / len(reader)
    return result


def _rows_at_once(engine: AdjointEngine) -> int:
    """Rows whose gradients fit in memory, on their way to scores; in short they are taken one by one."""
    if not engine.form.is_whole:
        return 1
    return max(1, min(MAX_ROWS_AT_ONCE, engine.run.shares.gradients // (12 * engine.run.model.num_parameters)))


def cost_of_row_scores(evaluation: Evaluation, num_values: int) -> PieceOfWork:
    """What scores of all rows take for so many values, from one batch at one state."""
    run, source = evaluation.run, _rows_of(evaluation)
    engine = AdjointEngine(run)
    batch = range(min(_rows_at_once(engine), len(source.reader)))
    at_once = min(num_values, engine.queries_at_once)
    directions = {run.trajectory.num_steps: torch.zeros(at_once, engine.form.length, device=run.model.device)}
    rewind = engine.rewind if evaluation.request.rewind is None else evaluation.request.rewind
    if source.keeps_rows(engine.form, len(run.segments(rewind))):  # taken with the clusters' gradients
        return PieceOfWork(0.0, engine.states_bytes)
    piece = measured(lambda: row_scores(engine, directions, source, batch))
    times = len(run.segments(rewind)) * len(source.reader) / len(batch) / run.processes.count
    return PieceOfWork(-(-num_values // at_once) * times * piece.seconds, engine.states_bytes + piece.peak_bytes)


def _rows_of(evaluation: Evaluation) -> RowSource:
    if evaluation.run.rows is None:
        raise RuntimeError("Scores of rows need the rows.")
    return evaluation.run.rows


def scores_identity(
    evaluations: Sequence[Evaluation], rewinds: Sequence[float], samples_sha256: str
) -> dict[str, Any]:
    """
    What scores of rows depend on, JSON-safe.

    Args:
        evaluations (`Sequence[Evaluation]`): The objective along each recorded run.
        rewinds (`Sequence[float]`): Fraction of each training down to which effects are followed.
        samples_sha256 (`str`): Identity of the synset's samples; empty without a synset.
    """
    request, source = evaluations[0].request, _rows_of(evaluations[0])
    return {
        "parameters_sha256": [parameters_sha256(own.run.trajectory.final.parameters) for own in evaluations],
        "samples_sha256": samples_sha256,
        "dataset_fingerprint": evaluations[0].run.trajectory.dataset_fingerprint,
        "paths": [
            [list(own.run.trajectory.state_steps), own.run.path(rewind).start, own.run.rank]
            for own, rewind in zip(evaluations, rewinds, strict=True)
        ],
        "objective": request.objective.name,
        # Another objective of the same name, loss of rows or collator shows in what they give.
        "values": _digest({"values": evaluations[0].values}),
        "losses": _digest({"losses": _first_losses(evaluations[0])}),
        "queries": _digest({**request.queries.inputs, "labels": request.queries.labels}),
        "labels_per_row": source.row_loss.labels_per_row,
        "label_smoothing": source.row_loss.label_smoothing,
    }


def _first_losses(evaluation: Evaluation) -> Tensor:
    """Losses of the first training rows at the trained parameters."""
    run, source = evaluation.run, _rows_of(evaluation)
    inputs, labels = source.reader.batch(range(min(FIRST_ROWS, len(source.reader))))
    with torch.no_grad():
        return source.row_loss(run.model.logits(run.model.space.unflatten(run.final), inputs), labels)


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


class ScoreFolder:
    """
    Row scores on disk: a file for each block while they are computed, and one matrix when all are there.

    Args:
        parent (`str` or `Path`): Where. Scores of other attributions may be there too.
        identity (`dict`): What the scores depend on, as JSON. Names the folder in `parent`.
    """

    def __init__(self, parent: str | Path, identity: dict[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.folder = Path(parent) / f"row-scores-{digest[:DIGITS]}"
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def _file(self) -> Path:
        return self.folder / "row_scores.npy"

    def _path(self, block: ScoreBlock) -> Path:
        values, rows = block.values, block.rows
        return self.folder / f"block-{values.start}-{values.stop}-{rows.start}-{rows.stop}.npy"

    def finished(self, blocks: Iterable[ScoreBlock]) -> set[ScoreBlock]:
        """Those of some blocks that need not be computed."""
        remove_unfinished(self.folder)
        return {block for block in blocks if self._file.is_file() or self._path(block).is_file()}

    def write(self, block: ScoreBlock, scores: NDArray[np.float32]) -> None:
        """
        Writes a block whole or not at all.

        Raises:
            OSError: If the disk is full or the folder cannot be written; blocks that are there stay.
        """
        with replacing(self._path(block)) as temporary:
            np.save(temporary, scores, allow_pickle=False)

    def join(self, groups: Iterable[Sequence[ScoreBlock]], shape: tuple[int, int]) -> None:
        """
        Makes one file of all blocks and removes them. Takes their size on the disk once more until they are gone.

        Raises:
            OSError: If the disk is full or the folder cannot be written; the blocks stay.
            ValueError: If a block is damaged.
        """
        if not self._file.is_file():
            with replacing(self._file) as temporary, open(temporary, "wb") as file:
                write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
                begin = file.tell()
                for block in (block for group in groups for block in group):
                    for value, scores in zip(block.values, self._read(block), strict=True):
                        file.seek(begin + 4 * (value * shape[1] + block.rows.start))
                        file.write(scores.astype("<f4", copy=False).tobytes())
        for path in self.folder.glob("block-*.npy"):
            path.unlink()

    def matrix(self) -> NDArray[np.float32]:
        """All scores, `(num_values, num_rows)`: mapped, so that only what is looked at takes memory."""
        return np.load(self._file, mmap_mode="c", allow_pickle=False)

    def _read(self, block: ScoreBlock) -> NDArray[np.float32]:
        path, shape = self._path(block), (len(block.values), len(block.rows))
        try:
            scores = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is damaged ({error}). Delete it; its rows will be scored again.") from error
        if scores.shape != shape:
            raise ValueError(f"{path} has shape {scores.shape}, not {shape}. Delete it; it will be made again.")
        return scores


def cluster_sums(row_scores: NDArray[np.float32], clusters: ClusterMap) -> Tensor:
    """Scores of clusters from those of their rows, `(num_values, num_clusters)`, some rows at a time."""
    ids = torch.tensor(clusters.cluster_ids)
    result = torch.zeros(len(row_scores), clusters.num_clusters, dtype=torch.float64)
    size = max(1, MAX_BLOCK_BYTES // (8 * len(row_scores)))
    for start in range(0, len(ids), size):
        some = torch.from_numpy(np.array(row_scores[:, start : start + size], dtype=np.float64))
        result.index_add_(1, ids[start : start + size], some)
    return result.float()
