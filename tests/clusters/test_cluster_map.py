import json

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_rgm.clusters.cluster_map import ClusterMap

TWO_BLOBS = np.array([[0.0, 0.0], [0.1, 0.0], [0.0, 0.1], [9.0, 9.0], [9.1, 9.0]])


class ItemDataset(torch.utils.data.Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, row):
        return self.items[row]


def hub_dataset():
    features = datasets.Features(
        {"label": datasets.ClassLabel(names=["cat", "dog"]), "source": datasets.Value("string")}
    )
    return datasets.Dataset.from_dict(
        {"label": [1, 0, 1, 1], "source": ["yelp", "imdb", "imdb", "yelp"]}, features=features
    )


def test_from_column_numbers_values_in_sorted_order():
    clusters = ClusterMap.from_column(hub_dataset(), "source")
    assert clusters.names == ("imdb", "yelp")
    assert clusters.cluster_ids.tolist() == [1, 0, 0, 1]
    assert clusters.cluster_ids.dtype == np.int64
    assert clusters.sizes.tolist() == [2, 2]
    assert (clusters.num_rows, clusters.num_clusters) == (4, 2)


def test_from_column_uses_class_label_names_and_ignores_the_dataset_format():
    assert ClusterMap.from_column(hub_dataset().with_format("torch"), "label").names == ("cat", "dog")


def test_from_column_crosses_columns_and_leaves_out_combinations_without_rows():
    clusters = ClusterMap.from_column(hub_dataset(), ["source", "label"])
    assert clusters.names == ("source=imdb, label=cat", "source=imdb, label=dog", "source=yelp, label=dog")
    assert clusters.cluster_ids.tolist() == [2, 0, 1, 2]


@pytest.mark.parametrize("make", [list, ItemDataset])
def test_from_column_of_items_sorts_numbers_as_numbers(make):
    rows = make([{"label": torch.tensor(10)}, {"label": 2}, {"label": np.int64(10)}])
    clusters = ClusterMap.from_column(rows, "label")
    assert clusters.names == ("label=2", "label=10")
    assert clusters.cluster_ids.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("rows", "column", "error", "message"),
    [
        ([{"a": 1}], "b", KeyError, "no column 'b'. It has: a"),
        (hub_dataset(), "sauce", KeyError, "no column 'sauce'. It has: label, source"),
        ([{"a": "x"}, {"a": None}], "a", ValueError, r"no value in 1 rows \(\[1\]\)"),
        ([{"a": float("nan")}], "a", ValueError, r"no value in 1 rows \(\[0\]\)"),
        ([{"a": [1, 2]}], "a", TypeError, "holds list values"),
        ([(1, 2)], "a", TypeError, "not a dictionary"),
        ([], "a", ValueError, "0 rows"),
        (hub_dataset().to_iterable_dataset(), "label", TypeError, "must have a length"),
    ],
)
def test_from_column_refuses(rows, column, error, message):
    with pytest.raises(error, match=message):
        ClusterMap.from_column(rows, column)


def test_missing_class_label_is_an_error():
    features = datasets.Features({"label": datasets.ClassLabel(names=["cat", "dog"])})
    dataset = datasets.Dataset.from_dict({"label": [0, -1, None]}, features=features)
    with pytest.raises(ValueError, match="no value in 2 rows"):
        ClusterMap.from_column(dataset, "label")


def test_from_ids():
    clusters = ClusterMap.from_ids(torch.tensor([1, 0, 1]))
    assert clusters.names == ("cluster 0", "cluster 1")
    assert clusters == ClusterMap.from_ids([1, 0, 1], ["cluster 0", "cluster 1"])
    assert clusters != ClusterMap.from_ids([1, 0, 1], ["a", "b"])
    assert clusters != ClusterMap.from_ids([0, 0, 1])


@pytest.mark.parametrize(
    ("ids", "names", "error", "message"),
    [
        ([0, 2, 2, 2], None, ValueError, "1 of 3 clusters have no rows: 'cluster 1'"),
        ([0, 0], ["a", "b"], ValueError, "no rows: 'b'"),
        ([0, 5], None, ValueError, "Row 1 has cluster id 5, which must be from 0 to 1. Number them without gaps"),
        ([0, 1], ["a", "b", "c"], ValueError, "3 clusters for 2 rows"),
        ([0, -1], None, ValueError, "Row 1 has cluster id -1"),
        ([0, 1], ["a"], ValueError, "Row 1 has cluster id 1, which must be from 0 to 0"),
        ([0, 1], ["a", "a"], ValueError, "these repeat: a"),
        ([0.0, 1.0], None, TypeError, "must be integers, got float64"),
        (["x", "y"], None, TypeError, "from_column"),
        ([], None, ValueError, "at least one row"),
        ([[0], [1]], None, ValueError, "shape"),
    ],
)
def test_from_ids_refuses(ids, names, error, message):
    with pytest.raises(error, match=message):
        ClusterMap.from_ids(ids, names)


