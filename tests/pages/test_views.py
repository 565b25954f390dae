import dataclasses
import html
import re
from pathlib import Path

import numpy as np
import pytest

from hf_rgm import AttributionResult, ClusterMap
from hf_rgm.explorer.app import Explorer
from hf_rgm.pages.exhibit import Exhibit
from hf_rgm.pages.shown_rows import png_of
from hf_rgm.pages.views import (
    NOT_MEASURED,
    ROWS_IN_GROUPS,
    banner,
    cluster_section,
    clusters_section,
    facts_section,
    heatmap_section,
    query_section,
    rows_section,
)
from hf_rgm.testing import tiny_recorded_run, tiny_synset
from tests.pages.tiny import tiny_exhibit

BENCHMARKS = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def cards(html):
    return re.findall(r"<strong>(.*?)</strong>(?:<span>(.*?)</span>)?", html, flags=re.DOTALL)


@pytest.fixture(scope="module")
def exhibit():
    return tiny_exhibit()


@pytest.fixture(scope="module")
def alone(exhibit, tmp_path_factory):
    """What a repository of attributions holds, and nothing else."""
    folder = exhibit.result.save_pretrained(tmp_path_factory.mktemp("result") / "attributions")
    return Exhibit(AttributionResult.from_pretrained(folder))


def test_the_banner_tells_sign_and_fidelity(exhibit):
    sign, fidelity = banner(exhibit.result)
    assert "presence of the data raises the margin" in sign and "f(with) − f(without)" in sign
    assert sign.endswith("Higher is better: blue helps, orange harms.")
    assert fidelity.startswith(f"Fidelity: {NOT_MEASURED} Sizes are not calibrated")
    agreement = {"estimate": {"value": 0.5, "low": 0.4, "high": 0.6, "num_nan": 0}, "num_points": 9, "ceiling": None}
    measured = {
        "format_version": 1,
        "agreements": {"lds_clusters": agreement},
        "engine": "adjoint",
        "objective": "margin",
        "num_queries": 12,
        "seeds": [1],
        "rows": False,
        "samples_sha256": "0",
        "settings": {},
    }
    result = dataclasses.replace(exhibit.result, metadata={"fidelity": measured})
    assert "0.500 [0.400, 0.600], random halves of the clusters (LDS), 9 retrained subsets" in banner(result)[1]
    assert "Agreement of the adjoint engine" in facts_section(result).to_html()


def test_rows_are_shown_with_what_was_measured_of_them(exhibit, alone):
    fell, by_chance = re.findall(r"\d\.\d{3} ± \d\.\d{3}", ROWS_IN_GROUPS)
    assert (
        f"\n| adjoint | 3 | 0% | {fell} |" in BENCHMARKS and f"\n| random rows | 3 | 0% | {by_chance} |" in BENCHMARKS
    )
    for scored in (exhibit, alone):
        assert html.escape(ROWS_IN_GROUPS) in rows_section(scored, 0).to_html()
    unscored = dataclasses.replace(exhibit.result, row_scores=None)
    assert html.escape(ROWS_IN_GROUPS) not in rows_section(Exhibit(unscored), 0).to_html()


def test_bars_are_the_scores_of_the_query(exhibit):
    html = clusters_section(exhibit, 3, k=2).to_html()
    names = re.findall(r'<th scope="row">(.*?) \(8 rows\)</th>', html)
    order = np.argsort(-exhibit.result.scores[3])
    assert names == [exhibit.result.cluster_names[k] for k in (*order[:2], *order[-2:])]
    assert "2 more between" in html and "query 3" in html
    assert clusters_section(exhibit, None).to_html().count("<tr>") == 7


def test_bars_reach_from_zero_to_the_score():
    result = dataclasses.replace(tiny_exhibit().result, scores=np.tile([3.0, -1, 0, 1, 2, -0.5], (12, 1)))
    html = clusters_section(Exhibit(result), 0).to_html()
    bars = re.findall(r'class="(helps|harms)" style="left:([\d.]+)%;width:([\d.]+)%"', html)
    assert bars[0] == ("helps", "25.00", "75.00")
    assert bars[-1] == ("harms", "0.00", "25.00")


