"""Opens attributions with all that belongs to them."""

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

ATTRIBUTIONS = "attributions"
"""Folder of the attributions in a demo, beside `synset`, `model`, `rows` and `queries`."""


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
    Exhibit of objects, folders or repositories on the Hub; `rows` and `queries` are datasets or saved folders.

    `attributions` may be a folder such as the demo's, with all the others beside the attributions.
    """
    given = {"synset": synset, "model": model, "rows": rows, "queries": queries}
    if not isinstance(attributions, AttributionResult):
        attributions, given = with_neighbours(attributions, given)
        attributions = AttributionResult.from_pretrained(attributions, revision=revision, token=token)
    synset = given["synset"]
    if synset is not None and not isinstance(synset, Synset):
        synset = Synset.from_pretrained(synset, token=token)
    attributor, beside = (None, None) if given["model"] is None else _attributor(given["model"], synset, token)
    if isinstance(tokenizer, str | Path):
        with folder_or_repository(tokenizer):
            tokenizer = AutoTokenizer.from_pretrained(str(tokenizer), token=token)
    return Exhibit(
        attributions,
        synset=synset,
        rows=_dataset(given["rows"]),
        queries=_dataset(given["queries"]),
        attributor=attributor,
        tokenizer=tokenizer or beside,
        data_collator=data_collator,
    )


def with_neighbours(attributions: str | Path, given: dict[str, Any]) -> tuple[str | Path, dict[str, Any]]:
    """Attributions and what is given, completed by what lies beside them in a folder such as the demo's."""
    folder = Path(attributions)
    if not (folder / ATTRIBUTIONS / CONFIG_FILE).is_file():
        return attributions, given
    beside = {name: folder / name for name in given if (folder / name).is_dir()}
    return folder / ATTRIBUTIONS, {name: beside.get(name) if v is None else v for name, v in given.items()}


def _dataset(given: Any) -> Any:
    if not isinstance(given, str | Path):
        return given
    loaded = datasets.load_from_disk(str(given))
    if not isinstance(loaded, datasets.Dataset):
        raise ValueError(f"{given} holds the splits {', '.join(map(str, loaded))}. Pass the dataset of one of them.")
    return loaded


def _attributor(model: Any, synset: Synset | None, token: str | bool | None) -> tuple[Attributor, Any]:
    """Attributor of a model, and the tokenizer that is saved with it."""
    if synset is None:
        raise ValueError("Predictions without clusters need the synset of the model. Pass `synset`.")
    if not isinstance(model, str | Path):
        return Attributor(model, synset, disable_tqdm=True), None
    build: Any = pipeline  # its overloads only have the tasks of transformers
    with folder_or_repository(model):
        built = build("data-attribution", model=str(model), synset=synset, token=token, disable_tqdm=True)
    return built.attributor, built.tokenizer
