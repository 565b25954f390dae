import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_rgm.files.reading import ArtefactFolder
from hf_rgm.trajectory.fingerprint import dataset_fingerprint
from hf_rgm.trajectory.optimizers import OptimizerRule, ParameterGroup
from hf_rgm.trajectory.row_digest import rows_sha256
from hf_rgm.trajectory.states import TrajectoryState, detached_state, write_state
from hf_rgm.trajectory.steps import StepTable, part_path, read_steps, write_part
from hf_rgm.trajectory.trajectory import Trajectory

RULE = OptimizerRule("adam", (ParameterGroup(("a.weight",), weight_decay=0.1), ParameterGroup(("bias",))))
SHAPES = {"a.weight": (2, 3), "bias": ()}
NUM_STEPS = 4


def table(num_steps=NUM_STEPS, seed=0):
    generator = np.random.default_rng(seed)
    return StepTable(
        epoch=generator.random(num_steps),
        learning_rates=generator.random((num_steps, 2)),
        gradient_norm=generator.random(num_steps),
        clip_factor=generator.random(num_steps),
        skipped=np.arange(num_steps) == 1,
        rows=[generator.integers(0, 9, size=step + 1) for step in range(num_steps)],
        micro_batch_sizes=[[1] * (step + 1) for step in range(num_steps)],
    )


def state(step):
    generator = torch.Generator().manual_seed(step)
    values = [{n: torch.randn(shape, generator=generator) for n, shape in SHAPES.items()} for _ in range(3)]
    moments = {"exp_avg": values[1], "exp_avg_sq": {"a.weight": values[2]["a.weight"].square()}} if step else {}
    return TrajectoryState(step, values[0], moments)


def make(**changes):
    arguments = {
        "optimizer": RULE,
        "parameter_shapes": SHAPES,
        "steps": table(),
        "states": {step: state(step) for step in (0, 2, NUM_STEPS)},
        "num_rows": 9,
        "dataset_fingerprint": "f" * 64,
        "metadata": {"seeds": {"seed": 3}, "updates_before": 10},
    }
    return Trajectory(**(arguments | changes))


def assert_same_state(found, expected):
    assert found.step == expected.step
    assert found.moments.keys() == expected.moments.keys()
    torch.testing.assert_close(found.parameters, expected.parameters, rtol=0, atol=0)
    torch.testing.assert_close(found.moments, expected.moments, rtol=0, atol=0)


