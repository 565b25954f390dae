import re
import runpy
import shutil
import sys
from pathlib import Path

import datasets
import pytest
from huggingface_hub import RepoCard
from PIL import Image

import hf_rgm
from hf_rgm.explorer.space import GRADIO_VERSION, write_space
from hf_rgm.testing import tiny_synset
from tests.pages.tiny import tiny_exhibit

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
TITLE = """What "taught" {it} 'this'? \\ # <b>"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    exhibit = tiny_exhibit()
    exhibit.result.save_pretrained(folder / "mine")
    tiny_synset().save_pretrained(folder / "samples")
    exhibit.queries.save_to_disk(folder / "asked")
    return folder


def test_the_folder_serves_what_was_copied_into_it(saved, tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    space = write_space(
        tmp_path / "space", saved / "mine", synset=saved / "samples", queries=saved / "asked", title=TITLE
    )
    (saved / "mine").rename(saved / "moved")
    try:
        monkeypatch.setattr(sys, "argv", ["app.py"])
        demo = runpy.run_path(str(space / "app.py"), run_name="space")["demo"]
    finally:
        (saved / "moved").rename(saved / "mine")
    assert demo.title == TITLE
    shown = "\n".join(str(block.value) for block in demo.blocks.values() if block.get_block_name() == "html")
    assert "Synthetic samples" in shown and 'alt="query, label 0"' in shown
    assert "Pass the training rows" in shown


def test_header_and_requirements(saved, tmp_path):
    space = write_space(tmp_path / "space", saved / "mine", title=TITLE)
    header = RepoCard.load(space / "README.md").data.to_dict()
    assert header["title"] == TITLE
    assert (header["sdk"], header["app_file"]) == ("gradio", "app.py")
    assert (
        f"\ngradio=={header['sdk_version']}\n" in CONSTRAINTS.read_text() and header["sdk_version"] == GRADIO_VERSION
    )
    assert (space / "requirements.txt").read_text() == f"hf-rgm[explorer]=={hf_rgm.__version__}\n"
    assert "<b>" not in (space / "README.md").read_text().split("---\n")[2]


def test_repositories_are_named_and_not_copied(saved, tmp_path):
    space = write_space(tmp_path / "space", saved / "mine", synset="me/synset", model="me/model")
    code = (space / "app.py").read_text()
    assert re.findall(r"^    (.*),$", code, flags=re.MULTILINE)[:3] == [
        'HERE / "attributions"',
        "synset='me/synset'",
        "model='me/model'",
    ]
    assert not (space / "synset").exists()


def test_what_cannot_be_served_is_refused(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder that exists"):
        write_space(tmp_path / "space", "not a repository")
    with pytest.raises(FileNotFoundError, match="`rows`: there is no folder me/rows"):
        write_space(tmp_path / "space", saved / "mine", rows="me/rows")
    with pytest.raises(ValueError, match="`title` must be one line"):
        write_space(tmp_path / "space", saved / "mine", title="a\nb")
    assert not (tmp_path / "space").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "app.py").touch()
    with pytest.raises(FileExistsError):
        write_space(tmp_path / "other", saved / "mine")
    assert (tmp_path / "other" / "app.py").exists()


def test_nothing_else_in_the_folders_leaves_the_machine(saved, tmp_path, caplog):
    mine, model = (Path(shutil.copytree(saved / "mine", tmp_path / name)) for name in ("mine", "model"))
    (tmp_path / "id_rsa").write_text("PRIVATE")
    for folder in (mine, model):
        (folder / "passwords.txt").write_text("PRIVATE")
        (folder / "key.json").symlink_to(tmp_path / "id_rsa")
    (model / "config.json").write_text("{}")
    (model / "tokenizer.json").symlink_to(tmp_path / "id_rsa")
    (mine / "README.md").write_text("<script>PRIVATE</script>")
    (mine / "top" / "train.parquet").unlink()
    (mine / "top" / "train.parquet").symlink_to(tmp_path / "id_rsa")
    space = write_space(tmp_path / "space", mine, synset=saved / "samples", model=model)
    assert not any(b"PRIVATE" in path.read_bytes() for path in space.rglob("*") if path.is_file())
    assert not [path for path in space.rglob("*") if path.is_symlink()]
    assert [path.name for path in (space / "model").iterdir()] == ["config.json"]
    for name in ("key.json", "passwords.txt", "tokenizer.json"):
        assert name in caplog.text


def test_pictures_by_path_are_not_embedded(saved, tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "private.png")
    features = datasets.Features({"image": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": [str(tmp_path / "private.png")] * 48}, features=features)
    with pytest.raises(ValueError, match="in place of a picture"):
        write_space(tmp_path / "space", saved / "mine", rows=rows)


def test_links_beside_attributions_and_in_datasets_are_not_followed(saved, tmp_path):
    demo = tmp_path / "demo"
    shutil.copytree(saved / "mine", demo / "attributions")
    (demo / "queries").symlink_to(saved / "asked", target_is_directory=True)
    assert not (write_space(tmp_path / "space", demo) / "queries").exists()
    linked = Path(shutil.copytree(saved / "asked", tmp_path / "linked"))
    data = next(linked.glob("*.arrow"))
    data.unlink()
    data.symlink_to(next((saved / "asked").glob("*.arrow")))
    with pytest.raises(ValueError, match="which is not followed"):
        write_space(tmp_path / "other", saved / "mine", queries=linked)
