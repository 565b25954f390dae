import json

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgba

from hf_rgm.plots import HARMS, HELPS
from hf_rgm.results.result import AttributionResult

CLUSTER_IDS = np.array([0, 0, 1, 1, 1, 2])


def make_result(**changes):
    arguments = {
        "scores": np.array([[0.5, -0.25, 0.0], [-1.0, 2.0, 3.0]]),
        "cluster_names": ("imdb", "yelp", "news"),
        "cluster_sizes": np.array([2, 3, 1]),
        "query_ids": ["a", "b"],
        "objective": "margin",
        "objective_values": np.array([1.5, -0.5]),
        "engine": "adjoint",
    }
    return AttributionResult(**(arguments | changes))


def make_result_with_rows(**changes):
    row_scores = np.array([[0.1, 0.4, 0.3, -0.5, -0.05, 0.0], [-2.0, 1.0, 0.5, 0.7, 0.8, 3.0]])
    return make_result(row_scores=row_scores, cluster_ids=CLUSTER_IDS, **changes)


def test_arrays_are_float32_and_int64_whatever_was_passed():
    result = make_result(scores=torch.ones(2, 3, dtype=torch.bfloat16), cluster_sizes=[2, 3, 1])
    assert result.scores.dtype == result.objective_values.dtype == np.float32
    assert result.cluster_sizes.dtype == np.int64
    assert (result.num_queries, result.num_clusters) == (2, 3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["scores", "row_scores"])
def test_scores_that_are_not_finite_are_counted_and_located(name, bad):
    columns = {"scores": 3, "row_scores": 6}[name]
    values = np.zeros((2, columns))
    values[1, :2] = bad
    with pytest.raises(ValueError, match=f"`{name}` has 2 NaN or infinite values of {2 * columns}.*query 'b'"):
        make_result(**{name: values, "cluster_ids": CLUSTER_IDS})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"scores": np.zeros((3, 2))}, ValueError, r"`scores` has shape \(3, 2\), but must have \(2, 3\)"),
        ({"objective_values": np.zeros(3)}, ValueError, r"`objective_values` has shape \(3,\)"),
        ({"objective_values": np.array([np.nan, 0])}, ValueError, "query 'a'"),
        ({"cluster_sizes": np.zeros(2)}, ValueError, "`cluster_sizes` must be 3 numbers of rows"),
        ({"cluster_sizes": [2, -1, 5]}, ValueError, "`cluster_sizes` must be 3 numbers of rows"),
        ({"cluster_names": ("x", "y", "x")}, ValueError, "cluster names must differ, but these repeat: x"),
        ({"query_ids": [7, 7]}, ValueError, "query ids must differ, but these repeat: 7"),
        (
            {"query_ids": [], "scores": np.zeros((0, 3)), "objective_values": []},
            ValueError,
            "at least one query and one cluster, got 0 and 3",
        ),
        ({"cluster_ids": np.array([0, 0, 1, 1, 2, 2])}, ValueError, "do not give the `cluster_sizes`"),
        ({"cluster_ids": np.array([0, 0, 1, 1, 1, 3])}, ValueError, "do not give the `cluster_sizes`"),
        ({"row_scores": np.zeros((2, 5))}, ValueError, r"`row_scores` has shape \(2, 5\), but must have \(2, 6\)"),
        ({"metadata": {"device": torch.device("cpu")}}, TypeError, "does not fit into JSON"),
    ],
)
def test_what_does_not_fit_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        make_result(**changes)


def test_to_pandas_is_the_matrix():
    frame = make_result().to_pandas()
    assert frame.loc["b", "news"] == 3.0
    assert frame.shape == (2, 3)


def test_to_dataset_ranks_the_clusters_of_each_query():
    dataset = make_result(query_ids=[4, 9]).to_dataset()
    assert dataset.column_names == ["query_id", "rank", "cluster", "score", "size"]
    assert dataset[0] == {"query_id": 4, "rank": 1, "cluster": "imdb", "score": 0.5, "size": 2}
    assert list(dataset["cluster"]) == ["imdb", "news", "yelp", "news", "yelp", "imdb"]
    assert list(dataset["rank"]) == [1, 2, 3, 1, 2, 3]
    assert list(dataset["query_id"]) == [4, 4, 4, 9, 9, 9]


def test_to_dataset_keeps_both_ends():
    dataset = make_result().to_dataset(k=1)
    assert list(dataset["cluster"]) == ["imdb", "yelp", "news", "imdb"]
    assert list(dataset["rank"]) == [1, 3, 1, 3]
    assert make_result().to_dataset(k=2).num_rows == 6
    with pytest.raises(ValueError, match="at least 1, got 0"):
        make_result().to_dataset(k=0)


def test_example_rows_push_the_way_their_cluster_does():
    frame = make_result_with_rows().to_dataset().to_pandas()
    assert isinstance(frame, pd.DataFrame)
    examples = {(line.query_id, line.cluster): list(line.example_rows) for line in frame.itertuples()}
    assert examples["a", "imdb"] == [1, 0]
    assert examples["a", "yelp"] == [3, 4, 2]
    assert examples["b", "imdb"] == [0, 1]
    assert examples["b", "yelp"] == [4, 3, 2]
    without_scores = make_result(cluster_ids=CLUSTER_IDS).to_dataset()
    assert list(without_scores["example_rows"])[:3] == [[0, 1], [5], [2, 3, 4]]


def test_top_of_a_query_and_of_the_mean():
    result = make_result()
    assert result.top(2, "b").to_dict("records") == [
        {"cluster": "news", "score": 3.0, "size": 1},
        {"cluster": "yelp", "score": 2.0, "size": 3},
    ]
    assert list(result.top(1, "b", largest=False)["cluster"]) == ["imdb"]
    mean = result.top(10)
    assert list(mean["cluster"]) == ["news", "yelp", "imdb"]
    assert mean["score"].tolist() == [1.5, 0.875, -0.25]


