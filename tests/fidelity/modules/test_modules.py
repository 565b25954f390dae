"""The `evaluate` modules, loaded by path and imported."""

from __future__ import annotations

import inspect
import re
from dataclasses import asdict
from pathlib import Path

import evaluate
import numpy as np
import pytest

from hf_rgm.agreement.correlations import leave_cluster_out_correlation, linear_datamodeling_score
from hf_rgm.fidelity.modules.leave_one_out_correlation import LeaveOneOutCorrelation
from hf_rgm.fidelity.modules.linear_datamodeling_score import LinearDatamodelingScore

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "hf_rgm" / "fidelity" / "modules"
MODULES = {
    "linear_datamodeling_score": (LinearDatamodelingScore, linear_datamodeling_score),
    "leave_one_out_correlation": (LeaveOneOutCorrelation, leave_cluster_out_correlation),
}


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_MODULES_CACHE", "HF_METRICS_CACHE"):
            patch.setattr(evaluate.config, name, tmp_path_factory.mktemp(name))
        yield


@pytest.fixture
def pairs():
    generator = np.random.default_rng(0)
    references = generator.normal(size=(7, 9))
    return {"predictions": references + generator.normal(size=(7, 9)), "references": references}


@pytest.mark.parametrize("name", MODULES)
def test_both_ways_of_loading_give_the_figures_of_the_scores(name, pairs):
    imported, score = MODULES[name]
    expected = asdict(score(pairs["predictions"], pairs["references"], seed=3))
    expected[name] = expected.pop("value")
    for metric in (imported(), evaluate.load(str(FOLDER / name))):
        assert metric.compute(**pairs, seed=3) == expected
        for prediction, reference in zip(pairs["predictions"], pairs["references"], strict=True):
            metric.add(prediction=prediction, reference=reference)
        assert metric.compute(seed=3) == expected


def test_leave_one_out_takes_pearson_too(pairs):
    expected = leave_cluster_out_correlation(*pairs.values(), correlation="pearson").value
    found = LeaveOneOutCorrelation().compute(**pairs, correlation="pearson")
    assert found["leave_one_out_correlation"] == expected


@pytest.mark.parametrize("name", MODULES)
def test_bad_input_is_refused(name, pairs):
    metric = MODULES[name][0]()
    with pytest.raises(ValueError, match="All 7 queries have constant predictions"):
        metric.compute(predictions=np.zeros((7, 9)), references=pairs["references"])


@pytest.mark.parametrize("name", MODULES)
def test_the_readme_example_prints_what_it_says(name, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    readme = (FOLDER / name / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", readme, flags=re.DOTALL)[1]
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == re.search(r"print\(.*\)  # (.*)\n", code)[1]


@pytest.mark.parametrize("name", MODULES)
def test_modules_say_what_they_are(name):
    metric = MODULES[name][0]()
    assert metric.description.strip() and metric.citation.strip() and "Examples:" in metric.inputs_description
    assert set(metric.features) == {"predictions", "references"}
    assert metric.description == inspect.getdoc(MODULES[name][0])
