from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from datasets import load_from_disk

from hf_rgm.attribution.attributor import Attributor
from hf_rgm.demo import (
    CULPRIT,
    GIVEN_LABEL,
    TRUE_LABEL,
    VENDORS,
    DemoSettings,
    build_trainer,
    inspection_order,
    load_data,
    loss_order,
    right_answers,
    run_demo,
    share_found,
)
from hf_rgm.explorer.app import open_exhibit
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.pages.views import fidelity_line
from hf_rgm.results.result import AttributionResult
from hf_rgm.testing import tiny_recorded_run, tiny_synset

TINY = DemoSettings(num_rows=120, num_queries=8, num_epochs=1, num_iterations=3, num_subsets=5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder, lines = tmp_path_factory.mktemp("demo") / "out", []
    torch.manual_seed(0)
    assert run_demo(folder, say=lines.append, settings=TINY, disable_tqdm=True) == folder
    return folder, lines


def test_everything_is_written_and_can_be_used(finished):
    folder, _ = finished
    assert {"model", "synset", "attributions", "rows", "queries", "plots", "report.html", "trajectory"} <= {
        p.name for p in folder.iterdir()
    }
    assert all(path.stat().st_size > 0 for path in folder.rglob("*") if path.is_file())
    result = AttributionResult.from_pretrained(folder / "attributions")
    data = load_data(TINY)
    model = build_trainer(TINY)(data.train, 0).model
    loaded = type(model).from_pretrained(folder / "model")
    misread = np.flatnonzero(~right_answers(loaded, data.queries))
    assert result.scores.shape == (len(misread), 8)
    assert result.row_scores is not None
    assert result.row_scores.shape == (len(misread), 120)
    again = Attributor(loaded, folder / "synset", disable_tqdm=True).attribute(
        data.queries.select(misread), rows=data.train
    )
    np.testing.assert_allclose(again.scores, result.scores, rtol=1e-4, atol=1e-6)


def test_it_tells_what_it_does(finished):
    folder, lines = finished
    text = "\n".join(lines)
    for part in (
        "on 120 digits from 8 vendors",
        "test digits are read rightly",
        AttributionResult.SIGN_CONVENTION,
        "on average; the others:",
        "Retraining without each vendor takes 8",
        "vendor C labels its 4s as 9s: 6 of 120 labels are wrong",
        "first 5%: row scores",
        "first 10%: row scores",
        "random 10% of the wrong labels found",
        "without retraining. Retrained, it reads",
        "80 synthetic digits stand in for 120 real ones",
        "10 retrainings, each on a random half of the vendors",
        "(LDS), by the digits",
        "(LDS), by the synset alone",
        "times the sums of scores",
        str(folder.resolve()),
    ):
        assert part in text
    assert "nan" not in text.lower()


def test_the_report_stands_alone(finished):
    html = (finished[0] / "report.html").read_text()
    assert "data:image/png;base64," in html
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert "<script src" not in html


def test_the_explorer_opens_the_folder(finished):
    exhibit = open_exhibit(finished[0])
    assert exhibit.can_replay
    assert "(LDS)" in fidelity_line(exhibit.result)
    assert exhibit.query(1).label == str(int(load_from_disk(finished[0] / "queries")[1]["labels"]))
    assert len(exhibit.cluster_rows(0, None)) and len(exhibit.cluster_samples(0))


def test_one_vendor_labels_one_digit_wrongly():
    clean, data = load_data(DemoSettings(wrong_share=0.0)), load_data(DemoSettings())
    right, labels = (np.asarray(each.train["labels"]) for each in (clean, data))
    vendors = np.asarray(data.train["vendor"])
    assert data.mislabelled.sum() == 77
    assert clean.mislabelled.sum() == 0
    np.testing.assert_array_equal(right != labels, data.mislabelled)
    np.testing.assert_array_equal((vendors == CULPRIT) & (right == TRUE_LABEL), data.mislabelled)
    assert (labels[data.mislabelled] == GIVEN_LABEL).all()
    assert sorted(set(vendors)) == list(VENDORS)
    assert torch.equal(clean.queries[:]["labels"], data.queries[:]["labels"])
    assert torch.equal(clean.train[:]["pixel_values"], data.train[:]["pixel_values"])


def test_right_answers():
    data = load_data(TINY)
    model = build_trainer(TINY)(data.train, 0).model
    expected = [
        int(model(pixel_values=row["pixel_values"][None]).logits.argmax()) == row["labels"] for row in data.queries
    ]
    assert right_answers(model, data.queries).tolist() == expected


def test_training_rows_and_queries_do_not_overlap_and_follow_the_seed():
    data, same, other = (load_data(DemoSettings(seed=seed)) for seed in (1, 1, 2))
    train, queries = ({tuple(x.flatten().tolist()) for x in d[:]["pixel_values"]} for d in (data.train, data.queries))
    assert len(data.train) == 1200
    assert len(data.queries) == 400
    assert not train & queries
    assert torch.equal(data.train[:]["pixel_values"], same.train[:]["pixel_values"])
    assert not torch.equal(data.train[:]["pixel_values"], other.train[:]["pixel_values"])


def test_inspection_begins_with_the_most_harmful_rows():
    run = tiny_recorded_run()
    result = Attributor(run.model, tiny_synset(), disable_tqdm=True).attribute(run.queries, rows=run.train_dataset)
    means = result.row_scores.mean(0)[inspection_order(result)]
    assert (np.diff(means) >= 0).all()
    result.row_scores = None
    with pytest.raises(ValueError, match="no row scores"):
        inspection_order(result)


def test_loss_order_begins_with_the_highest_loss():
    run = tiny_recorded_run()
    with torch.no_grad():
        logits = run.model(run.train_dataset[:]["pixel_values"]).logits
    losses = torch.nn.functional.cross_entropy(logits, run.train_dataset[:]["labels"], reduction="none").numpy()
    assert (np.diff(losses[loss_order(FunctionalModel(run.model), run.train_dataset)]) <= 1e-6).all()


def test_share_found():
    flipped = np.array([False, True, False, True, False, False, False, False, False, True])
    assert share_found(np.arange(10), flipped, 0.2) == pytest.approx(1 / 3)
    assert share_found(np.arange(10)[::-1], flipped, 0.1) == pytest.approx(1 / 3)
    assert share_found(np.arange(10), flipped, 1.0) == 1.0


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(FileExistsError, match="something else than an earlier demo"):
        run_demo(tmp_path, say=str, settings=TINY, disable_tqdm=True)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "mine"


def test_a_finished_demo_is_replaced_only_if_so_asked(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "out")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match=r"out holds a finished demo.*overwrite=True.*--overwrite"):
        run_demo(folder, say=str, settings=TINY, disable_tqdm=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    told = []

    def stop(line):
        told.append(line)
        if line.startswith("1. "):
            raise KeyboardInterrupt

    for overwrite in (True, False):  # what was cut short begins again unasked
        with pytest.raises(KeyboardInterrupt):
            run_demo(folder, say=stop, settings=TINY, overwrite=overwrite, disable_tqdm=True)
        assert not (folder / "report.html").exists()
    assert [line[:2] for line in told] == ["1.", told[1][:2], "1."] and "cut short, which begins again" in told[1]


def test_a_demo_without_wrong_labels_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`wrong_share` = 0.0 makes no label wrong"):
        run_demo(tmp_path / "out", say=str, settings=DemoSettings(wrong_share=0.0), disable_tqdm=True)
    assert not (tmp_path / "out").exists()