def test_what_raises_a_loss_harms():
    raises = np.tile([3.0, 2, 1, 0.5, 0.25, 0.1], (12, 1))
    result = dataclasses.replace(tiny_exhibit().result, scores=raises, objective="loss", metadata={})
    html = clusters_section(Exhibit(result), 0).to_html()
    assert html.count('class="harms"') == 6 and 'class="helps"' not in html
    assert banner(result)[0].endswith("Lower is better: blue helps, orange harms.")
    as_margin = dataclasses.replace(result, objective="margin")
    assert heatmap_section(result).to_html() != heatmap_section(as_margin).to_html()
    assert Explorer(Exhibit(result)).of_query(0)[1].count('class="harms"') == 6


def test_the_query_is_shown_as_a_picture(exhibit, alone):
    html = query_section(exhibit, 4).to_html()
    assert html.count("<img") == 1 and f"label {exhibit.queries[4]['labels']}" in html
    assert "Pass the queries" in query_section(alone, 4).to_html()
    assert "mean margin over 12 queries" in query_section(exhibit, None).to_html().replace("trained model&#x27;s ", "")


def test_a_cluster_has_the_rows_that_push_its_way_beside_its_samples(exhibit):
    result = exhibit.result
    for cluster in (int(result.scores[2].argmax()), int(result.scores[2].argmin())):
        html = cluster_section(exhibit, cluster, 2).to_html()
        direction = np.sign(result.scores[2, cluster])
        members = np.flatnonzero(result.cluster_ids == cluster)
        best = members[np.argsort(-direction * result.row_scores[2, members])][:4]
        shown = cards(html)
        assert [title for title, _ in shown[:4]] == [f"row {row}" for row in best]
        assert {title for title, _ in shown[4:]} == {"synthetic"}
        assert "Real rows" in html and "Synthetic samples" in html
        assert html.count("<img") == len(shown)


def test_samples_say_their_likeliest_label_and_weight(exhibit):
    synset = tiny_synset()
    card = exhibit.cluster_samples(2)[0]
    target = synset.samples.targets[2, 0].softmax(-1)
    assert card.picture == png_of(synset.samples.inputs[2, 0])
    weight = float(synset.samples.log_weights[2, 0].exp())
    assert card.note == f"label {int(target.argmax())} ({float(target.max()):.0%})\nweight {weight:.3g}"


def test_rows_are_those_with_the_highest_and_lowest_scores(exhibit, alone):
    scores = exhibit.result.row_scores[5]
    order = np.argsort(-scores, kind="stable")
    shown = [title for title, _ in cards(rows_section(exhibit, 5, k=2).to_html())]
    assert shown == [f"row {row}" for row in (*order[:2], *order[::-1][:2])]
    table = rows_section(alone, 5, k=2).to_html()
    assert table.count("<table>") == 2 and f'<td class="number">{order[0]}</td>' in table
    unscored = Exhibit(dataclasses.replace(exhibit.result, row_scores=None))
    assert "Rows were not scored" in rows_section(unscored, 5).to_html()


def test_attributions_alone_are_shown_as_far_as_they_go(alone):
    html = cluster_section(alone, 0, 1).to_html()
    assert len(cards(html)) == 4 and "<img" not in html
    for way_out in ("Pass the training rows", "Pass the synset"):
        assert way_out in html
    unknown = Exhibit(dataclasses.replace(alone.result, cluster_ids=None))
    assert cards(cluster_section(unknown, 0, 1).to_html()) == []


def test_facts_withstand_metadata_of_any_kind(exhibit):
    metadata = {"used_rows": [1], "model": "x", "num_steps": {"a": []}, "rewind_step": "<b>", "num_runs": "9" * 999}
    html = facts_section(dataclasses.replace(exhibit.result, metadata=metadata)).to_html()
    assert "step &lt;b&gt; of" in html and "9" * 300 not in html


def test_what_does_not_belong_together_is_refused(exhibit):
    run, result = tiny_recorded_run(), exhibit.result
    with pytest.raises(ValueError, match="`rows` has 12 rows, the result was computed for 48"):
        Exhibit(result, rows=run.queries)
    with pytest.raises(ValueError, match="`queries` has 48 rows, the result has 12 queries"):
        Exhibit(result, queries=run.train_dataset)
    other = dataclasses.replace(result, metadata={"parameters_sha256": "f" * 64})
    with pytest.raises(ValueError, match="is not that of the result"):
        Exhibit(other, synset=tiny_synset())
    clusters = ClusterMap.from_ids(run.clusters.cluster_ids, names=list("abcdef"))
    with pytest.raises(ValueError, match="is not that of the result"):
        Exhibit(result, synset=dataclasses.replace(tiny_synset(), clusters=clusters))
