"""Finds what belongs to attributions, and puts it together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
from transformers import AutoTokenizer, pipeline

from hf_rgm.attribution.attributor import Attributor
from hf_rgm.hub.repository import folder_or_repository
from hf_rgm.model.row_reader import DataCollator
from hf_rgm.pages.exhibit import Exhibit
from hf_rgm.results.result import AttributionResult
from hf_rgm.results.result_files import CONFIG_FILE
from hf_rgm.synset.synset import Synset

ATTRIBUTIONS, SYNSET, MODEL, ROWS, QUERIES = "attributions", "synset", "model", "rows", "queries"
"""Folders that lie beside each other where a demo was written."""


def open_exhibit(
    attributions: AttributionResult | str | Path,
    *,
    synset: Synset | str | Path | None = None,
    model: Any = None,
    rows: Any = None,
    queries: Any = None,
    tokenizer: Any = None,
    data_collator: DataCollator | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Exhibit:
    """
    Reads attributions and, as far as given, what they were made from.

    Args:
        attributions ([`AttributionResult`], `str` or `Path`): A result, its folder, or its repository on the Hub; or a
            folder with `attributions` in it, such as the demo's, whose `synset`, `model`, `rows` and `queries` are
            used unless others are given.
        synset ([`Synset`], `str` or `Path`, *optional*): The synset, its folder or its repository.
        model (`PreTrainedModel`, `str` or `Path`, *optional*): The trained model, its folder or its repository. Needs
            the synset.
        rows (*optional*): The training dataset, or a folder of its `save_to_disk`.
        queries (*optional*): The dataset of the queries in the order of the result, or a folder of its `save_to_disk`.
        tokenizer (`PreTrainedTokenizerBase`, `str` or `Path`, *optional*): Reads synthetic texts, and tokens where a
            dataset has no texts. Defaults to the one beside a model that is named, or the result's.
        data_collator (`Callable`, *optional*): Collates queries. Defaults to `default_data_collator`.
        revision (`str`, *optional*): Branch, tag or commit of the repository of the attributions.
        token (`str` or `bool`, *optional*): Defaults to that of `hf auth login`.

    Returns:
        [`~hf_rgm.pages.exhibit.Exhibit`]

    Raises:
        FileNotFoundError, OSError: If there is no such folder or repository.
        ParameterMismatchError: If model and synset do not belong together.
        ValueError: If something is damaged, or does not belong to the result.
    """
    given = {SYNSET: synset, MODEL: model, ROWS: rows, QUERIES: queries}
    if not isinstance(attributions, AttributionResult):
        attributions, given = with_neighbours(attributions, given)
    synset = given[SYNSET]
    if not isinstance(attributions, AttributionResult):
        attributions = AttributionResult.from_pretrained(attributions, revision=revision, token=token)
    if synset is not None and not isinstance(synset, Synset):
        synset = Synset.from_pretrained(synset, token=token)
    attributor, beside = (None, None) if given[MODEL] is None else _attributor(given[MODEL], synset, token)
    if _named(tokenizer):
        with folder_or_repository(tokenizer):
            tokenizer = AutoTokenizer.from_pretrained(str(tokenizer), token=token)
    return Exhibit(
        attributions,
        synset=synset,
        rows=_dataset(given[ROWS]),
        queries=_dataset(given[QUERIES]),
        attributor=attributor,
        tokenizer=tokenizer or beside,
        data_collator=data_collator,
    )


def with_neighbours(attributions: str | Path, given: dict[str, Any]) -> tuple[str | Path, dict[str, Any]]:
    """
    Attributions, and what is given or else lies beside them where a folder holds them as the demo's does.

    Args:
        attributions (`str` or `Path`): A folder or repository.
        given (`dict[str, Any]`): By name, such as [`SYNSET`]; `None` for what is not given.
    """
    folder = Path(attributions)
    if not (folder / ATTRIBUTIONS / CONFIG_FILE).is_file():
        return attributions, given
    beside = {name: folder / name for name in given if (folder / name).is_dir()}
    found = {name: beside.get(name) if value is None else value for name, value in given.items()}
    return folder / ATTRIBUTIONS, found


def _named(value: Any) -> bool:
    return isinstance(value, str | Path)


def _dataset(given: Any) -> Any:
    if not _named(given):
        return given
    loaded = datasets.load_from_disk(str(given))
    if not isinstance(loaded, datasets.Dataset):
        raise ValueError(f"{given} holds the splits {', '.join(map(str, loaded))}. Pass the dataset of one of them.")
    return loaded


def _attributor(model: Any, synset: Synset | None, token: str | bool | None) -> tuple[Attributor, Any]:
    """What asks the model, and the tokenizer beside it, if it is named and there is one."""
    if synset is None:
        raise ValueError("A model needs its synset to be asked what it would be without clusters. Pass `synset`.")
    if not _named(model):
        return Attributor(model, synset, disable_tqdm=True), None
    build: Any = pipeline  # its overloads know the tasks of transformers only
    with folder_or_repository(model):
        built = build("data-attribution", model=str(model), synset=synset, token=token, disable_tqdm=True)
    return built.attributor, built.tokenizer
