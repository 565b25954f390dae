"""The explorer as a Space: a folder that the Hub serves."""

from __future__ import annotations

import fnmatch
import logging
import shutil
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import SpaceCard, SpaceCardData

from hf_rgm import __version__
from hf_rgm.explorer.app import ATTRIBUTIONS, TITLE, saved_rows, with_neighbours
from hf_rgm.files.embedded import without_paths
from hf_rgm.files.reading import ArtefactFolder, files_in, printable
from hf_rgm.files.writing import staged_folder
from hf_rgm.hub.artefact import DatasetArtefact
from hf_rgm.hub.cards import escaped
from hf_rgm.hub.repository import is_repo_id
from hf_rgm.results.result import AttributionResult
from hf_rgm.synset.synset import Synset

logger = logging.getLogger(__name__)

ARTEFACTS: dict[str, type[DatasetArtefact]] = {ATTRIBUTIONS: AttributionResult, "synset": Synset}
MODEL_FILES = (
    "config.json generation_config.json adapter_config.json adapter_model.safetensors model*.safetensors "
    "model.safetensors.index.json tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json "
    "vocab.json vocab.txt merges.txt tokenizer.model spiece.model sentencepiece.bpe.model chat_template.jinja "
    "preprocessor_config.json processor_config.json"
).split()
"""Patterns of the files that a model and its tokenizer load from."""

MARKER = "hf-rgm-space.txt"
"""Marks folders that may be replaced."""

GRADIO_VERSION = "6.31.0"
APP = '''"""Shows training-data attributions. Written by `hf-rgm explore --space`; edit it as you like."""

from pathlib import Path
from typing import Any

from hf_rgm.explorer.app import explore

HERE = Path(__file__).parent

demo = explore(
{arguments}
    title={title!r},
    launch=__name__ == "__main__",
)
'''
ABOUT = """
# {title}

{sign}

Made with [hf_rgm](https://arxiv.org/abs/2404.14006): training-data attribution by distilled synsets. `app.py` is the
whole of it; `pip install -r requirements.txt && python app.py` serves it anywhere.
"""


def write_space(
    space_dir: str | Path,
    attributions: str | Path,
    *,
    synset: str | Path | None = None,
    model: str | Path | None = None,
    rows: datasets.Dataset | str | Path | None = None,
    queries: datasets.Dataset | str | Path | None = None,
    title: str = TITLE,
    tokenizer: str | Path | None = None,
) -> Path:
    """
    Writes a folder to push as a Gradio Space, or to run with `python app.py`.

    The content of local folders is copied into it, and everybody who can see the Space can see it. Files that are no
    part of an artefact, model or dataset are left out, with a warning.
    """
    if len(title.splitlines()) != 1:
        raise ValueError(f"`title` must be one line, got {title!r}.")
    given = {"synset": synset, "model": model, "rows": rows, "queries": queries}
    attributions, given = with_neighbours(attributions, given)
    AttributionResult.from_pretrained(attributions)
    left_out: list[str] = []
    sources = {ATTRIBUTIONS: attributions, **given, "tokenizer": tokenizer}
    with staged_folder(space_dir, MARKER) as folder:
        lines = []
        for name, source in sources.items():
            if source is not None:
                place = _place(source, folder, name, left_out)
                lines.append(f"    {'' if name == ATTRIBUTIONS else f'{name}='}{place},")
        (folder / "app.py").write_text(APP.format(arguments="\n".join(lines), title=title), encoding="utf-8")
        (folder / "requirements.txt").write_text(f"hf-rgm[explorer]=={__version__}\n", encoding="utf-8")
        (folder / MARKER).write_text("Written by hf_rgm, which may replace this folder.\n")
        _card(attributions, title).save(folder / "README.md")
    if left_out:
        logger.warning("Left out of %s: %s.", space_dir, ", ".join(map(printable, left_out)))
    return Path(space_dir)


def _place(source: Any, folder: Path, name: str, left_out: list[str]) -> str:
    """Writes what is local into the Space; returns its expression in `app.py`."""
    path = None if isinstance(source, datasets.Dataset) else Path(source)
    if path is not None and not path.is_dir():
        if name in ("rows", "queries") or not isinstance(source, str) or not is_repo_id(source):
            raise FileNotFoundError(f"`{name}`: there is no folder {source}. Save it there first, or pass another.")
        return repr(source)
    regular, links = (set(), set()) if path is None else files_in(path)
    if name in ("rows", "queries"):
        if links:
            raise ValueError(f"{source} has the link {min(links)}, which is not followed. Put the file itself there.")
        without_paths(saved_rows(source), f"`{name}`").save_to_disk(folder / name)
    elif path is not None and name in ARTEFACTS:
        left_out += ARTEFACTS[name].write_anew(ArtefactFolder(path), folder / name)
    elif path is not None:
        chosen = {file for pattern in MODEL_FILES for file in fnmatch.filter(regular, pattern) if "/" not in file}
        (folder / name).mkdir()
        for file in chosen:
            shutil.copyfile(path / file, folder / name / file)
        left_out += sorted((regular | links) - chosen)
    return f'HERE / "{name}"'


def _card(attributions: str | Path, title: str) -> SpaceCard:
    data = SpaceCardData(
        title=title, sdk="gradio", sdk_version=GRADIO_VERSION, app_file="app.py", python_version="3.11"
    )
    if not Path(attributions).is_dir():
        data.datasets = [str(attributions)]
    about = ABOUT.format(title=escaped(title), sign=AttributionResult.SIGN_CONVENTION)
    return SpaceCard(f"---\n{data.to_yaml()}\n---\n{about}")