def test_top_rows():
    result = make_result_with_rows()
    assert result.top(2, "a", rows=True, largest=False).to_dict("list") == {
        "row": [3, 4],
        "score": [-0.5, np.float32(-0.05)],
        "cluster": ["yelp", "yelp"],
    }
    with pytest.raises(ValueError, match="no row scores"):
        make_result().top(rows=True)


def test_unknown_queries_and_numbers_are_named():
    with pytest.raises(KeyError, match="No query has the id 'c'. There are 2: 'a', 'b'"):
        make_result().top(query="c")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        make_result().top(0)
    with pytest.raises(ValueError, match="Unknown kind 'pie'"):
        make_result().plot("pie")


def test_plot_labels_what_it_shows():
    result = make_result_with_rows()
    assert {label.get_text() for label in result.plot().get_xticklabels()} == {"imdb", "yelp", "news"}
    bars = result.plot("bars", query="b")
    assert [label.get_text() for label in bars.get_yticklabels()] == ["news", "yelp", "imdb"]
    assert "query b" in bars.get_title(loc="left")
    rows = result.plot("bars", rows=True, k=1)
    assert [label.get_text() for label in rows.get_yticklabels()] == ["row 5 (news)", "", "row 0 (imdb)"]


@pytest.mark.parametrize("make", [make_result, make_result_with_rows])
@pytest.mark.parametrize("query_ids", [[3, 5], ["ä/1", "<b>"]])
def test_save_and_load_is_identity(tmp_path, make, query_ids):
    rng = np.random.default_rng(0)
    result = make(scores=rng.normal(size=(2, 3)), query_ids=query_ids, metadata={"rewind": 0.5, "shape": (1, 2)})
    assert result.save_pretrained(tmp_path / "result") == tmp_path / "result"
    loaded = AttributionResult.from_pretrained(tmp_path / "result")
    for name in ("scores", "objective_values", "cluster_sizes", "row_scores", "cluster_ids"):
        before, after = getattr(result, name), getattr(loaded, name)
        assert (before is None) == (after is None)
        if before is not None:
            np.testing.assert_array_equal(before, after)
            assert before.dtype == after.dtype
    for name in ("cluster_names", "query_ids", "objective", "engine", "metadata"):
        assert getattr(loaded, name) == getattr(result, name)


def test_saved_tables_can_be_read_as_dataset_configs(tmp_path):
    folder = make_result_with_rows().save_pretrained(tmp_path / "result")
    found = {
        name: datasets.Dataset.from_parquet(str(folder / name / "train.parquet"), cache_dir=str(tmp_path / "cache"))
        for name in ("top", "scores", "clusters", "queries")
    }
    assert found["top"].num_rows == 6
    assert found["scores"][1] == {"query_id": "b", "scores": [-1.0, 2.0, 3.0]}
    assert found["clusters"][0] == {"cluster": "imdb", "size": 2, "mean_score": -0.25}
    assert found["queries"][0] == {"query_id": "a", "objective_value": 1.5}
    assert "positive score" in json.loads((folder / "attribution.json").read_text())["sign_convention"]
    assert not list(folder.rglob("*.pkl"))


def test_damaged_folders_are_named(tmp_path):
    folder = tmp_path / "result"
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        AttributionResult.from_pretrained(folder)
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match="has no attribution.json"):
        AttributionResult.from_pretrained(folder)
    make_result().save_pretrained(folder)
    tensors = folder / "attribution.safetensors"
    content = tensors.read_bytes()
    tensors.write_bytes(content[:-4])
    with pytest.raises(ValueError, match="damaged"):
        AttributionResult.from_pretrained(folder)
    tensors.unlink()
    with pytest.raises(FileNotFoundError, match="attribution.safetensors"):
        AttributionResult.from_pretrained(folder)
    tensors.write_bytes(content)
    config = json.loads((folder / "attribution.json").read_text())
    (folder / "attribution.json").write_text(json.dumps(config | {"query_ids": ["a"]}))
    with pytest.raises(ValueError, match=r"'scores' of shape \(2, 3\) .*expected \(1, 3\)"):
        AttributionResult.from_pretrained(folder)
    (folder / "attribution.json").write_text(json.dumps(config | {"format_version": 99}))
    with pytest.raises(ValueError, match="format version 99.* or attribute again with this release"):
        AttributionResult.from_pretrained(folder)


def test_saving_replaces_a_result_but_nothing_else(tmp_path):
    folder = make_result().save_pretrained(tmp_path / "result")
    make_result(objective="loss").save_pretrained(folder)
    assert AttributionResult.from_pretrained(folder).objective == "loss"
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="left alone"):
        make_result().save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("objective", "metadata", "maximize"),
    [
        ("margin", {}, True),
        ("loss", {}, False),
        ("mean_loss", {}, False),
        ("own", {}, True),
        ("own", {"maximize": False}, False),
        ("loss", {"maximize": "?"}, False),
    ],
)
def test_the_direction_of_the_objective_is_known(objective, metadata, maximize, tmp_path):
    result = make_result(objective=objective, metadata=metadata)
    assert result.maximize is maximize
    assert AttributionResult.from_pretrained(result.save_pretrained(tmp_path / "result")).maximize is maximize
    raises = result.plot("bars", query="b").patches[0]
    assert raises.get_facecolor() == to_rgba(HELPS if maximize else HARMS)


def test_repr_is_short():
    assert repr(make_result()) == (
        "AttributionResult(num_queries=2, num_clusters=3, objective='margin', engine='adjoint', sizes not calibrated)"
    )