def assert_same_steps(found, expected):
    for name in ("epoch", "learning_rates", "gradient_norm", "clip_factor", "skipped"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        assert getattr(found, name).dtype == getattr(expected, name).dtype
    assert found.micro_batch_sizes == expected.micro_batch_sizes
    assert [rows.tolist() for rows in found.rows] == [rows.tolist() for rows in expected.rows]
    assert all(rows.dtype == np.int64 for rows in found.rows)


@pytest.fixture
def folder(tmp_path):
    make().save(tmp_path / "trajectory")
    return tmp_path / "trajectory"


def test_saving_and_loading_is_identity(folder):
    expected, found = make(), Trajectory.load(folder)
    assert_same_steps(found.steps, expected.steps)
    assert found.state_steps == (0, 2, 4)
    for step in found.state_steps:
        assert_same_state(found.state(step), expected.state(step))
    assert_same_state(found.final, expected.state(4))
    assert found.num_steps == 4
    for name in ("optimizer", "parameter_shapes", "num_rows", "dataset_fingerprint", "metadata"):
        assert getattr(found, name) == getattr(expected, name)
    assert (found.folder, expected.folder) == (folder, None)


def test_loaded_trajectory_can_be_saved_elsewhere_and_again(folder, tmp_path):
    for _ in range(2):
        Trajectory.load(folder).save(tmp_path / "other")
    assert_same_state(Trajectory.load(tmp_path / "other").final, state(4))
    Trajectory.load(folder).save(folder)
    assert_same_state(Trajectory.load(folder).final, state(4))


def test_states_keep_their_precision_on_disk_and_come_back_as_float32(tmp_path):
    half = TrajectoryState(4, {n: t.bfloat16() for n, t in state(4).parameters.items()}, {})
    make(states={4: half}).save(tmp_path / "one")
    Trajectory.load(tmp_path / "one").save(tmp_path / "two")
    stored = load_file(tmp_path / "two" / "states" / "step-00000004.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    loaded = Trajectory.load(tmp_path / "two").final.parameters
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
    assert torch.equal(loaded["bias"], half.parameters["bias"].float())


@pytest.mark.parametrize(("dtype", "stored"), [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_states_are_rounded_to_the_wanted_precision(tmp_path, dtype, stored):
    parameters = {"x": torch.randn(3, dtype=torch.float64), "y": torch.randn(3, dtype=torch.bfloat16)}
    write_state(tmp_path / "state.safetensors", detached_state(TrajectoryState(1, parameters, {}), dtype))
    found = load_file(tmp_path / "state.safetensors")
    assert found["parameters.x"].dtype == stored
    assert torch.equal(found["parameters.y"], parameters["y"])


def test_parameters_that_share_memory_are_stored_whole(tmp_path):
    flat = torch.arange(6.0)
    parameters = {"x": flat[:3], "y": flat.view(2, 3).T}
    write_state(tmp_path / "state.safetensors", TrajectoryState(1, parameters, {}))
    found = load_file(tmp_path / "state.safetensors")
    assert torch.equal(found["parameters.x"], parameters["x"])
    assert torch.equal(found["parameters.y"], parameters["y"])


def test_without_rows_tells_no_rows(folder, tmp_path):
    private = Trajectory.load(folder)
    shared = private.without_rows()
    shared.save(tmp_path / "shared")
    loaded = Trajectory.load(tmp_path / "shared")
    assert loaded.steps.rows is None
    assert loaded.steps.micro_batch_sizes is None
    assert private.steps.rows is not None
    np.testing.assert_array_equal(loaded.steps.learning_rates, private.steps.learning_rates)
    stored = {name.partition(".")[0] for name in load_file(part_path(tmp_path / "shared", 0))}
    assert stored == {"epoch", "learning_rates", "gradient_norm", "clip_factor", "skipped"}


def test_update_numbers_go_on_from_before_and_pass_over_skipped_steps():
    assert make().update_numbers.tolist() == [11, 11, 12, 13]
    assert make(metadata={}).update_numbers.tolist() == [1, 1, 2, 3]


def test_several_parts_are_one_table(tmp_path):
    whole = table(7)
    for start, stop in ((0, 3), (3, 4), (4, 7)):
        write_part(tmp_path, start, whole.select(start, stop))
    assert_same_steps(read_steps(ArtefactFolder(tmp_path), 7), whole)
    assert_same_steps(read_steps(ArtefactFolder(tmp_path), 5), whole.select(0, 5))


def test_unknown_state_names_the_recorded_ones():
    with pytest.raises(KeyError, match=r"step 1.*\[0, 2, 4\]"):
        make().state(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"states": {0: state(0)}}, r"at steps \[0\]; the last must be at step 4"),
        ({"steps": table(3)}, "the last must be at step 3"),
        ({"optimizer": OptimizerRule("adam", (ParameterGroup(tuple(SHAPES)),))}, "has 2 learning rates a step"),
        ({"parameter_shapes": {"bias": ()}}, r"differ in \['a.weight'\]"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_step_table_columns_have_one_length():
    with pytest.raises(ValueError, match="one length.*'gradient_norm': 2"):
        StepTable(epoch=[0.0], learning_rates=[[0.1]], gradient_norm=[1, 1], clip_factor=[1], skipped=[False])
    with pytest.raises(ValueError, match=r"\(num_steps, num_groups\), got \(1,\)"):
        StepTable(epoch=[0.0], learning_rates=[0.1], gradient_norm=[1], clip_factor=[1], skipped=[False])


def test_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="has no trajectory.json"):
        make().save(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def edit(folder, **changes):
    path = folder / "trajectory.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))


def cut(path, share):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def misshape(folder):
    path = folder / "states" / "step-00000002.safetensors"
    save_file(load_file(path) | {"exp_avg.bias": torch.ones(5)}, path)


DAMAGE = {
    "no description": (lambda f: (f / "trajectory.json").unlink(), FileNotFoundError, "has no trajectory.json"),
    "broken description": (lambda f: cut(f / "trajectory.json", 0.5), ValueError, "trajectory.json is not valid JSON"),
    "other version": (lambda f: edit(f, format_version=99), ValueError, "format version 99"),
    "earlier version": (
        lambda f: edit(f, format_version=1),
        ValueError,
        "format version 1, this release of hf_rgm reads 2. Install .*, or record the training run again with this",
    ),
    "missing key": (lambda f: edit(f, num_rows="absent"), ValueError, "trajectory.json lacks num_rows"),
    "incomplete": (lambda f: edit(f, complete=False), ValueError, "not complete.*resume_from_checkpoint=True"),
    "no state": (
        lambda f: (f / "states" / "step-00000002.safetensors").unlink(),
        FileNotFoundError,
        "step-00000002.safetensors is missing",
    ),
    "short state": (
        lambda f: cut(f / "states" / "step-00000002.safetensors", 0.9),
        ValueError,
        "step-00000002.safetensors is damaged",
    ),
    "empty state": (
        lambda f: cut(f / "states" / "step-00000004.safetensors", 0),
        ValueError,
        "step-00000004.safetensors is damaged",
    ),
    "other shape": (
        lambda f: edit(f, parameters={"a.weight": [2, 4], "bias": []}),
        ValueError,
        r"step-00000000.safetensors has parameters of 'a.weight' with shape \(2, 3\), expected \(2, 4\)",
    ),
    "other moment shape": (misshape, ValueError, r"exp_avg of 'bias' with shape \(5,\), expected \(\)"),
    "other moments": (
        lambda f: edit(f, optimizer=OptimizerRule("sgd", RULE.groups).to_dict()),
        ValueError,
        r"holds \['exp_avg', 'exp_avg_sq'\], which this optimizer does not keep",
    ),
    "other parameters": (
        lambda f: edit(f, parameters={"a.weight": [2, 3], "b": []}),
        ValueError,
        r"lacks parameters \['b'\] and has \['bias'\]",
    ),
    "no steps": (lambda f: part_path(f, 0).unlink(), ValueError, "records no steps 0 to 3"),
    "short steps": (lambda f: cut(part_path(f, 0), 0.5), ValueError, "part-00000000.safetensors is damaged"),
    "steps of another place": (
        lambda f: part_path(f, 0).rename(part_path(f, 1)),
        ValueError,
        "records no steps 0 to 3",
    ),
    "misnamed steps": (
        lambda f: write_part(f, 4, table(2)) or part_path(f, 4).replace(part_path(f, 0)),
        ValueError,
        "begins at step 4, not at 0",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders_are_refused_by_name(folder, damage):
    break_it, error, message = DAMAGE[damage]
    break_it(folder)
    with pytest.raises(error, match=message):
        Trajectory.load(folder)


def test_missing_folder_tells_how_to_record_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="Record a training run with `TrajectoryCallback"):
        Trajectory.load(tmp_path / "nowhere")


def scaled(path, name="parameters.a.weight"):
    tensors = load_file(path)
    tensors[name] = 2 * tensors[name]
    with safe_open(path, framework="pt") as file:
        save_file(tensors, path, metadata=file.metadata())


@pytest.mark.parametrize("step", [0, 2, NUM_STEPS])
@pytest.mark.parametrize("precision", [None, "bfloat16"])
def test_a_state_that_was_changed_is_noticed_when_it_is_read(tmp_path, step, precision):
    make().save(tmp_path / "t", precision=precision)
    trajectory = Trajectory.load(tmp_path / "t")
    trajectory.state(step)
    scaled(tmp_path / "t" / "states" / f"step-{step:08d}.safetensors")
    with pytest.raises(ValueError, match=f"step-{step:08d}.* is not the state that was recorded"):
        trajectory.state(step)
    with pytest.raises(ValueError, match="is not the state that was recorded"):
        Trajectory.load(tmp_path / "t").save(tmp_path / "copy")


def test_rows_beyond_the_fingerprint_are_compared():
    rows = [{"x": [float(row)], "labels": row % 2} for row in range(200)]
    fingerprint = dataset_fingerprint(rows, ["x", "labels"])
    noted = {"num_digested_rows": 200, "rows_sha256": rows_sha256(rows, ["x", "labels"], 200)}
    trajectory = make(
        num_rows=200, dataset_fingerprint=fingerprint, metadata={"fingerprint_columns": ["x", "labels"]} | noted
    )
    trajectory.check_dataset(rows)
    other = [row | {"labels": 1 - row["labels"]} if index == 100 else row for index, row in enumerate(rows)]
    assert dataset_fingerprint(other, ["x", "labels"]) == fingerprint
    with pytest.raises(ValueError, match="Some of the 200 rows of `rows` are not what they were"):
        trajectory.check_dataset(other, what="rows")