def test_from_rows():
    clusters = ClusterMap.from_rows(3)
    assert clusters.names == ("row 0", "row 1", "row 2")
    assert clusters.sizes.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ClusterMap.from_rows(0)


def test_from_embeddings_finds_the_blobs_largest_first():
    clusters = ClusterMap.from_embeddings(TWO_BLOBS, num_clusters=2)
    assert clusters.cluster_ids.tolist() == [0, 0, 0, 1, 1]
    assert clusters.names == ("cell 0", "cell 1")


def test_from_embeddings_divides_within_classes():
    images = torch.from_numpy(TWO_BLOBS).repeat(2, 1).reshape(10, 1, 2).bfloat16()
    labels = [3] * 5 + [1] * 5
    clusters = ClusterMap.from_embeddings(images, labels=labels, num_clusters_per_class=2)
    assert clusters.names == ("label 1 / cell 0", "label 1 / cell 1", "label 3 / cell 0", "label 3 / cell 1")
    assert clusters.cluster_ids.tolist() == [2, 2, 2, 3, 3, 0, 0, 0, 1, 1]
    named = ClusterMap.from_embeddings(
        images, labels=labels, num_clusters_per_class=2, label_names=["ant", "bee", "cat", "dog"]
    )
    assert named.names == ("bee / cell 0", "bee / cell 1", "dog / cell 0", "dog / cell 1")


def test_from_embeddings_is_the_same_for_the_same_seed():
    points = np.random.default_rng(0).normal(size=(60, 3))
    labels = np.arange(60) % 2
    assert ClusterMap.from_embeddings(points, labels=labels, seed=1) == ClusterMap.from_embeddings(
        points, labels=labels, seed=1
    )


@pytest.mark.parametrize(
    ("embeddings", "options", "error", "message"),
    [
        (TWO_BLOBS, {"num_clusters": 6}, ValueError, "5 rows, 5 of them distinct"),
        (np.zeros((5, 2)), {"num_clusters": 2}, ValueError, "1 of them distinct"),
        (TWO_BLOBS, {"labels": [0, 0, 0, 0, 1], "num_clusters_per_class": 2}, ValueError, "'label 1' into 2 clusters"),
        (TWO_BLOBS, {"labels": [0, 0]}, ValueError, r"shape \(2,\) for 5"),
        (
            TWO_BLOBS,
            {"labels": [0] * 4 + [2], "num_clusters_per_class": 1, "label_names": ["a"]},
            IndexError,
            "Label 2 has none",
        ),
        (TWO_BLOBS, {"num_clusters": 0}, ValueError, "at least 1, got 0"),
        (TWO_BLOBS, {}, ValueError, "pass `num_clusters`"),
        (TWO_BLOBS, {"labels": [0] * 5, "num_clusters": 2}, ValueError, "num_clusters_per_class"),
        (np.array([[1.0], [np.nan], [np.inf]]), {"num_clusters": 1}, ValueError, r"2 rows \(\[1, 2\]\)"),
        (np.zeros(3), {"num_clusters": 1}, ValueError, r"got \(3,\)"),
        (np.zeros((0, 2)), {"num_clusters": 1}, ValueError, r"got \(0, 2\)"),
    ],
)
def test_from_embeddings_refuses(embeddings, options, error, message):
    with pytest.raises(error, match=message):
        ClusterMap.from_embeddings(embeddings, **options)


def test_rows_and_index():
    clusters = ClusterMap.from_ids([1, 0, 1, 1], ["reviews", "news"])
    assert clusters.rows("news").tolist() == [0, 2, 3]
    assert clusters.rows(0).tolist() == [1]
    assert clusters.index("news") == clusters.index(np.int64(1)) == 1
    with pytest.raises(KeyError, match="No cluster is named 'review'. Names like it: 'reviews'"):
        clusters.index("review")
    several = ClusterMap.from_ids(range(7), [f"source={name}, labels=0" for name in "abcdefg"])
    with pytest.raises(KeyError, match=r"Names like it: 'source=c, labels=0'\."):
        several.index("Source=C")
    with pytest.raises(KeyError, match=r"Names like it: 'source=a, labels=0', .*'source=e, labels=0', \.\.\."):
        several.index("source")
    with pytest.raises(IndexError, match="2 is out of range"):
        clusters.index(2)
    with pytest.raises(IndexError, match="-1 is out of range"):
        clusters.rows(-1)


def test_check_num_rows():
    clusters = ClusterMap.from_rows(3)
    clusters.check_num_rows(3)
    with pytest.raises(ValueError, match="cover 3 rows, but the trajectory has 4"):
        clusters.check_num_rows(4, what="the trajectory")


def test_cluster_ids_cannot_be_changed_and_are_a_copy():
    ids = np.array([0, 1])
    clusters = ClusterMap.from_ids(ids)
    ids[0] = 1
    assert clusters.cluster_ids.tolist() == [0, 1]
    with pytest.raises(ValueError, match="read-only"):
        clusters.cluster_ids[0] = 1


