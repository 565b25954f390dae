import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from hf_rgm.agreement.correlations import linear_datamodeling_score
from hf_rgm.plots import (
    HARMS,
    HELPS,
    plot_bars,
    plot_heatmap,
    plot_inspection_curve,
    plot_matching_error,
    plot_predicted_against_actual,
    plot_synset_gallery,
)

AWKWARD = "$\\frac{1}{ & <b>\n" + "long " * 30


def png(ax):
    buffer = io.BytesIO()
    ax.figure.savefig(buffer, format="png")
    return buffer.getvalue()


def texts(labels):
    return [label.get_text() for label in labels]


def test_heatmap_puts_alike_queries_and_clusters_beside_each_other():
    scores = np.array([[5.0, 0.0, 4.0, 0.0], [0.0, 3.0, 0.0, 3.0], [4.0, 0.0, 5.0, 0.0], [0.0, 2.0, 0.0, 3.0]])
    ax = plot_heatmap(scores, ["q0", "q1", "q2", "q3"], ["c0", "c1", "c2", "c3"])
    queries, clusters = texts(ax.get_yticklabels()), texts(ax.get_xticklabels())
    assert {frozenset(queries[:2]), frozenset(queries[2:])} == {frozenset({"q0", "q2"}), frozenset({"q1", "q3"})}
    assert {frozenset(clusters[:2]), frozenset(clusters[2:])} == {frozenset({"c0", "c2"}), frozenset({"c1", "c3"})}
    shown = np.asarray(ax.images[0].get_array())
    for row, query in enumerate(queries):
        for column, cluster in enumerate(clusters):
            assert shown[row, column] == scores[int(query[1]), int(cluster[1])]


def test_heatmap_colours_are_symmetric_and_tell_the_sign():
    ax = plot_heatmap(np.array([[4.0, -1.0]]), ["q"], ["a", "b"])
    image = ax.images[0]
    assert image.get_clim() == (-4.0, 4.0)
    assert image.cmap(image.norm(4.0)) == pytest.approx(to_rgba(HELPS), abs=0.01)
    assert image.cmap(image.norm(-4.0)) == pytest.approx(to_rgba(HARMS), abs=0.01)
    assert image.cmap(image.norm(0.0)) == pytest.approx((1, 1, 1, 1), abs=0.02)


@pytest.mark.parametrize("maximize", [True, False])
def test_what_harms_is_never_painted_as_what_helps(maximize):
    raises, lowers = (HELPS, HARMS) if maximize else (HARMS, HELPS)
    heatmap = plot_heatmap(np.array([[4.0, -4.0]]), ["q"], ["a", "b"], maximize=maximize)
    image = heatmap.images[0]
    assert image.cmap(image.norm(4.0)) == pytest.approx(to_rgba(raises), abs=0.01)
    assert image.cmap(image.norm(-4.0)) == pytest.approx(to_rgba(lowers), abs=0.01)
    bars = plot_bars(["a", "b"], np.array([4.0, -4.0]), maximize=maximize)
    assert [patch.get_facecolor() for patch in bars.patches] == [to_rgba(raises), to_rgba(lowers)]
    assert "blue helps, orange harms" in bars.get_xlabel()


@pytest.mark.parametrize("num_queries", [2, 5, 40])
def test_a_query_far_out_does_not_hide_the_others(num_queries):
    scores = np.random.default_rng(0).choice([-1.0, 1.0], size=(num_queries, 10))
    scores[0] *= 1e4
    ax = plot_heatmap(scores, range(num_queries), range(10))
    low, high = ax.images[0].get_clim()
    assert -low == high and 1 <= high <= 3
    alike = plot_heatmap(scores[1:], range(1, num_queries), range(10))
    assert alike.images[0].get_clim() == (-1, 1)


def test_heatmap_says_what_it_leaves_out():
    scores = np.diag(np.arange(1.0, 7.0))
    ax = plot_heatmap(scores, range(6), list("abcdef"), max_queries=4, max_clusters=2)
    assert sorted(texts(ax.get_xticklabels())) == ["e", "f"]
    assert sorted(texts(ax.get_yticklabels())) == ["2", "3", "4", "5"]
    assert "2 of 6" in ax.get_xlabel()
    assert "4 of 6" in ax.get_ylabel()


def test_heatmap_of_nothing_but_zeros():
    assert png(plot_heatmap(np.zeros((3, 4)), range(3), list("abcd")))


def test_bars_show_both_ends_coloured_by_sign():
    ax = plot_bars([f"c{i}" for i in range(10)], np.array([1.0, -2, 3, 0.1, 0.2, 0.3, 5, -6, 0.1, 0.2]), k=2)
    assert texts(ax.get_yticklabels()) == ["c6", "c2", "", "c1", "c7"]
    assert [patch.get_width() for patch in ax.patches] == [5.0, 3.0, -2.0, -6.0]
    assert [patch.get_facecolor() for patch in ax.patches] == [to_rgba(HELPS)] * 2 + [to_rgba(HARMS)] * 2
    assert "  6 more" in texts(ax.texts)


