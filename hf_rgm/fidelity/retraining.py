"""Ground truth: train again without some rows, and see what the model then does."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm
from transformers import Trainer

from hf_rgm.attribution.objectives import Objective, Queries, resolve_objective
from hf_rgm.modeling import FunctionalModel
from hf_rgm.rows import DataCollator, RowReader

logger = logging.getLogger(__name__)

BuildTrainer = Callable[[Any, int], Trainer]
"""Takes a dataset and a seed and returns a fresh `Trainer` for a freshly initialised model."""


def retrain(
    build_trainer: BuildTrainer,
    train_dataset: Any,
    subsets: Sequence[Sequence[int] | NDArray[np.integer]],
    queries: Any,
    *,
    seeds: Sequence[int] = (0,),
    objective: str | Objective = "margin",
    data_collator: DataCollator | None = None,
    output_dir: str | Path | None = None,
    disable_tqdm: bool = False,
) -> NDArray[np.float32]:
    """
    Objective values of models trained from scratch on subsets of the rows.

    Args:
        build_trainer (`Callable`): `build_trainer(dataset, seed)` returns a fresh `Trainer`: new model, new
            `TrainingArguments`, everything random seeded with `seed`.
        train_dataset (`datasets.Dataset` or sequence): All the rows.
        subsets (`Sequence[Sequence[int]]`): Row indices that each retraining keeps.
        queries: Rows the objective is evaluated on, with labels.
        seeds (`Sequence[int]`, *optional*, defaults to `(0,)`): Each subset is retrained once per seed.
        objective (`str` or `Objective`, *optional*, defaults to `"margin"`): What to evaluate.
        data_collator (`Callable`, *optional*): Collates queries. Defaults to `default_data_collator`.
        output_dir (`str` or `Path`, *optional*): One file per finished retraining; what is there is not done again.
            Use another folder for another model, dataset or objective.
        disable_tqdm (`bool`, *optional*, defaults to `False`): No progress bar.

    Returns:
        `np.ndarray`: `(num_subsets, num_seeds, num_values)`, float32.

    Raises:
        ValueError: If there are no subsets or seeds, a subset is empty or names a row that is not there, or the file
            of a finished retraining is damaged.
    """
    for name, values in (("subsets", subsets), ("seeds", seeds)):
        if len(values) == 0:
            raise ValueError(f"`{name}` is empty. Name at least one.")
    subsets = [np.unique(np.asarray(rows, dtype=np.int64)) for rows in subsets]
    for index, rows in enumerate(subsets):
        if len(rows) == 0 or rows[0] < 0 or rows[-1] >= len(train_dataset):
            what = "is empty" if len(rows) == 0 else f"names rows {rows[0]} to {rows[-1]}"
            raise ValueError(f"Subset {index} {what}; rows must lie in 0 to {len(train_dataset) - 1}.")
    objective = resolve_objective(objective)
    folder = Path(output_dir) if output_dir is not None else None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    results = []
    jobs = [(rows, seed) for rows in subsets for seed in seeds]
    for rows, seed in tqdm(jobs, desc="Retraining", disable=disable_tqdm):
        path = folder / f"{hashlib.sha256(rows.tobytes()).hexdigest()[:20]}-{seed}.npy" if folder else None
        if path is not None and path.is_file():
            results.append(_read(path))
            continue
        trainer = build_trainer(_select(train_dataset, rows), seed)
        trainer.train()
        values = _evaluate(trainer.model, queries, objective, data_collator)
        if path is not None:
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            with temporary.open("wb") as file:
                np.save(file, values, allow_pickle=False)
            os.replace(temporary, path)
        results.append(values)
    return np.stack(results).reshape(len(subsets), len(seeds), -1)


def _read(path: Path) -> NDArray[np.float32]:
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}). Delete it; the model will be trained again.") from error


def _select(dataset: Any, rows: NDArray[np.int64]) -> Any:
    return dataset.select(rows) if hasattr(dataset, "select") else [dataset[int(row)] for row in rows]


def _evaluate(
    model: Any, queries: Any, objective: Objective, data_collator: DataCollator | None
) -> NDArray[np.float32]:
    functional = FunctionalModel(model)
    reader = RowReader(queries, functional, data_collator=data_collator, what="queries")
    batch = Queries(*reader.batch(range(len(reader))))
    parameters = functional.space.flatten(functional.parameters())
    return objective.values(functional, parameters, batch).cpu().numpy()