@pytest.mark.parametrize("whole", [True, False])
def test_refine_splits_one_cluster_in_place_and_coarsen_undoes_it(whole):
    coarse = ClusterMap.from_ids([0, 1, 1, 1, 1, 1, 2], ["a", "b", "c"])
    points = np.concatenate([[[5.0, 5.0]], TWO_BLOBS, [[5.0, 5.0]]])
    fine = coarse.refine("b", points if whole else TWO_BLOBS, num_clusters=2)
    assert fine.names == ("a", "b / cell 0", "b / cell 1", "c")
    assert fine.cluster_ids.tolist() == [0, 1, 1, 1, 2, 2, 3]
    assert fine.parents is not None
    assert fine.parents.tolist() == [0, 1, 1, 2]
    assert fine.coarsen() == coarse


def test_refine_by_ids_with_names():
    coarse = ClusterMap.from_ids([0, 1, 1, 1], ["a", "b"])
    fine = coarse.refine("b", ids=[0, 1, 0], names=["x", "y"])
    assert fine.names == ("a", "x", "y")
    assert fine.cluster_ids.tolist() == [0, 1, 2, 1]
    assert coarse.refine(1, ids=[9, 0, 1, 0], names=["x", "y"]) == fine


def test_refine_refuses():
    coarse = ClusterMap.from_ids([0, 1, 1, 1], ["a", "b"])
    with pytest.raises(ValueError, match="Pass `embeddings` with `num_clusters`, or `ids`"):
        coarse.refine("b")
    with pytest.raises(ValueError, match="Pass `embeddings` with `num_clusters`, or `ids`"):
        coarse.refine("b", ids=[0, 1, 1], num_clusters=2)
    with pytest.raises(ValueError, match="its 3 rows or for all 4"):
        coarse.refine("b", ids=[0, 1])
    with pytest.raises(ValueError, match="have no rows"):
        coarse.refine("b", ids=[0, 2, 2])
    with pytest.raises(ValueError, match="these repeat: a"):
        coarse.refine("b", ids=[0, 1, 1], names=["a", "c"])
    with pytest.raises(ValueError, match="refines no other"):
        coarse.coarsen()


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_rows_partition_the_dataset(values):
    clusters = ClusterMap.from_column([{"value": value} for value in values], "value")
    rows = [clusters.rows(k).tolist() for k in range(clusters.num_clusters)]
    assert sorted(sum(rows, [])) == list(range(len(values)))
    for name, members in zip(clusters.names, rows, strict=True):
        assert {f"value={values[row]}" for row in members} == {name}


def test_save_and_load_is_identity(tmp_path):
    coarse = ClusterMap.from_ids([1, 0, 1, 1], ["<b>a</b>", "b/ä"])
    for clusters in (coarse, coarse.refine("b/ä", ids=[0, 1, 1])):
        clusters.save(tmp_path / "clusters")
        assert ClusterMap.load(tmp_path / "clusters") == clusters
    assert sorted(path.name for path in (tmp_path / "clusters").iterdir()) == [
        "clusters.json",
        "clusters.safetensors",
        "rows.parquet",
    ]
    shown = datasets.Dataset.from_parquet(
        str(tmp_path / "clusters" / "rows.parquet"), cache_dir=str(tmp_path / "cache")
    )
    assert isinstance(shown, datasets.Dataset)
    assert shown[0] == {"row": 0, "cluster_id": 1, "cluster": "b/ä / cell 0"}


def test_load_names_what_is_wrong(tmp_path):
    folder = tmp_path / "clusters"
    with pytest.raises(FileNotFoundError, match="clusters.json"):
        ClusterMap.load(folder)
    ClusterMap.from_rows(3).save(folder)
    tensors = folder / "clusters.safetensors"
    content = tensors.read_bytes()
    tensors.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged"):
        ClusterMap.load(folder)
    tensors.unlink()
    with pytest.raises(FileNotFoundError, match="clusters.safetensors"):
        ClusterMap.load(folder)
    ClusterMap.from_rows(2).save(tmp_path / "other")
    tensors.write_bytes((tmp_path / "other" / "clusters.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"shape \(2,\) and dtype I64; expected \(3,\)"):
        ClusterMap.load(folder)
    config = json.loads((folder / "clusters.json").read_text())
    (folder / "clusters.json").write_text(json.dumps(config | {"format_version": 1}))
    with pytest.raises(ValueError, match="format version 1, .* or make and save the map again with this release"):
        ClusterMap.load(folder)


def test_the_table_to_look_at_is_not_read(tmp_path):
    clusters = ClusterMap.from_rows(3)
    clusters.save(tmp_path / "clusters")
    (tmp_path / "clusters" / "rows.parquet").write_bytes(b"PAR1")
    assert ClusterMap.load(tmp_path / "clusters") == clusters


def test_save_leaves_a_foreign_folder_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="left alone"):
        ClusterMap.from_rows(2).save(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_repr_is_short():
    assert repr(ClusterMap.from_rows(100)).endswith("'row 6', '...'))")
