"""The explorer as a Space: a folder that the Hub serves."""

from __future__ import annotations

import shutil
from pathlib import Path

import datasets
from huggingface_hub import SpaceCard, SpaceCardData

from hf_rgm import __version__
from hf_rgm.explorer.app import ATTRIBUTIONS, TITLE, with_neighbours
from hf_rgm.files.writing import staged_folder
from hf_rgm.hub.cards import escaped
from hf_rgm.hub.repository import is_repo_id
from hf_rgm.results.result import AttributionResult

MARKER = "hf-rgm-space.txt"
"""Marks folders that may be replaced."""

GRADIO_VERSION = "6.31.0"
APP = '''"""Shows training-data attributions. Written by `hf-rgm explore --space`; edit it as you like."""

from pathlib import Path

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

    Local folders are copied into it, for everybody who can see the Space.
    """
    if len(title.splitlines()) != 1:
        raise ValueError(f"`title` must be one line, got {title!r}.")
    given = {"synset": synset, "model": model, "rows": rows, "queries": queries}
    attributions, given = with_neighbours(attributions, given)
    AttributionResult.from_pretrained(attributions)
    sources = {ATTRIBUTIONS: attributions, **given, "tokenizer": tokenizer}
    with staged_folder(space_dir, MARKER) as folder:
        lines = []
        for name, source in sources.items():
            if source is not None:
                lines.append(f"    {'' if name == ATTRIBUTIONS else f'{name}='}{_place(source, folder, name)},")
        (folder / "app.py").write_text(APP.format(arguments="\n".join(lines), title=title), encoding="utf-8")
        (folder / "requirements.txt").write_text(f"hf-rgm[explorer]=={__version__}\n", encoding="utf-8")
        (folder / MARKER).write_text("Written by hf_rgm, which may replace this folder.\n")
        _card(attributions, title).save(folder / "README.md")
    return Path(space_dir)


def _place(source: datasets.Dataset | str | Path, folder: Path, name: str) -> str:
    """Copies what is local into the Space; returns its expression in `app.py`."""
    if isinstance(source, datasets.Dataset):
        source.save_to_disk(folder / name)
        return f'HERE / "{name}"'
    if Path(source).is_dir():
        shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns(".*"))
        return f'HERE / "{name}"'
    if name in ("rows", "queries") or isinstance(source, Path) or not is_repo_id(source):
        raise FileNotFoundError(f"`{name}`: there is no folder {source}. Save it there first, or pass another.")
    return repr(source)


def _card(attributions: str | Path, title: str) -> SpaceCard:
    data = SpaceCardData(
        title=title, sdk="gradio", sdk_version=GRADIO_VERSION, app_file="app.py", python_version="3.11"
    )
    if not Path(attributions).is_dir():
        data.datasets = [str(attributions)]
    about = ABOUT.format(title=escaped(title), sign=AttributionResult.SIGN_CONVENTION)
    return SpaceCard(f"---\n{data.to_yaml()}\n---\n{about}")