def test_bars_show_all_when_there_are_few():
    ax = plot_bars(["a", "b", "c"], np.array([1.0, 2.0, 3.0]), k=2)
    assert texts(ax.get_yticklabels()) == ["c", "b", "a"]


def test_gallery_stretches_every_picture_to_its_own_range():
    dim = torch.arange(4.0).reshape(1, 1, 2, 2)
    ax = plot_synset_gallery(torch.cat([dim, 100 + 10 * dim, 0 * dim]), ["a", "b", "c"], columns=2)
    pictures = [np.asarray(image.get_array()) for image in ax.images]
    np.testing.assert_allclose(pictures[0], pictures[1])
    np.testing.assert_array_equal(pictures[0], np.array([[0, 1 / 3], [2 / 3, 1]]))
    np.testing.assert_array_equal(pictures[2], np.zeros((2, 2)))
    assert texts(ax.texts) == ["a", "b", "c"]


def test_gallery_takes_colour_and_draws_upright():
    images = np.zeros((2, 3, 4, 6))
    images[:, 0, 0] = 1.0
    ax = plot_synset_gallery(images, ["a", "b"], title="two")
    assert np.asarray(ax.images[0].get_array()).shape == (4, 6, 3)
    left, right, bottom, top = ax.images[0].get_extent()
    assert (left, right) == (0, 1)
    assert bottom > top
    assert ax.get_ylim()[0] > ax.get_ylim()[1]


def test_predicted_against_actual_of_several_queries_is_the_lds():
    actual = np.array([[1.0, 2, 3, 4, 5], [5.0, 1, 4, 2, 3]])
    predicted = actual + np.array([[0.0, 0, 0, 0, 0], [0.0, 4, 0, 0, 0]])
    lds = linear_datamodeling_score(predicted, actual)
    assert lds.value < 1
    ax = plot_predicted_against_actual(predicted, actual)
    assert texts(ax.texts) == [f"rank correlation {lds}\nmean over 2 queries, 5 points each"]
    np.testing.assert_array_equal(np.asarray(ax.collections[0].get_offsets())[:, 1], predicted.ravel())


def test_matching_error_puts_the_worst_cluster_first_and_says_what_it_leaves_out():
    ax = plot_matching_error(np.array([[0.1, 0.5, 0.2], [0.3, 0.1, 0.8]]), [3, 9], ["a", "b", "c"], max_clusters=2)
    assert texts(ax.get_xticklabels()) == ["c", "b"]
    assert texts(ax.get_yticklabels()) == ["3", "9"]
    np.testing.assert_allclose(np.asarray(ax.images[0].get_array()), [[0.2, 0.5], [0.8, 0.1]])
    assert ax.images[0].get_clim() == (0, 0.8)
    assert "2 of 3" in ax.get_xlabel()


def test_inspection_curve_is_in_percent_and_shows_chance():
    ax = plot_inspection_curve(np.array([0.0, 0.5, 1.0]), {"scores": [0, 1, 1], "training loss": [0, 0.5, 1]})
    assert [list(line.get_ydata()) for line in ax.lines] == [[0, 100, 100], [0, 50, 100], [0, 100]]
    assert texts(ax.get_legend().get_texts()) == ["scores", "training loss", "random order, expected"]


@pytest.mark.parametrize(
    "draw",
    [
        lambda **at: plot_heatmap(np.eye(3), [AWKWARD, 1, 2], [AWKWARD, "b", "c"], title=AWKWARD, **at),
        lambda **at: plot_bars([AWKWARD, "b"], np.array([1.0, -2.0]), title=AWKWARD, **at),
        lambda **at: plot_synset_gallery(np.eye(4).reshape(1, 4, 4), [AWKWARD], title=AWKWARD, **at),
        lambda **at: plot_predicted_against_actual(*np.arange(6).reshape(2, 1, 3), title=AWKWARD, **at),
        lambda **at: plot_inspection_curve([0, 1], {AWKWARD: [0, 1]}, title=AWKWARD, what=AWKWARD, **at),
        lambda **at: plot_matching_error([[0.5, 1]], [AWKWARD], [AWKWARD, "b"], title=AWKWARD, **at),
    ],
)
def test_awkward_names_are_drawn_without_touching_pyplot(draw):
    before = plt.get_fignums()
    assert png(draw()).startswith(b"\x89PNG")
    given = Figure().add_subplot()
    assert draw(ax=given) is given
    assert plt.get_fignums() == before


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plot_heatmap(np.array([[np.nan]]), ["q"], ["a"]), "1 NaN or infinite values of 1"),
        (lambda: plot_heatmap(np.zeros((0, 0)), [], []), "has no values, but shape"),
        (lambda: plot_bars(["a"], np.zeros(1), k=0), "`k` must be at least 1, got 0"),
        (lambda: plot_synset_gallery(np.zeros((2, 5, 4, 4)), ["a", "b"]), "must have shape"),
        (lambda: plot_synset_gallery(np.zeros((0, 4, 4)), []), "has no values, but shape"),
        (lambda: plot_predicted_against_actual(np.array([np.nan, 1]), np.zeros(2)), "`predicted` has 1 NaN"),
    ],
)
def test_bad_input_is_named(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
