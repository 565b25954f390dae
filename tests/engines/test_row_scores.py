"""Scores of rows in a folder: the same as in memory, continued where they were, and never mixed up."""

from __future__ import annotations

import numpy as np
import pytest

from hf_rgm import Attributor
from hf_rgm.engines import row_scores
from hf_rgm.engines.adjoint import AdjointEngine
from hf_rgm.engines.row_scores import ScoreFolder, cluster_sums, score_blocks
from hf_rgm.results.result import AttributionResult
from hf_rgm.testing import tiny_recorded_run, tiny_synset

RUN = tiny_recorded_run()


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 9 rows: five, and one of 3."""
    monkeypatch.setattr(row_scores, "MAX_BLOCK_ROWS", 9)


@pytest.fixture
def scored(monkeypatch):
    """The rows that are scored, in order."""
    found = []
    original = row_scores.row_scores

    def counted(engine, directions, source, rows, sums):
        found.append((rows.start, rows.stop))
        return original(engine, directions, source, rows, sums)

    monkeypatch.setattr(row_scores, "row_scores", counted)
    return found


@pytest.fixture(scope="module")
def in_memory():
    return attributor().attribute(RUN.queries, rows=RUN.train_dataset, engine="adjoint")


def attributor(**settings):
    return Attributor(RUN.model, tiny_synset(), disable_tqdm=True, **settings)


def attribute(folder, queries=RUN.queries, **options):
    return attributor().attribute(queries, rows=RUN.train_dataset, engine="adjoint", output_dir=folder, **options)


@pytest.mark.parametrize(("num_values", "num_rows", "at_once"), [(1, 1, 5), (7, 1000, 3), (20, 100_000, 8)])
def test_blocks_cover_the_matrix_once(num_values, num_rows, at_once):
    covered = np.zeros((num_values, num_rows), dtype=np.int8)
    for group in score_blocks(num_values, num_rows, values_at_once=at_once):
        assert len({block.values for block in group}) == 1
        for block in group:
            covered[block.place] += 1
            assert block.size == covered[block.place].size <= row_scores.MAX_BLOCK_BYTES // 4
    assert (covered == 1).all()


def test_scores_in_a_folder_are_those_in_memory_and_mapped(tmp_path, small_blocks, in_memory):
    result = attribute(tmp_path / "scores")
    assert isinstance(result.row_scores.base, np.memmap)
    np.testing.assert_allclose(result.row_scores, in_memory.row_scores, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(result.scores, in_memory.scores, rtol=1e-4, atol=1e-6)
    (folder,) = (tmp_path / "scores").iterdir()
    assert [path.name for path in folder.iterdir()] == ["row_scores.npy"]
    assert result.top(3, query=2, rows=True)["score"].tolist() == sorted(result.row_scores[2])[:-4:-1]
    loaded = AttributionResult.from_pretrained(result.save_pretrained(tmp_path / "result"))
    np.testing.assert_array_equal(loaded.row_scores, result.row_scores)


def test_a_killed_run_goes_on_where_it_was(tmp_path, small_blocks, scored, monkeypatch, in_memory):
    write = ScoreFolder.write

    def killed(folder, block, scores):
        if block.rows.start == 27:
            raise KeyboardInterrupt
        write(folder, block, scores)

    with monkeypatch.context() as context:
        context.setattr(ScoreFolder, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            attribute(tmp_path)
    assert scored == [(0, 9), (9, 18), (18, 27), (27, 36)]
    scored.clear()
    result = attribute(tmp_path)
    assert scored == [(27, 36), (36, 45), (45, 48)]
    np.testing.assert_allclose(result.row_scores, in_memory.row_scores, rtol=1e-5, atol=1e-7)
    scored.clear()
    np.testing.assert_array_equal(attribute(tmp_path).row_scores, result.row_scores)
    assert scored == []


@pytest.mark.parametrize("options", [{"objective": "loss"}, {"rewind": 0.5}, {"engine": "linearized_replay"}])
def test_other_questions_have_a_folder_of_their_own(tmp_path, options, in_memory):
    attribute(tmp_path)
    other = attributor().attribute(
        RUN.queries, rows=RUN.train_dataset, output_dir=tmp_path, **{"engine": "adjoint", **options}
    )
    # Beside a replay rows are scored by the same adjoint.
    same = options == {"engine": "linearized_replay"}
    assert len(list(tmp_path.iterdir())) == (1 if same else 2)
    assert np.array_equal(other.row_scores, in_memory.row_scores) == same


def test_a_damaged_block_is_named_and_the_rest_kept(tmp_path, small_blocks, monkeypatch):
    monkeypatch.setattr(ScoreFolder, "join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        attribute(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(row_scores, "MAX_BLOCK_ROWS", 9)
    block = next(tmp_path.glob("*/block-*-18-27.npy"))
    content = block.read_bytes()
    for damaged in (content[:-1], bytes(len(content)), content[:-40] + bytes(8) + content[-32:]):
        block.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"block-0-12-18-27.npy is damaged .* Delete it"):
            attribute(tmp_path)
    block.unlink()
    assert attribute(tmp_path).row_scores.shape == (12, 48)


def test_a_damaged_matrix_is_named(tmp_path):
    attribute(tmp_path)
    matrix = next(tmp_path.glob("*/row_scores.npy"))
    content = matrix.read_bytes()
    matrix.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    with pytest.raises(ValueError, match=r"row_scores.npy is damaged .* Delete it"):
        attribute(tmp_path)


def test_queries_that_do_not_fit_together_go_in_groups(tmp_path, in_memory, monkeypatch):
    """As where memory holds the directions of a single query."""
    monkeypatch.setattr(AdjointEngine, "queries_at_once", 1)
    tight = attribute(tmp_path, queries=RUN.queries.select(range(2)))
    np.testing.assert_allclose(tight.row_scores, in_memory.row_scores[:2], rtol=2e-4, atol=2e-6)


def test_sums_by_cluster_go_through_the_rows_in_parts(monkeypatch):
    matrix = np.random.default_rng(0).standard_normal((3, 48)).astype(np.float32)
    monkeypatch.setattr(row_scores, "MAX_BLOCK_BYTES", 8 * 3 * 7)
    expected = [matrix[:, RUN.clusters.rows(k)].sum(1) for k in range(6)]
    np.testing.assert_allclose(cluster_sums(matrix, RUN.clusters), np.stack(expected, axis=1), rtol=1e-5)


def test_a_folder_without_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`output_dir` is for the scores of rows"):
        attributor().attribute(RUN.queries, output_dir=tmp_path / "scores")
    assert not (tmp_path / "scores").exists()
