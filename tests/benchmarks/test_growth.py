from __future__ import annotations

import json
from dataclasses import replace
from itertools import count

import numpy as np
import pytest

from benchmarks import growth
from benchmarks.costs import seconds_in
from benchmarks.growth import AXES, Pictures, Recipe, Setup, measure, open_report, parts_of_classes, run
from benchmarks.growth_plots import BYTES, TIMES, draw, growth_table, measured_axes, power_law, series
from benchmarks.launched import work
from benchmarks.models import SmallCnnConfig, SmallCnnForImageClassification
from hf_rgm import DistillationConfig
from hf_rgm.distillation.learner import BlockLearner
from hf_rgm.files.writing import write_json

RECIPE = Recipe(num_steps=8, batch_size=8, num_queries=4, num_iterations=2)
TINY = Setup(num_rows=60, num_clusters=10, hidden_sizes=(2, 3))
AXES_OF_ROWS = {"rows": [TINY, replace(TINY, num_rows=80)]}


@pytest.fixture(scope="module")
def pictures():
    generator = np.random.default_rng(0)
    images, queries = (generator.integers(0, 256, (count, 8, 8), dtype=np.uint8) for count in (80, 6))
    return Pictures(images, (np.arange(80) % 10).astype(np.uint8), queries, (np.arange(6) % 10).astype(np.uint8))


def report_of(costs):
    """Rows 10, 100 and 1,000, with costs that are functions of their number."""
    names = ["large", "small", "middle"]
    entries = {
        name: {"num_rows": x, "costs": {cost: function(x) for cost, function in costs.items()}}
        for name, x in zip(names, (1000, 10, 100), strict=True)
    }
    identity = {"task": "growth", "num_steps": 8, "num_queries": 4}
    return {"identity": identity, "axes": {"rows": names, "clusters": ["absent"]}, "methods": entries}


@pytest.fixture
def report():
    constant = {cost: lambda x: 5e6 for cost in ("training_peak_bytes", "distilling_peak_bytes", "online_peak_bytes")}
    return report_of(
        {
            "training_seconds": lambda x: 0.5 * x,
            "recording_seconds": lambda x: 0.01 * x,
            "distilling_seconds": lambda x: 2.0 * x**1.5,
            "online_seconds": lambda x: 3.0 * x**2,
            "kept_bytes": lambda x: 1000.0 * x,
            **constant,
        }
    )


class TestFits:
    def test_exact_power_laws_are_found(self):
        x = [10, 1000, 100]
        law = power_law(x, [3 * value**1.75 for value in x])
        assert (law.exponent, law.factor, law.last_exponent) == pytest.approx((1.75, 3, 1.75))

    def test_the_last_exponent_is_of_the_largest_alone(self):
        law = power_law([100, 10, 1], [1000, 10, 10])
        assert law.last_exponent == pytest.approx(2)
        assert law.exponent == pytest.approx(1)

    @pytest.mark.parametrize(("x", "y"), [([1], [1]), ([1, 2], [0, 1]), ([-1, 2], [1, 1])])
    def test_what_has_no_logarithm_is_refused(self, x, y):
        with pytest.raises(ValueError, match="at least two points with positive values"):
            power_law(x, y)

    def test_times_are_relative_to_the_training_of_the_same_point(self, report):
        assert series(report, "rows", "online_seconds") == ([10, 100, 1000], pytest.approx([60, 600, 6000]))
        assert series(report, "rows", "training_seconds")[1] == [5, 50, 500]
        assert series(report, "clusters", "online_seconds") == ([], [])

    def test_table(self, report):
        lines = growth_table(report).splitlines()
        assert len(lines) == 2 + 8
        assert "| 10 to 1,000 training rows | one training | 5.0 s | 500.0 s | 1.00 | 1.00 |" in lines
        assert "| 10 to 1,000 training rows | distilling | 13 | 126 | 0.50 | 0.50 |" in lines
        assert "| 10 to 1,000 training rows | kept: the synset | 10 kB | 1.0 MB | 1.00 | 1.00 |" in lines

    def test_axes_with_a_single_point_are_left_out(self, report, tmp_path):
        del report["methods"]["large"]
        assert measured_axes(report) == ["rows"]
        del report["methods"]["small"]
        assert measured_axes(report) == []
        assert growth_table(report) == ""
        draw(report, tmp_path / "none.png")
        assert not (tmp_path / "none.png").exists()

    def test_plots_are_written(self, report, tmp_path):
        draw(report, tmp_path / "folder" / "growth.png")
        assert (tmp_path / "folder" / "growth.png").read_bytes().startswith(b"\x89PNG")


