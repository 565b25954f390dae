"""Models, datasets, clusters and functions that are named on the command line."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

TABLE_FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}


def load_object(reference: str) -> Any:
    """Object that `module:name` or `path/to/file.py:name` names; modules are found from the current folder too."""
    where, _, name = reference.rpartition(":")
    if not where or not name:
        raise ValueError(f"{reference!r} must be MODULE:NAME or FILE.py:NAME, such as train.py:build_trainer.")
    file = Path(where)
    sys.path.insert(0, str(file.resolve().parent if file.suffix == ".py" else Path.cwd()))
    if file.suffix != ".py":
        module = importlib.import_module(where)
    elif not file.is_file():
        raise FileNotFoundError(f"There is no file {file}.")
    else:
        spec: Any = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[file.stem] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise ImportError(f"{where} has no {name!r}. Define it at the top level of the module.")
    return getattr(module, name)


def load_objective(name: str) -> Any:
    """Objective: the name of a built-in one, or the object that a reference names."""
    from hf_rgm.engines.objectives import OF_OUTPUTS

    return name if ":" not in name or name.partition(":")[0] in OF_OUTPUTS else load_object(name)


@dataclass
class Loading:
    """Options of how models and datasets are read."""

    model_class: Annotated[
        str | None,
        typer.Option(help="MODULE:CLASS of a model that transformers does not have. Defaults to its config's class."),
    ] = None
    prepare: Annotated[
        str | None,
        typer.Option(
            help="MODULE:FUNCTION or FILE.py:FUNCTION that takes a loaded dataset and returns it as the Trainer gets "
            "it, for example tokenised."
        ),
    ] = None
    data_collator: Annotated[
        str | None,
        typer.Option(
            help="MODULE:OBJECT, the Trainer's collator. Defaults to padding by the model's tokenizer where rows have "
            "input_ids, else to transformers' default."
        ),
    ] = None

    def model(self, name: str, revision: str | None = None) -> Any:
        """Trained model from a folder or repository, in evaluation mode."""
        import transformers

        from hf_rgm.hub.repository import folder_or_repository

        if self.model_class is not None:
            with folder_or_repository(name):
                return load_object(self.model_class).from_pretrained(name, revision=revision or "main").eval()
        if (Path(name) / "adapter_config.json").is_file():
            raise ValueError(
                f"{name} is a PEFT adapter, whose base has to be made first. Pass `--model-class FILE.py:NAME`, an "
                "object whose `from_pretrained(name, revision=...)` returns the adapter on its base."
            )
        with folder_or_repository(name):
            unknown = "If its class is your own, name it: `--model-class MODULE:CLASS`."
            with _explained(f"The config of {name} names no model that transformers knows, or is damaged. {unknown}"):
                config = transformers.AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        named = config.architectures if isinstance(config.architectures, list) else []
        known = [getattr(transformers, entry, None) for entry in named if isinstance(entry, str)]
        classes: list[Any] = [c for c in known if isinstance(c, type) and issubclass(c, transformers.PreTrainedModel)]
        if not classes:
            raise ValueError(
                f"The config of {name} names {config.architectures}, no class of transformers. Name it: "
                "`--model-class MODULE:CLASS`."
            )
        with _explained(f"The model in {name} does not load. Copy or save it again."):
            return classes[0].from_pretrained(name, revision=revision, trust_remote_code=False).eval()

    def queries(self, name: str | None, split: str | None, limit: int | None = None) -> Any:
        """Dataset of queries as `rows` reads it, by default of the split `test`; at most the first `limit`."""
        found = self.rows(name, split, default_split="test")
        return found if found is None or limit is None else found.select(range(min(limit, len(found))))

    def rows(self, name: str | None, split: str | None, *, default_split: str = "train") -> Any:
        """Dataset of a table file, a folder of `save_to_disk`, or a REPOSITORY[:CONFIG]; `None` for no name."""
        if name is None:
            return None
        import datasets

        from hf_rgm.files.embedded import without_paths

        path = Path(name)
        if path.is_file():
            if path.suffix not in TABLE_FORMATS:
                raise ValueError(
                    f"{name} is no table that is read here: its name must end in {', '.join(TABLE_FORMATS)}."
                )
            found: Any = datasets.load_dataset(
                TABLE_FORMATS[path.suffix], data_files=str(path), split=split or "train"
            )
        elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            found = without_paths(datasets.load_from_disk(name), name)
        elif path.suffix in TABLE_FORMATS:
            raise FileNotFoundError(f"There is no file {name}. Check the path, or name a dataset repository.")
        else:
            repository, _, config = (name, "", None) if path.exists() else name.partition(":")
            try:
                found = datasets.load_dataset(
                    repository, config or None, split=split or default_split, trust_remote_code=False
                )
            except (ConnectionError, FileNotFoundError) as error:
                if path.exists():
                    raise
                raise FileNotFoundError(
                    f"There is no file or folder {name} here, and no dataset repository of this name loads: "
                    f"{str(error).splitlines()[0]}"
                ) from error
            found = found if path.exists() else without_paths(found, name)
        if isinstance(found, datasets.DatasetDict):
            part = split or default_split
            if part not in found:
                raise ValueError(f"{name} has no split {part!r}. It has: {', '.join(map(str, found))}.")
            found = found[part]
        return found if self.prepare is None else load_object(self.prepare)(found)

    def collator(self, rows: Any, model_name: str, revision: str | None = None) -> Any:
        """Collator that is named, or padding by the model's tokenizer for rows of tokens, or `None` for other rows."""
        if self.data_collator is not None:
            return load_object(self.data_collator)
        if "input_ids" not in (getattr(rows, "column_names", None) or []):
            return None
        from transformers import AutoTokenizer

        from hf_rgm.model.row_reader import padding_collator

        try:
            return padding_collator(
                AutoTokenizer.from_pretrained(model_name, revision=revision, trust_remote_code=False)
            )
        except (OSError, ValueError) as error:
            raise OSError(
                f"Rows have input_ids, but {model_name} has no tokenizer to pad them. Save the tokenizer with the "
                "model, or pass `--data-collator MODULE:OBJECT`."
            ) from error


