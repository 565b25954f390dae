"""Ground truth: models trained again without some rows."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import Timeout
from numpy.typing import NDArray
from tqdm.auto import tqdm
from transformers import Trainer

from hf_rgm.engines.objectives import Objective, Queries, resolve_objective
from hf_rgm.fidelity.launch import Launch
from hf_rgm.files.writing import locked, make_folder, read_sealed, replacing, seal
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.losses import LossFunction
from hf_rgm.model.row_reader import DataCollator, RowReader

POLL_SECONDS = 0.2

BuildTrainer = Callable[[Any, int], Trainer]


def retrain(
    build_trainer: BuildTrainer,
    train_dataset: Any,
    subsets: Sequence[Sequence[int] | NDArray[np.integer]],
    queries: Any,
    *,
    seeds: Sequence[int] = (0,),
    objective: str | Objective = "margin",
    data_collator: DataCollator | None = None,
    row_loss: LossFunction | None = None,
    output_dir: str | Path | None = None,
    disable_tqdm: bool = False,
) -> NDArray[np.float32]:
    """
    Objective values of models trained from scratch on subsets of the rows: `(num_subsets, num_seeds, num_values)`.

    `build_trainer(dataset, seed)` returns a fresh `Trainer`: new model, new `TrainingArguments`, everything random
    seeded with `seed`. `subsets` are row indices to keep, in any order; a row named twice is there twice. `output_dir`
    keeps a file per finished retraining, which is not done again; use another folder for another model, dataset,
    objective or other queries. `row_loss` is what the objective `"loss"` is of labels that are numbers.

    The same script under `torchrun --nproc_per_node N` or `accelerate launch` shares the retrainings among the
    processes through `output_dir`, which all must see. Each `Trainer` trains alone on its process's own device; every
    process returns everything. A process that has finished its share takes over retrainings that no process is working
    on, also of processes that died (`torchrun` ends them all when one fails; started again, they continue). Accelerate
    knows a single process afterwards, so give retraining a script of its own.
    """
    for name, values in (("subsets", subsets), ("seeds", seeds)):
        if len(values) == 0:
            raise ValueError(f"`{name}` is empty. Name at least one.")
    kept = [_checked(rows, index, len(train_dataset)) for index, rows in enumerate(subsets)]
    launch = Launch.from_environment()
    folder = Path(output_dir) if output_dir is not None else None
    if folder is not None:
        make_folder(folder)
    elif launch.count > 1:
        raise ValueError(
            f"`output_dir` is missing: {launch.count} processes share retrainings through a folder. Pass one that all "
            "of them see."
        )
    digests = [hashlib.sha256(rows.tobytes()).hexdigest()[:20] for rows in kept]
    rows_of = dict(zip(digests, kept, strict=True))
    jobs = [(digest, seed) for digest in rows_of for seed in dict.fromkeys(seeds)]
    worker = _Worker(build_trainer, train_dataset, queries, objective, data_collator, row_loss)
    finished: dict[tuple[str, int], NDArray[np.float32]] = {}
    bar = tqdm(total=len(jobs), desc="Retraining", disable=disable_tqdm or launch.local_index > 0)
    with launch.alone(), bar:
        pending = [jobs[index] for index in launch.order(len(jobs))]
        while pending:
            for digest, seed in pending:
                path = folder / f"{digest}-{seed}.npy" if folder is not None else None
                values = worker.values(rows_of[digest], seed, path)
                if values is not None:
                    finished[digest, seed] = values
                    bar.update()
            elsewhere = [job for job in pending if job not in finished]
            if len(elsewhere) == len(pending):
                time.sleep(POLL_SECONDS)
            pending = elsewhere
    lengths = {len(values) for values in finished.values()}
    if len(lengths) > 1:
        raise ValueError(
            f"The files in {folder} hold {' and '.join(map(str, sorted(lengths)))} values each: some are of other "
            "queries or another objective. Use a folder for each."
        )
    return np.stack([[finished[digest, seed] for seed in seeds] for digest in digests])


@dataclass
class _Worker:
    """Trains on rows and evaluates the objective."""

    build_trainer: BuildTrainer
    train_dataset: Any
    queries: Any
    objective: str | Objective
    data_collator: DataCollator | None
    row_loss: LossFunction | None
    checked: bool = False

    def values(self, rows: NDArray[np.int64], seed: int, path: Path | None) -> NDArray[np.float32] | None:
        """Values read from the file or trained now; `None` while another process trains them."""
        if path is None:
            return self._train(rows, seed)
        if not path.is_file():
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(locked(path, blocking=False))
                except Timeout:
                    return None
                if not path.is_file():  # else another process has finished it
                    values = self._train(rows, seed)
                    with replacing(path) as temporary:
                        np.save(temporary, values, allow_pickle=False)
                        seal(temporary)
        return read_sealed(path)

    def _train(self, rows: NDArray[np.int64], seed: int) -> NDArray[np.float32]:
        dataset = self.train_dataset
        kept = dataset.select(rows) if hasattr(dataset, "select") else [dataset[int(row)] for row in rows]
        trainer = self.build_trainer(kept, seed)
        if trainer.args.world_size > 1:
            raise RuntimeError(
                f"`build_trainer` returned a `Trainer` that trains on {trainer.args.world_size} processes together. "
                "Make its `TrainingArguments` inside `build_trainer`, without `use_configured_state`."
            )
        if not self.checked:
            self._evaluate(trainer.model)  # raises for bad queries and objectives before the first training
            self.checked = True
        trainer.train()
        return self._evaluate(trainer.model)

    def _evaluate(self, model: Any) -> NDArray[np.float32]:
        functional = FunctionalModel(model)
        reader = RowReader(self.queries, functional, data_collator=self.data_collator, what="queries")
        batch = Queries(*reader.batch(range(len(reader))), self.row_loss)
        parameters = functional.space.flatten(functional.parameters())
        objective = resolve_objective(self.objective, functional)
        return objective.values(functional, parameters, batch).cpu().numpy()


def _checked(rows: Sequence[int] | NDArray[np.integer], index: int, num_rows: int) -> NDArray[np.int64]:
    array = np.asarray(rows)
    if array.size and (array.ndim != 1 or array.dtype.kind not in "iu"):
        raise ValueError(
            f"Subset {index} must be a list of row indices, got {array.dtype} of shape {array.shape}. Turn a mask "
            "into indices with `numpy.flatnonzero(mask)`."
        )
    array = np.sort(array.astype(np.int64))
    if len(array) == 0 or array[0] < 0 or array[-1] >= num_rows:
        what = "is empty" if len(array) == 0 else f"names rows {array[0]} to {array[-1]}"
        raise ValueError(f"Subset {index} {what}; rows must lie in 0 to {num_rows - 1}.")
    return array
