from __future__ import annotations

import datasets
import pytest
from PIL import Image

from hf_rgm.files.embedded import without_paths

PICTURE = Image.new("RGB", (2, 2), "red")


def pictures(values, nested=False):
    feature = datasets.List(datasets.Image()) if nested else datasets.Image()
    column = [[value] for value in values] if nested else values
    return datasets.Dataset.from_dict({"image": column}, features=datasets.Features({"image": feature}))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("path", ["/etc/passwd", "https://evil.example/x.png", "train/x.png"])
def test_paths_in_place_of_pictures_are_refused(path, nested):
    rows = pictures([{"bytes": None, "path": path}], nested)
    for given in (rows, datasets.DatasetDict(train=rows)):
        with pytest.raises(ValueError, match="names the file .* in place of a picture"):
            without_paths(given, "me/set")


def test_bytes_are_not_and_neither_are_files_that_the_hub_s_client_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    for nested in (False, True):
        assert without_paths(pictures([PICTURE, None], nested), "me/set")
        assert without_paths(pictures([{"bytes": None, "path": str(tmp_path / "x.png")}], nested), "me/set")
    with pytest.raises(ValueError, match="in place of a picture"):
        without_paths(pictures([{"bytes": None, "path": f"{tmp_path}/../x.png"}]), "me/set")