@contextlib.contextmanager
def _explained(problem: str) -> Iterator[None]:
    """Context that puts a problem before errors of transformers, which may be of any class for damaged files."""
    try:
        yield
    except (MemoryError, OSError):
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        raise ValueError(f"{problem} transformers says: {type(error).__name__}: {said}") from error


def _option(about: str) -> Any:
    return typer.Option(help=about, rich_help_panel="Which row belongs to which cluster (one of them)")


@dataclass
class ClusterOptions:
    """Options of which row belongs to which cluster."""

    cluster_column: Annotated[list[str] | None, _option("Column that names the cluster; may be repeated.")] = None
    cluster_ids: Annotated[
        str | None, _option("File with an integer a row (.npy or text), or a saved ClusterMap.")
    ] = None
    cluster_embeddings: Annotated[str | None, _option("Column or .npy file of vectors, divided by k-means.")] = None
    num_clusters: Annotated[int | None, _option("With embeddings: how many clusters.")] = None
    num_clusters_per_class: Annotated[int | None, _option("With embeddings and labels: how many a class.")] = None
    label_column: Annotated[str | None, _option("With embeddings: no cluster mixes its values.")] = None

    @property
    def given(self) -> bool:
        """Whether any of them is given."""
        return any(astuple(self))

    def clusters(self, rows: Any, *, seed: int) -> Any:
        """`ClusterMap` of the training rows."""
        import numpy as np

        from hf_rgm import ClusterMap

        if sum(map(bool, (self.cluster_column, self.cluster_ids, self.cluster_embeddings))) != 1:
            raise ValueError(
                "Say once which row belongs to which cluster: `--cluster-column NAME`, `--cluster-ids FILE` or "
                "`--cluster-embeddings COLUMN_OR_FILE`."
            )
        if self.cluster_column:
            return ClusterMap.from_column(rows, self.cluster_column)
        if self.cluster_ids:
            ids = Path(self.cluster_ids)
            found = ClusterMap.load(ids) if ids.is_dir() else ClusterMap.from_ids(_read_ids(ids))
            found.check_num_rows(len(rows))
            return found
        name = str(self.cluster_embeddings)
        points = np.load(name, allow_pickle=False) if name.endswith(".npy") else np.asarray(_column(rows, name))
        return ClusterMap.from_embeddings(
            points,
            labels=None if self.label_column is None else np.asarray(_column(rows, self.label_column)),
            num_clusters=self.num_clusters,
            num_clusters_per_class=self.num_clusters_per_class,
            seed=seed,
        )


def find_tokenizer(model: Any, name: str, revision: str | None = None) -> Any:
    """Tokenizer saved with a model of tokens, or `None`; only showing tokens as words needs it."""
    from transformers import AutoTokenizer

    from hf_rgm.model.functional_model import main_input_name
    from hf_rgm.model.row_reader import knows_words

    if main_input_name(model) != "input_ids":
        return None
    try:
        found = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError):
        return None
    return found if knows_words(found) else None


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
