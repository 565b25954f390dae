"""Models, datasets, clusters and functions that are named on the command line."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

TABLE_FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}


def load_object(reference: str) -> Any:
    """Object that `module:name` or `path/to/file.py:name` names; modules are found from the current folder too."""
    where, _, name = reference.rpartition(":")
    if not where or not name:
        raise ValueError(f"{reference!r} must be MODULE:NAME or FILE.py:NAME, such as train.py:build_trainer.")
    module = _load_file(Path(where)) if where.endswith(".py") else _load_module(where)
    if not hasattr(module, name):
        raise ImportError(f"{where} has no {name!r}. Define it at the top level of the module.")
    return getattr(module, name)


def load_objective(name: str) -> Any:
    """Objective: the name of a built-in one, or the object that a reference names."""
    return load_object(name) if ":" in name else name


def load_model(name: str, *, model_class: str | None = None, revision: str | None = None) -> Any:
    """Trained model from a folder or repository, in evaluation mode, as `model_class` or the class in its config."""
    import transformers

    from hf_rgm.hub.repository import folder_or_repository

    if model_class is not None:
        with folder_or_repository(name):
            return load_object(model_class).from_pretrained(name, revision=revision or "main").eval()
    if (Path(name) / "adapter_config.json").is_file():
        raise ValueError(
            f"{name} is a PEFT adapter, whose base has to be made first. Pass `--model-class FILE.py:NAME`, an object "
            "whose `from_pretrained(name, revision=...)` returns the adapter on its base."
        )
    with folder_or_repository(name):
        try:
            config = transformers.AutoConfig.from_pretrained(name, revision=revision)
        except ValueError as error:
            raise ValueError(
                f"transformers knows no model of the type that the config of {name} names. If the class is your own, "
                f"name it: `--model-class MODULE:CLASS`. transformers says: {str(error).splitlines()[0]}"
            ) from error
    architectures = [entry for entry in config.architectures or [] if hasattr(transformers, entry)]
    if not architectures:
        raise ValueError(
            f"The config of {name} names {config.architectures}, no class of transformers. Name it: "
            "`--model-class MODULE:CLASS`."
        )
    return getattr(transformers, architectures[0]).from_pretrained(name, revision=revision).eval()


def load_rows(
    name: str | None, *, split: str | None, default_split: str, prepare: str | None = None, limit: int | None = None
) -> Any:
    """
    Dataset of a parquet, JSON or CSV file, a folder of `save_to_disk`, or a REPOSITORY[:CONFIG]; `None` for no name.

    `prepare` names a function to call with it; only the first `limit` rows are kept.
    """
    if name is None:
        return None
    import datasets

    path = Path(name)
    if path.is_file():
        if path.suffix not in TABLE_FORMATS:
            raise ValueError(f"{name} is no table that is read here: its name must end in {', '.join(TABLE_FORMATS)}.")
        found: Any = datasets.load_dataset(TABLE_FORMATS[path.suffix], data_files=str(path), split=split or "train")
    elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        found = datasets.load_from_disk(name)
    elif path.suffix in TABLE_FORMATS:
        raise FileNotFoundError(f"There is no file {name}. Check the path, or name a dataset repository.")
    else:
        repository, _, config = (name, "", None) if path.exists() else name.partition(":")
        try:
            found = datasets.load_dataset(repository, config or None, split=split or default_split)
        except (ConnectionError, FileNotFoundError) as error:
            if path.exists():
                raise
            raise FileNotFoundError(
                f"There is no file or folder {name} here, and no dataset repository of this name loads: "
                f"{str(error).splitlines()[0]}"
            ) from error
    if isinstance(found, datasets.DatasetDict):
        part = split or default_split
        if part not in found:
            raise ValueError(f"{name} has no split {part!r}. It has: {', '.join(map(str, found))}.")
        found = found[part]
    if prepare is not None:
        found = load_object(prepare)(found)
    return found if limit is None else found.select(range(min(limit, len(found))))


def load_collator(reference: str | None, rows: Any, model_name: str, revision: str | None = None) -> Any:
    """Collator that is named, or padding by the model's tokenizer for rows of tokens, or `None` for other rows."""
    if reference is not None:
        return load_object(reference)
    if "input_ids" not in (getattr(rows, "column_names", None) or []):
        return None
    from transformers import AutoTokenizer

    from hf_rgm.model.row_reader import padding_collator

    try:
        return padding_collator(AutoTokenizer.from_pretrained(model_name, revision=revision))
    except (OSError, ValueError) as error:
        raise OSError(
            f"Rows have input_ids, but {model_name} has no tokenizer to pad them. Save the tokenizer with the model, "
            "or pass `--data-collator MODULE:OBJECT`."
        ) from error


def find_tokenizer(model: Any, name: str, revision: str | None = None) -> Any:
    """Tokenizer saved with a model of tokens, or `None`; only showing tokens as words needs it."""
    from transformers import AutoTokenizer

    from hf_rgm.model.functional_model import main_input_name
    from hf_rgm.model.row_reader import knows_words

    if main_input_name(model) != "input_ids":
        return None
    try:
        found = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError):
        return None
    return found if knows_words(found) else None


def load_clusters(
    rows: Any,
    columns: list[str] | None,
    ids: str | None,
    embeddings: str | None,
    num_clusters: int | None,
    num_clusters_per_class: int | None,
    label_column: str | None,
    *,
    seed: int,
) -> Any:
    """`ClusterMap` of the training rows by columns, by a file of ids, or by k-means on a column or file of vectors."""
    import numpy as np

    from hf_rgm import ClusterMap

    if sum((bool(columns), ids is not None, embeddings is not None)) != 1:
        raise ValueError(
            "Say once which row belongs to which cluster: `--cluster-column NAME`, `--cluster-ids FILE` or "
            "`--cluster-embeddings COLUMN_OR_FILE`."
        )
    if columns:
        return ClusterMap.from_column(rows, columns)
    if ids is not None:
        found = ClusterMap.load(ids) if Path(ids).is_dir() else ClusterMap.from_ids(_read_ids(Path(ids)))
        found.check_num_rows(len(rows))
        return found
    name = str(embeddings)
    points = np.load(name, allow_pickle=False) if name.endswith(".npy") else np.asarray(_column(rows, name))
    return ClusterMap.from_embeddings(
        points,
        labels=None if label_column is None else np.asarray(_column(rows, label_column)),
        num_clusters=num_clusters,
        num_clusters_per_class=num_clusters_per_class,
        seed=seed,
    )


def _read_ids(path: Path) -> Any:
    import numpy as np

    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    try:
        return np.loadtxt(path, dtype=np.int64, ndmin=1)
    except ValueError as error:
        raise ValueError(f"{path} must hold an integer a line, the cluster of each row ({error}).") from error


def _column(rows: Any, name: str) -> Any:
    columns = getattr(rows, "column_names", [])
    if name not in columns:
        raise KeyError(f"The dataset has no column {name!r}. It has: {', '.join(columns)}.")
    return rows.with_format("numpy")[name][:]


def _load_module(name: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(name)


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
