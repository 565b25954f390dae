import io

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from hf_rgm.pages.shown_rows import MAX_CHARACTERS, MAX_PIXELS, NOT_SHOWN, card_of, png_of, shown_row


def opened(png):
    return np.asarray(Image.open(io.BytesIO(png)))


@pytest.mark.parametrize(
    "pixels", [torch.arange(4.0).reshape(1, 2, 2), np.arange(4).reshape(2, 2), [[[0.0, 1.0], [2.0, 3.0]]]]
)
def test_arrays_become_pictures_of_the_full_range(pixels):
    item = card_of({"pixel_values": pixels, "labels": torch.tensor(3)}, label_names={3: "cat"})
    np.testing.assert_array_equal(opened(item.picture), [[0, 85], [170, 255]])
    assert (item.text, item.label) == ("", "cat")


def test_pictures_in_colour_and_large_ones():
    pixels = np.zeros((3, 2, 4))
    pixels[0] = 1
    np.testing.assert_array_equal(opened(png_of(pixels)), np.broadcast_to([255, 0, 0], (2, 4, 3)))
    item = card_of({"image": Image.new("RGB", (4 * MAX_PIXELS, 10), "red"), "label": 0})
    assert opened(item.picture).shape[1] == MAX_PIXELS
    deep = card_of({"image": Image.fromarray(np.array([[0, 65535]], dtype=np.uint16))})
    np.testing.assert_array_equal(opened(deep.picture), [[0, 255]])


def test_a_column_of_pictures_of_datasets():
    rows = Dataset.from_dict({"image": [np.full((2, 2), 7, dtype=np.uint8)], "label": [1]})
    assert opened(card_of(rows[0]).picture).shape == (2, 2)


def test_texts_are_shown_alone_or_with_the_names_of_their_columns():
    assert card_of({"text": "so <b>good", "label": 1}).text == "so <b>good"
    assert card_of({"premise": "a", "hypothesis": "b", "score": 2}).text == "premise: a\nhypothesis: b"
    assert card_of({"length": 3, "width": 0.5, "labels": 2}).text == "length: 3\nwidth: 0.5"
    assert card_of("plain").text == "plain"
    long = card_of({"text": "x" * 9999}).text
    assert len(long) == MAX_CHARACTERS and long.endswith("…")


def test_tokens_are_read_by_the_tokenizer():
    class Tokenizer:
        def decode(self, ids, skip_special_tokens):
            return f"{ids} {skip_special_tokens}"

    row = {"input_ids": torch.tensor([5, 6]), "attention_mask": torch.tensor([1, 1])}
    assert card_of(row, tokenizer=Tokenizer()).text == "[5, 6] True"


@pytest.mark.parametrize("label", [None, [1, 2], torch.tensor([1, 2]), -100])
def test_what_is_no_single_label_is_not_shown(label):
    assert card_of({"text": "a", "labels": label}).label is None


@pytest.mark.parametrize(
    "pixels", [np.zeros((5, 2, 2)), np.full((2, 2), np.nan), np.zeros((0, 2)), [["1"]], [[1], [2, 3]], [[[None]]]]
)
def test_what_is_no_picture_is_shown_as_text(pixels):
    assert png_of(pixels) is None
    card = card_of({"pixels": pixels})
    assert card.picture is None and card.text == f"pixels: {pixels}"


def test_a_picture_s_path_is_not_opened(tmp_path):
    Image.new("RGB", (2, 2), "red").save(tmp_path / "private.png")
    content = (tmp_path / "private.png").read_bytes()
    features = Features({"image": ImageFeature(), "label": Value("int64")})
    values = [
        {"bytes": None, "path": str(tmp_path / "private.png")},
        {"bytes": content, "path": "/nowhere/x.png"},
        {"bytes": b"%!PS-Adobe-3.0 EPSF-3.0", "path": None},
    ]
    rows = Dataset.from_dict({"image": values, "label": [0, 1, 2]}, features=features)
    by_path, by_bytes, broken = (card_of(shown_row(rows, position)) for position in range(3))
    for card in (by_path, broken):
        assert card.picture is None and NOT_SHOWN in card.text and "private" not in card.text
    np.testing.assert_array_equal(opened(by_bytes.picture), np.broadcast_to([255, 0, 0], (2, 2, 3)))
    assert card_of({"image": values[0]}).picture is None
