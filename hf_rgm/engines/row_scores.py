"""Scores of every training row, computed in blocks: in memory, or saved to a folder."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
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
from hf_rgm.engines.gradient_sources import ROWS_AT_ONCE, RowSource
from hf_rgm.engines.memory_shares import ranges
from hf_rgm.engines.recorded_run import RecordedRun, given
from hf_rgm.engines.request import Evaluation
from hf_rgm.files.writing import make_folder, read_sealed, remove_unfinished, replacing, seal
from hf_rgm.model.code_digest import code_digest
from hf_rgm.model.cost_estimates import PieceOfWork, measured
from hf_rgm.model.functional_model import parameters_sha256
from hf_rgm.model.losses import RowLoss
from hf_rgm.model.row_gradients import MAX_FORWARD_DIRECTIONS, row_derivatives, row_gradients
from hf_rgm.model.row_reader import RowReader

# Blocks of rows, as long as none is shorter or longer than the bounds: few files, and work for many processes.
BLOCKS = 64
MIN_BLOCK_ROWS, MAX_BLOCK_ROWS, MAX_BLOCK_BYTES = 1024, 2**16, 2**26


@dataclass(frozen=True)
class ScoreBlock:
    """Part of the score matrix that is computed and saved together."""

    values: range
    rows: range

    @property
    def size(self) -> int:
        return len(self.values) * len(self.rows)

    @property
    def place(self) -> tuple[slice, slice]:
        return slice(self.values.start, self.values.stop), slice(self.rows.start, self.rows.stop)


def score_blocks(num_values: int, num_rows: int, *, values_at_once: int) -> list[list[ScoreBlock]]:
    """Blocks of the matrix for each group of values, the same for any number of processes."""
    size = math.ceil(num_rows / (BLOCKS * MIN_BLOCK_ROWS)) * MIN_BLOCK_ROWS
    size = max(1, min(size, MAX_BLOCK_ROWS, MAX_BLOCK_BYTES // (4 * min(num_values, values_at_once))))
    rows = ranges(num_rows, size)
    return [[ScoreBlock(group, part) for part in rows] for group in ranges(num_values, values_at_once)]


# Sums of rows' gradients by cluster, (num_clusters, length), at some states.
Sums = Mapping[int, Tensor]


class RowScorer:
    """Scores rows by the adjoint engine: means over recorded runs, each of which has rows."""

    def __init__(self, evaluations: Sequence[Evaluation], rewinds: Sequence[float], *, disable_tqdm: bool) -> None:
        self._engines = [AdjointEngine(evaluation.run) for evaluation in evaluations]
        self._rewinds = rewinds
        self._gradients = [own.gradients(engine.form) for own, engine in zip(evaluations, self._engines, strict=True)]
        self._rows = _rows_of(evaluations[0].run)
        self._processes = evaluations[0].run.processes
        self._disable_tqdm = disable_tqdm
        self._at_once = min(engine.queries_at_once for engine in self._engines)
        self.shape = (len(self._gradients[0]), len(self._rows.reader))

    def scores(self, folder: ScoreFolder | None = None) -> NDArray[np.float32]:
        """
        Scores of all rows, `(num_values, num_rows)`, float32; with a folder mapped from the file in it.

        Blocks that the folder has already are not computed again. Several processes need a folder that all can see.
        """
        for engine, rewind in zip(self._engines, self._rewinds, strict=True):
            rows, path = _rows_of(engine.run), engine.run.path(rewind)
            if rows.keeps_rows(engine.form, len(path.segments())):
                rows.gradients(path, engine.form)
        groups = score_blocks(*self.shape, values_at_once=self._at_once)
        blocks = [block for group in groups for block in group]
        # One process looks at what is left, so that all agree.
        looks = folder is not None and self._processes.is_main
        finished = self._processes.gather(lambda: folder.finished(blocks) if folder and looks else set())[0]
        matrix = np.empty(self.shape if folder is None else 0, dtype=np.float32)
        quiet = self._disable_tqdm or not self._processes.shows_progress
        bar = tqdm(total=math.prod(self.shape), desc="Scoring rows", unit=" scores", unit_scale=True, disable=quiet)

        def work(
            directions: list[dict[int, Tensor]], sums: list[Sums], block: ScoreBlock
        ) -> NDArray[np.float32] | None:
            runs = zip(self._engines, directions, sums, strict=True)
            by_run = [row_scores(engine, own, self._rows, block.rows, to) for engine, own, to in runs]
            scores = torch.stack(by_run).mean(0).cpu().numpy()
            bar.update(min(self._processes.count * block.size, bar.total - bar.n))
            if folder is not None:
                folder.write(block, scores)
                return None
            matrix[block.place] = scores
            return scores if self._processes.count > 1 else None  # for the other processes

        with bar:
            for group in groups:
                pending = [block for block in group if block not in finished]
                if not pending:
                    bar.update(sum(block.size for block in group))
                    continue
                directions = self._directions(group[0].values)
                # A pass over all rows gives the clusters' gradients too.
                is_whole = len(pending) == len(group)
                sums = [_unknown_sums(*run) if is_whole else {} for run in zip(self._engines, directions, strict=True)]
                own = functools.partial(work, directions, sums)
                for block, others in zip(pending, self._processes.map(own, pending), strict=True):
                    if others is not None:
                        matrix[block.place] = others
                for engine, known in zip(self._engines, sums, strict=True):
                    if known:
                        rows, states = _rows_of(engine.run), [*known]
                        rows.keep(engine.run.trajectory, engine.form, states, torch.stack([*known.values()]))
        if folder is None:
            return matrix
        self._processes.gather(lambda: folder.join(blocks, self.shape) if self._processes.is_main else None)
        return folder.matrix()

    def _directions(self, values: range) -> list[dict[int, Tensor]]:
        """Directions of some values along each run; every process computes those of its share."""
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


def _unknown_sums(engine: AdjointEngine, directions: dict[int, Tensor]) -> Sums:
    if len(next(iter(directions.values()))) <= MAX_FORWARD_DIRECTIONS:
        return {}  # forward mode has no gradients
    return _rows_of(engine.run).unknown_sums(engine.run.trajectory, engine.form, [*directions])


def row_scores(
    engine: AdjointEngine,
    directions: dict[int, Tensor],
    source: RowSource,
    rows: range,
    sums: Sums | None = None,
) -> Tensor:
    """
    Scores of some training rows by directions of the adjoint, `(num_values, len(rows))`, float32.

    Adds the rows' gradients to `sums`, `(num_clusters, length)` by state, where there are any.
    """
    run, path, form = engine.run, engine.run.path(engine.rewind), engine.form
    num_rows, clusters = len(source.reader), torch.tensor(source.clusters.cluster_ids).to(run.model.device)
    result = torch.zeros(len(next(iter(directions.values()))), len(rows), device=run.model.device)
    # 1/n times the sum over segments of <u, grad of the row's loss>, from kept sketches where there are any.
    missing, weights = {}, source.weights(path)
    for state, direction in directions.items():
        kept = source.kept_rows(path, form, state)
        if kept is None:
            missing[state] = direction
        else:
            own = weights[state][rows.start : rows.stop] if weights else 1.0
            result += direction @ kept[rows.start : rows.stop].float().T * (own / num_rows)
    for part, inputs, labels in source.batches(rows, form, run.shares.gradients // 3) if missing else ():
        for state, direction in missing.items():
            named = form.named(path.state(state))
            own = weights[state][rows.start + part] if weights else torch.ones_like(part, dtype=torch.float32)
            if sums:
                gradients = row_gradients(run.model, named, inputs, labels, source.row_loss, form)
                change = direction @ gradients.T
                sums[state].index_add_(0, clusters[rows.start + part], gradients * own[:, None], alpha=1 / num_rows)
            else:
                sketch = None if form.is_whole else form  # whole directions may go in forward mode
                change = row_derivatives(run.model, named, direction, inputs, labels, source.row_loss, sketch)
            result[:, part] += change * (own / num_rows)
    return result


def cost_of_row_scores(evaluation: Evaluation, num_values: int) -> PieceOfWork:
    """Cost of the scores of all rows for so many values, from one batch at one state."""
    run, source = evaluation.run, _rows_of(evaluation.run)
    engine = AdjointEngine(run)
    batch = range(min(ROWS_AT_ONCE, engine.form.at_once(run.shares.gradients // 3), len(source.reader)))
    at_once = min(num_values, engine.queries_at_once)
    directions = {run.trajectory.num_steps: torch.zeros(at_once, engine.form.length, device=run.model.device)}
    rewind = engine.rewind if evaluation.request.rewind is None else evaluation.request.rewind
    if source.keeps_rows(engine.form, len(run.segments(rewind))):  # computed with the clusters' gradients
        return PieceOfWork(0.0, engine.states_bytes)
    piece = measured(lambda: row_scores(engine, directions, source, batch))
    times = len(run.segments(rewind)) * len(source.reader) / len(batch) / run.processes.count
    return PieceOfWork(math.ceil(num_values / at_once) * times * piece.seconds, engine.states_bytes + piece.peak_bytes)


def _rows_of(run: RecordedRun) -> RowSource:
    return given(run.rows, "the training rows")


def scores_identity(
    evaluations: Sequence[Evaluation], rewinds: Sequence[float], samples_sha256: str
) -> dict[str, Any]:
    """Everything that scores of rows depend on, JSON-safe; the digest is empty without a synset."""
    request, run, source = evaluations[0].request, evaluations[0].run, _rows_of(evaluations[0].run)
    return {
        "parameters_sha256": [parameters_sha256(own.run.trajectory.final.parameters) for own in evaluations],
        "samples_sha256": samples_sha256,
        "dataset_fingerprint": run.trajectory.dataset_fingerprint,
        "paths": [
            [list(own.run.trajectory.state_steps), own.run.path(rewind).start, own.run.rank]
            for own, rewind in zip(evaluations, rewinds, strict=True)
        ],
        "objective": request.objective.name,
        # Values and code tell apart objectives of one name.
        "objective_code": code_digest(request.objective.function),
        "values": _digest({"values": evaluations[0].values}),
        "queries": _digest({**request.queries.inputs, "labels": request.queries.labels}),
    } | rows_identity(source.reader, source.row_loss)


def rows_identity(reader: RowReader, row_loss: RowLoss) -> dict[str, Any]:
    """All rows as they are collated, and the code of their loss, JSON-safe."""
    digest = hashlib.sha256()
    for rows in ranges(len(reader), ROWS_AT_ONCE):
        inputs, labels = reader.batch(rows)
        digest.update(_digest({**inputs, "labels": labels}).encode())
    return {
        "batches": digest.hexdigest(),
        "row_loss": None if row_loss.function is None else code_digest(row_loss.function),
        "labels_per_row": row_loss.labels_per_row,
        "label_smoothing": row_loss.label_smoothing,
        "loss_scale": row_loss.scale,
    }


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


class ScoreFolder:
    """Folder of row scores, named by the digest of its identity: a file per block, at last one for the matrix."""

    def __init__(self, parent: str | Path, identity: dict[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.folder = Path(parent) / f"row-scores-{digest[:16]}"
        make_folder(self.folder)

    @property
    def _file(self) -> Path:
        return self.folder / "row_scores.npy"

    def _path(self, block: ScoreBlock) -> Path:
        values, rows = block.values, block.rows
        return self.folder / f"block-{values.start}-{values.stop}-{rows.start}-{rows.stop}.npy"

    def finished(self, blocks: Iterable[ScoreBlock]) -> set[ScoreBlock]:
        """Blocks that need not be computed."""
        remove_unfinished(self.folder)
        return {block for block in blocks if self._file.is_file() or self._path(block).is_file()}

    def write(self, block: ScoreBlock, scores: NDArray[np.float32]) -> None:
        """Writes a block completely or not at all."""
        with replacing(self._path(block)) as temporary:
            np.save(temporary, scores, allow_pickle=False)
            seal(temporary)

    def join(self, blocks: Iterable[ScoreBlock], shape: tuple[int, int]) -> None:
        """Joins all blocks to one file and removes them; needs their size on the disk once more."""
        if not self._file.is_file():
            with replacing(self._file) as temporary:
                with open(temporary, "wb") as file:
                    write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
                    begin = file.tell()
                    for block in blocks:
                        for value, scores in zip(block.values, self._read(block), strict=True):
                            file.seek(begin + 4 * (value * shape[1] + block.rows.start))  # float32
                            file.write(scores.astype("<f4", copy=False).tobytes())
                seal(temporary)
        for path in self.folder.glob("block-*.npy"):
            path.unlink()

    def matrix(self) -> NDArray[np.float32]:
        """All scores, `(num_values, num_rows)`, memory-mapped."""
        return read_sealed(self._file, mmap_mode="c")

    def _read(self, block: ScoreBlock) -> NDArray[np.float32]:
        path, shape = self._path(block), (len(block.values), len(block.rows))
        scores = read_sealed(path)
        if scores.shape != shape:
            raise ValueError(f"{path} has shape {scores.shape}, not {shape}. Delete it; it will be made again.")
        return scores


def cluster_sums(row_scores: NDArray[np.float32], clusters: ClusterMap) -> Tensor:
    """Scores of clusters, `(num_values, num_clusters)`: sums of their rows' scores, in parts that fit into memory."""
    ids = torch.tensor(clusters.cluster_ids)
    result = torch.zeros(len(row_scores), clusters.num_clusters, dtype=torch.float64)
    for rows in ranges(len(ids), max(1, MAX_BLOCK_BYTES // (8 * len(row_scores)))):  # float64
        some = torch.from_numpy(np.array(row_scores[:, rows.start : rows.stop], dtype=np.float64))
        result.index_add_(1, ids[rows.start : rows.stop], some)
    return result.float()
