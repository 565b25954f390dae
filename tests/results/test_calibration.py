from __future__ import annotations

import json

import numpy as np
import pytest
from huggingface_hub import RepoCard

from hf_rgm import AttributionResult, Attributor
from hf_rgm.agreement.correlations import Estimate
from hf_rgm.agreement.fidelity_figures import Agreement
from hf_rgm.fidelity.report import FidelityReport
from hf_rgm.pages.exhibit import Exhibit
from hf_rgm.pages.views import banner, facts_section
from hf_rgm.testing import tiny_recorded_run, tiny_synset

RUN = tiny_recorded_run()


def agreement(slope, low=1.0):
    return Agreement(Estimate(0.5, 0.4, 0.6), 9, slope=None if slope is None else Estimate(slope, low, 2 * slope))


def report(result, **changes):
    arguments = {
        "agreements": {"lds_clusters": agreement(4.0)},
        "engine": result.engine,
        "objective": "margin",
        "num_queries": 12,
        "seeds": (1,),
        "rows": bool(result.metadata["used_rows"]),
        "samples_sha256": tiny_synset().samples_sha256,
        "parameters_sha256": result.metadata["parameters_sha256"],
    }
    return FidelityReport(**(arguments | changes))


@pytest.fixture(scope="module")
def attributor():
    return Attributor(RUN.model, tiny_synset(), disable_tqdm=True)


@pytest.fixture(scope="module")
def alone(attributor):
    return attributor.attribute(RUN.queries)


@pytest.fixture(scope="module")
def with_rows(attributor):
    return attributor.attribute(RUN.queries, rows=RUN.train_dataset)


def test_scores_are_multiplied_and_their_order_stays(with_rows):
    measured = {"lds_clusters": agreement(4.0), "leave_cluster_out": agreement(3.0), "lds_rows": agreement(2.0)}
    result = with_rows.calibrated(report(with_rows, agreements=measured))
    np.testing.assert_allclose(result.scores, 3 * with_rows.scores)  # single clusters say more than halves
    np.testing.assert_allclose(result.row_scores, 2 * with_rows.row_scores)
    np.testing.assert_array_equal(result.objective_values, with_rows.objective_values)
    assert list(result.top(6)["cluster"]) == list(with_rows.top(6)["cluster"])
    assert with_rows.factors is None
    halves = with_rows.calibrated(report(with_rows))
    np.testing.assert_allclose(halves.scores, 4 * with_rows.scores)
    np.testing.assert_array_equal(halves.row_scores, with_rows.row_scores)


def test_everything_that_shows_scores_says_whether_sizes_are_calibrated(with_rows, tmp_path):
    for result, said, in_words in (
        (with_rows, "sizes not calibrated", "Sizes are not calibrated"),
        (with_rows.calibrated(report(with_rows)), "sizes calibrated", "multiplied by 4.000 [1.000, 8.000]"),
    ):
        folder = result.save_pretrained(tmp_path / said)
        kept = AttributionResult.from_pretrained(folder)
        assert kept.factors == result.factors
        assert said in repr(kept)
        assert in_words in RepoCard.load(folder / "README.md").text
        assert in_words in banner(kept)[1] and in_words in facts_section(kept).to_html()
        assert f"; {said}" in kept.plot("bars").get_xlabel()
        assert f"; {said}" in kept.plot().figure.axes[1].get_ylabel()
        # Without retrained halves of the rows nothing is known of theirs.
        assert "; sizes not calibrated" in kept.plot("bars", rows=True).get_xlabel()
        html = kept.to_html(tmp_path / "page.html", rows=RUN.train_dataset, queries=RUN.queries)
        assert in_words in html.read_text(encoding="utf-8")
    assert Exhibit(kept).result.metadata["fidelity"]["agreements"]["lds_clusters"]["slope"]["value"] == 4


def test_the_report_of_the_synset_serves_by_default(alone):
    with pytest.raises(ValueError, match=r"No fidelity was measured.*Pass the `FidelityReport`"):
        alone.calibrated()
    synset = tiny_synset()
    synset.fidelity = report(alone).to_dict()
    try:
        result = Attributor(RUN.model, synset, disable_tqdm=True).attribute(RUN.queries).calibrated()
    finally:
        synset.fidelity = None
    np.testing.assert_allclose(result.scores, 4 * alone.scores, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "adjoint"}, "`engine` is 'adjoint', that of these scores 'linearized_replay'"),
        ({"objective": "loss"}, "`objective` is 'loss'"),
        ({"rows": True}, "`rows` is True"),
        ({"settings": {"rewind": 0.5}}, r"`settings` is \{'rewind': 0.5\}, that of these scores \{\}"),
        ({"samples_sha256": "0"}, "`samples_sha256` is '0'"),
        ({"parameters_sha256": "0"}, "`parameters_sha256` is '0'"),
        ({"agreements": {"lds_clusters": agreement(None)}}, "has no slope"),
        ({"agreements": {"lds_rows": agreement(2.0)}}, "has no slope"),
        ({"agreements": {"lds_clusters": agreement(2.0, low=-0.1)}}, r"2.000 \[-0.100, 4.000\].* too uncertain"),
        ({"agreements": {"lds_clusters": agreement(2.0, low=None)}}, "too uncertain to multiply by"),
    ],
)
def test_reports_about_other_scores_and_uncertain_sizes_are_refused(alone, changes, message):
    with pytest.raises(ValueError, match=message):
        alone.calibrated(report(alone, **changes))


def test_scores_with_a_rewind_of_their_own_need_a_report_with_the_same(attributor):
    result = attributor.attribute(RUN.queries, rewind=0.5)
    with pytest.raises(ValueError, match="`settings`"):
        result.calibrated(report(result))
    assert result.calibrated(report(result, settings={"rewind": 0.5})).factors is not None


def test_nothing_is_calibrated_twice(alone):
    once = alone.calibrated(report(alone))
    with pytest.raises(ValueError, match="calibrated already"):
        once.calibrated(report(alone))


@pytest.mark.parametrize("fidelity", [None, [], {"format_version": 1}])
def test_damaged_calibrations_are_named(alone, fidelity, tmp_path):
    folder = alone.save_pretrained(tmp_path / "result")
    content = json.loads((folder / "attribution.json").read_text())
    content["metadata"] |= {"calibrated": True, "fidelity": fidelity}
    (folder / "attribution.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="fidelity report"):
        AttributionResult.from_pretrained(folder)