class TestPoints:
    def test_one_quantity_grows_while_the_others_stay(self):
        base = Setup()
        assert base in AXES["rows"] and base in AXES["clusters"]
        fields = {"rows": "num_rows", "clusters": "num_clusters", "parameters": "hidden_sizes"}
        for axis, field in (fields | {"processes": "num_processes"}).items():
            changed = {
                name for setup in AXES[axis] for name in vars(setup) if getattr(setup, name) != vars(base)[name]
            }
            assert changed == {field}
        assert len({setup.name for setups in AXES.values() for setup in setups}) == 5 + 5 + 5 - 1 + 3

    def test_models_have_ten_thousand_to_a_million_parameters(self):
        def num_parameters(setup):
            config = SmallCnnConfig(image_size=28, hidden_sizes=setup.hidden_sizes, num_labels=10)
            return SmallCnnForImageClassification(config).num_parameters()

        assert num_parameters(Setup()) == 20_490
        counts = [num_parameters(setup) for setup in AXES["parameters"]]
        assert counts[0] == pytest.approx(1e4, rel=0.05) and counts[-1] == pytest.approx(1e6, rel=0.05)
        assert counts == sorted(counts)

    def test_classes_are_split_into_equal_parts(self):
        labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 9)).astype(np.uint8)
        clusters = parts_of_classes(labels, 30)
        assert clusters.sizes.tolist() == [3] * 30
        assert all(len(set(labels[clusters.rows(cluster)])) == 1 for cluster in range(30))
        with pytest.raises(ValueError, match="multiple of the 10 classes, got 25"):
            parts_of_classes(labels, 25)

    def test_rows_are_standardised_and_queries_like_them(self, pictures):
        train, queries = pictures.datasets(60, 4)
        pixels = train[:]["pixel_values"].numpy()
        assert (pixels.shape, len(queries)) == ((60, 1, 8, 8), 4)
        assert (pixels.mean(), pixels.std()) == pytest.approx((0, 1), abs=1e-5)
        raw = pictures.images[:60].astype(float)
        expected = (pictures.query_images[:4] - raw.mean()) / raw.std()
        np.testing.assert_allclose(queries[:]["pixel_values"].numpy()[:, 0], expected, atol=1e-5)

    def test_what_is_measured_in_part_is_scaled_up(self, pictures, monkeypatch):
        """With a clock that ticks once a reading: one second a block, two for what holds it, whatever the machine."""
        ticks = count()
        monkeypatch.setattr("time.process_time", lambda: float(next(ticks)))
        found = measure(TINY, RECIPE, pictures)
        costs = found["costs"]
        assert costs["training_seconds"] == 1
        assert costs["distilling_gradients_seconds"] == 3 - 1
        assert costs["distilling_seconds"] == 2 + DistillationConfig().num_iterations / RECIPE.num_iterations
        assert costs["online_seconds"] == 1
        assert (found["num_rows"], found["num_clusters"], found["num_parameters"]) == (60, 10, 20 + 57 + 130)
        assert 0 < costs["recording_seconds"]
        assert costs["kept_bytes"] > 4 * 10 * 5 * 64  # at least the pixels of the samples
        assert costs["trajectory_bytes"] > 4 * 3 * 8 * found["num_parameters"]

    def test_of_several_processes_the_one_that_takes_most_counts(self, pictures, monkeypatch):
        """What they are given is enough for one alone to do the work; what they cost is here made up."""

        def launched(folder, setup, recipe):
            assert setup["num_processes"] == 2
            monkeypatch.setenv("RANK", "0")
            (folder / "task.json").write_text(json.dumps({"setup": setup, "recipe": recipe}))
            work(folder)
            own = json.loads((folder / "costs-0.json").read_text())
            return [own | {"distilling_seconds": 1.0, "online_seconds": 9.0}, own | {"distilling_seconds": 3.0}]

        monkeypatch.setattr(growth, "launched", launched)
        found = measure(replace(TINY, num_processes=2), RECIPE, pictures)
        assert found["num_processes"] == 2
        assert (found["costs"]["distilling_seconds"], found["costs"]["online_seconds"]) == (3.0, 9.0)
        assert found["costs"].keys() >= TIMES.keys() | BYTES.keys()

    def test_the_learner_is_left_as_it_was(self):
        learn = BlockLearner.learn
        with seconds_in(BlockLearner, "learn") as seconds:
            assert BlockLearner.learn is not learn
        assert BlockLearner.learn is learn
        assert seconds == []


class TestResume:
    @pytest.fixture
    def measured(self, monkeypatch):
        names = []

        def fake(setup, recipe, pictures):
            names.append(setup.name)
            return {"num_rows": setup.num_rows, "costs": {}}

        monkeypatch.setattr(growth, "measure", fake)
        return names

    def test_a_stopped_run_goes_on_where_it_was(self, measured, tmp_path):
        path, setups = tmp_path / "growth.json", AXES_OF_ROWS["rows"]

        def stopped():
            yield setups[0]
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(stopped(), RECIPE, None, open_report(path, RECIPE, AXES_OF_ROWS))
        run(setups, RECIPE, None, open_report(path, RECIPE, AXES_OF_ROWS))
        assert measured == [setup.name for setup in setups]
        found = open_report(path, RECIPE, AXES_OF_ROWS).content
        assert list(found["methods"]) == found["axes"]["rows"] == measured
        assert [entry["num_rows"] for entry in found["methods"].values()] == [60, 80]

    def test_other_recipes_are_not_mixed_in(self, measured, tmp_path):
        path = tmp_path / "growth.json"
        run(AXES_OF_ROWS["rows"][:1], RECIPE, None, open_report(path, RECIPE, AXES_OF_ROWS))
        other = replace(RECIPE, num_steps=9)
        with pytest.raises(ValueError, match="num_steps was 8 and is 9.*--anew"):
            open_report(path, other, AXES_OF_ROWS)
        assert open_report(path, other, AXES_OF_ROWS, anew=True).content["methods"] == {}


def test_the_script_measures_and_draws(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "AXES", AXES_OF_ROWS)
    monkeypatch.setattr(growth, "Recipe", lambda: RECIPE)
    monkeypatch.setattr(growth, "load_images", lambda: tuple(vars(pictures).values()))
    costs = {"training_seconds": 1.0} | dict.fromkeys(TIMES | BYTES, 2.0)
    monkeypatch.setattr(growth, "measure", lambda setup, *_: {"num_rows": setup.num_rows, "costs": costs})
    write_json(tmp_path / "growth.json", {"format_version": -1})
    arguments = growth.argparse.Namespace(axes=["rows"], output=tmp_path / "growth.json", anew=True)
    growth.main(arguments)
    assert (tmp_path / "growth.png").is_file()
    assert len(open_report(tmp_path / "growth.json", RECIPE, AXES_OF_ROWS).content["methods"]) == 2
