import dataclasses

import numpy as np
import pytest

from hf_rgm.results.result import AttributionResult
from tests.pages.tiny import tiny_exhibit


def make_result(**changes):
    rng = np.random.default_rng(0)
    arguments = {
        "scores": rng.normal(size=(6, 2)),
        "row_scores": rng.normal(size=(6, 5)),
        "cluster_names": ["imdb", "yelp"],
        "cluster_sizes": np.array([3, 2]),
        "cluster_ids": np.array([0, 0, 1, 1, 0]),
        "query_ids": [f"q{i}" for i in range(6)],
        "objective": "margin",
        "objective_values": np.linspace(0, 1, 6),
        "engine": "adjoint",
        "metadata": {"num_runs": "half"},
    }
    return AttributionResult(**(arguments | changes))


def test_page_has_the_matrix_the_mean_and_the_first_queries(tmp_path):
    page = make_result().to_html(tmp_path / "page.html", title="A & B").read_text(encoding="utf-8")
    assert page.count("<img") == 1
    assert page.count("<h2>Query ") == 4
    assert page.count('<table class="bars">') == 1 + 4
    assert "<title>A &amp; B</title>" in page
    assert AttributionResult.SIGN_CONVENTION in page and "Fidelity: not measured" in page


def test_page_shows_the_texts_of_rows_and_of_the_chosen_queries(tmp_path):
    rows = [{"text": f"text of row {i}", "label": 1} for i in range(5)]
    queries = [{"text": f"text of query {i}"} for i in range(6)]
    path = make_result().to_html(tmp_path / "page.html", query_ids=["q4"], rows=rows, queries=queries)
    page = path.read_text(encoding="utf-8")
    assert "text of query 4" in page and "text of query 1" not in page
    assert all(f"text of row {i}" in page for i in range(5))


def test_page_shows_pictures_and_synthetic_samples_where_they_are_at_hand(tmp_path):
    exhibit = tiny_exhibit()
    result = dataclasses.replace(exhibit.result)
    given = {"rows": exhibit.rows, "queries": exhibit.queries, "synset": exhibit.synset}
    page = result.to_html(tmp_path / "page.html", query_ids=[7], **given).read_text(encoding="utf-8")
    samples = 2 * min(4, exhibit.synset.samples.inputs.shape[1])
    assert page.count("<img") == 1 + 1 + 2 * 4 + samples + 2 * 6


def test_result_without_rows_and_unknown_query(tmp_path):
    result = make_result(row_scores=None, cluster_ids=None)
    assert result.to_html(tmp_path / "page.html").is_file()
    with pytest.raises(KeyError, match="No query has the id 'x'"):
        result.to_html(tmp_path / "other.html", query_ids=["x"])
    assert not (tmp_path / "other.html").exists()
