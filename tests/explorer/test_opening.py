import sys

import pytest
from datasets import DatasetDict

from hf_rgm.exceptions import ParameterMismatchError
from hf_rgm.explorer.app import explore, open_exhibit
from hf_rgm.testing import tiny_recorded_run, tiny_synset
from tests.pages.tiny import tiny_exhibit


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder laid out as the demo's, without its model."""
    folder = tmp_path_factory.mktemp("demo")
    exhibit = tiny_exhibit()
    exhibit.result.save_pretrained(folder / "attributions")
    tiny_synset().save_pretrained(folder / "synset")
    exhibit.rows.save_to_disk(folder / "rows")
    exhibit.queries.save_to_disk(folder / "queries")
    return folder


def test_what_lies_beside_attributions_is_found(demo):
    exhibit = open_exhibit(demo)
    assert exhibit.synset.num_clusters == 6 and len(exhibit.rows) == 48 and len(exhibit.queries) == 12
    assert not exhibit.can_replay
    alone = open_exhibit(str(demo / "attributions"))
    assert alone.synset is alone.rows is alone.queries is None


def test_a_model_is_put_together_with_its_synset(demo):
    run = tiny_recorded_run()
    assert open_exhibit(demo, model=run.model).can_replay
    with pytest.raises(ValueError, match="Pass `synset`"):
        open_exhibit(demo / "attributions", model=run.model)
    with pytest.raises(ParameterMismatchError):
        open_exhibit(demo, model=tiny_recorded_run(1).model)


def test_a_mistyped_folder_is_named(demo):
    for given in ({"model": "./modle"}, {"tokenizer": "./modle"}, {"model": "runs/modle"}):
        with pytest.raises(OSError, match=f"There is no folder {next(iter(given.values()))} here"):
            open_exhibit(demo, **given)


def test_a_dataset_with_splits_is_refused(demo, tmp_path):
    DatasetDict({"train": tiny_exhibit().rows}).save_to_disk(tmp_path / "rows")
    with pytest.raises(ValueError, match="holds the splits train"):
        open_exhibit(demo, rows=tmp_path / "rows")


def test_without_gradio_it_says_how_to_install_it(demo, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r'pip install "hf-rgm\[explorer\]"'):
        explore(demo)
