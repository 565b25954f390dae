import numpy as np
import pytest

from hf_rgm.attribution.result import AttributionResult


def make_result(**changes):
    rng = np.random.default_rng(0)
    arguments = {
        "scores": rng.normal(size=(6, 2)),
        "row_scores": rng.normal(size=(6, 5)),
        "cluster_names": ["<i>imdb</i>", "yelp"],
        "cluster_sizes": np.array([3, 2]),
        "cluster_ids": np.array([0, 0, 1, 1, 0]),
        "query_ids": [f"<q>{i}" for i in range(6)],
        "objective": "margin",
        "objective_values": np.linspace(0, 1, 6),
        "engine": "adjoint",
        "metadata": {"<rewind>": "<half>"},
    }
    return AttributionResult(**(arguments | changes))


def test_page_has_the_matrix_the_mean_and_the_first_queries(tmp_path):
    page = make_result().to_html(tmp_path / "page.html", title="A & B").read_text(encoding="utf-8")
    assert page.count("<img") == 2 + 4
    assert page.count("<h2>Query ") == 4
    assert "<title>A &amp; B</title>" in page
    assert AttributionResult.SIGN_CONVENTION in page
    assert "&lt;i&gt;imdb&lt;/i&gt;" in page
    assert "&lt;rewind&gt;" in page and "&lt;half&gt;" in page
    for raw in ("<i>", "<q>", "<rewind>", "<half>"):
        assert raw not in page


def test_rows_are_shown_as_pictures_of_the_right_rows(tmp_path):
    asked_rows, asked_queries = [], []

    def row_image(row):
        asked_rows.append(row)
        return np.eye(4)

    def query_image(query):
        asked_queries.append(query)
        return np.eye(4)

    result = make_result(row_scores=np.tile([3.0, -1.0, 0.0, 2.0, 1.0], (6, 1)))
    page = result.to_html(tmp_path / "page.html", queries=["<q>4"], row_image=row_image, query_image=query_image)
    assert asked_rows == [0, 3, 4, 2, 1] + [1, 2, 4, 3, 0]
    assert asked_queries == [4]
    assert page.read_text(encoding="utf-8").count("<img") == 2 + 1 + 2


def test_result_without_rows_and_unknown_query(tmp_path):
    result = make_result(row_scores=None, cluster_ids=None)
    assert result.to_html(tmp_path / "page.html").is_file()
    with pytest.raises(KeyError, match="No query has the id 'x'"):
        result.to_html(tmp_path / "other.html", queries=["x"])
    assert not (tmp_path / "other.html").exists()
