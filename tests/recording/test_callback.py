import json
import logging
from importlib.metadata import version

import pytest
import torch
from safetensors.torch import load_file

from hf_rgm.recording.callback import TrajectoryCallback
from hf_rgm.trajectory.fingerprint import dataset_fingerprint
from hf_rgm.trajectory.trajectory import Trajectory
from tests.recording.helpers import (
    MeanModel,
    OutOfMemoryModel,
    StopAt,
    UpdateModel,
    assert_identical,
    dataset,
    make_trainer,
    train,
    trainable,
)


def seen_rows(model, accumulation):
    """Rows that the model's forward was given, by update; every epoch has 6 batches."""
    updates = []
    for epoch in range(len(model.seen) // 6):
        batches = model.seen[6 * epoch : 6 * epoch + 6]
        updates += [batches[first : first + accumulation] for first in range(0, 6, accumulation)]
    return updates


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"data_seed": 5},
        {"train_sampling_strategy": "sequential"},
        {"dataloader_num_workers": 1},
    ],
    ids=["seeded", "data_seed", "sequential", "workers"],
)
@pytest.mark.parametrize("accumulation", [1, 4])
def test_recorded_rows_are_those_the_model_saw(tmp_path, accumulation, arguments):
    model = MeanModel()
    _, trajectory = train(tmp_path, model, gradient_accumulation_steps=accumulation, **arguments)
    updates = seen_rows(model, accumulation)
    assert len(updates) == trajectory.num_steps
    assert [rows.tolist() for rows in trajectory.steps.rows] == [sum(update, []) for update in updates]
    assert trajectory.steps.micro_batch_sizes == [[len(batch) for batch in update] for update in updates]
    epochs = [model.seen[:6], model.seen[6:12]]
    assert (epochs[0] == epochs[1]) == ("train_sampling_strategy" in arguments)


def test_epoch_of_one_batch(tmp_path):
    model = MeanModel()
    _, trajectory = train(tmp_path, model, per_device_train_batch_size=64)
    assert [rows.tolist() for rows in trajectory.steps.rows] == model.seen
    assert trajectory.num_steps == 3


def test_max_steps_ends_in_mid_epoch(tmp_path):
    model = MeanModel()
    trainer, trajectory = train(tmp_path, model, max_steps=8)
    assert [rows.tolist() for rows in trajectory.steps.rows] == model.seen[:8]
    assert_identical(trajectory.final.parameters, trainable(trainer.model))


@pytest.mark.parametrize("model_class", [MeanModel, UpdateModel])
@pytest.mark.parametrize("augmented", [False, True])
def test_recording_does_not_change_training(tmp_path, model_class, augmented):
    class Augmented(list):
        def __getitem__(self, row):
            item = super().__getitem__(row)
            return item | {"features": item["features"] + 0.1 * torch.randn(4)}

    rows = Augmented(dataset()) if augmented else dataset()
    results = []
    for callbacks in ([], [TrajectoryCallback(tmp_path / "trajectory", num_states=9)]):
        trainer = make_trainer(
            tmp_path,
            model_class(dropout=0.3),
            *callbacks,
            train_dataset=rows,
            gradient_accumulation_steps=2,
            max_grad_norm=0.3,
            logging_strategy="steps",
            logging_steps=1,
        )
        trainer.train()
        logs = [{k: log[k] for k in ("loss", "grad_norm") if k in log} for log in trainer.state.log_history]
        results.append((trainable(trainer.model), trainer.model.seen, logs))
    (plain, plain_seen, plain_logs), (recorded, recorded_seen, recorded_logs) = results
    assert_identical(recorded, plain)
    assert recorded_seen == plain_seen
    assert recorded_logs == plain_logs


def test_states_are_those_of_training(tmp_path):
    snapshots = {}

    class Snapshot(StopAt):
        def on_step_begin(self, args, state, control, model, optimizer, **kwargs):
            moments = {
                kind: {n: optimizer.state[p][kind].clone() for n, p in model.named_parameters()}
                for kind in (("exp_avg", "exp_avg_sq") if state.global_step else ())
            }
            snapshots[state.global_step] = trainable(model), moments

    _, trajectory = train(tmp_path, MeanModel(), Snapshot(-1), num_states=5)
    assert trajectory.state_steps == (0, 4, 9, 14, 18)
    for step in trajectory.state_steps[:-1]:
        state, (parameters, moments) = trajectory.state(step), snapshots[step]
        assert_identical(state.parameters, parameters)
        assert state.moments.keys() == moments.keys()
        for kind, members in moments.items():
            assert_identical(state.moments[kind], members)


def test_more_states_than_steps(tmp_path):
    _, trajectory = train(tmp_path, MeanModel(), num_states=50, max_steps=3)
    assert trajectory.state_steps == (0, 1, 2, 3)


def test_bfloat16_halves_the_states_but_not_the_last(tmp_path):
    callback = TrajectoryCallback(tmp_path / "trajectory", num_states=3, dtype=torch.bfloat16)
    trainer, trajectory = train(tmp_path, MeanModel(), callback=callback)
    stored = [load_file(tmp_path / "trajectory" / "states" / f"step-{step:08d}.safetensors") for step in (9, 18)]
    assert {tensor.dtype for tensor in stored[0].values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in stored[1].values()} == {torch.float32}
    assert {tensor.dtype for tensor in trajectory.state(9).moments["exp_avg"].values()} == {torch.float32}
    assert_identical(trajectory.final.parameters, trainable(trainer.model))


@pytest.mark.parametrize(("limit", "expected"), [(10, torch.bfloat16), (10_000, torch.float32)])
def test_states_of_large_models_take_16_bits_unless_asked_for(tmp_path, monkeypatch, limit, expected):
    monkeypatch.setattr("hf_rgm.recording.recording.LARGE", limit)
    for name, dtype, wanted in (("auto", None, expected), ("asked", torch.float32, torch.float32)):
        callback = TrajectoryCallback(tmp_path / name, num_states=3, dtype=dtype)
        make_trainer(tmp_path, MeanModel(), callback).train()
        first = tmp_path / name / "states" / "step-00000000.safetensors"
        assert {tensor.dtype for tensor in load_file(first).values()} == {wanted}


def test_bfloat16_model_is_stored_as_it_is(tmp_path):
    trainer, trajectory = train(tmp_path, MeanModel().bfloat16(), optim="sgd", train_dataset=bfloat16_rows())
    stored = load_file(tmp_path / "trajectory" / "states" / "step-00000006.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    expected = {name: tensor.float() for name, tensor in trainable(trainer.model).items()}
    assert_identical(trajectory.final.parameters, expected)


def bfloat16_rows():
    return [row | {"features": row["features"].bfloat16()} for row in dataset()]


def test_autocast_run_is_recorded(tmp_path):
    trainer, trajectory = train(tmp_path, MeanModel(), bf16=True, max_grad_norm=0.3)
    assert trajectory.metadata["bf16"] is True
    assert ((trajectory.steps.clip_factor > 0) & (trajectory.steps.clip_factor <= 1)).all()
    assert_identical(trajectory.final.parameters, trainable(trainer.model))


def test_description_of_the_run(tmp_path):
    _, trajectory = train(
        tmp_path, MeanModel(), seed=11, data_seed=12, max_grad_norm=0.5, gradient_accumulation_steps=2
    )
    metadata = trajectory.metadata
    assert trajectory.num_rows == 22
    assert trajectory.dataset_fingerprint == dataset_fingerprint(dataset(), metadata["fingerprint_columns"])
    assert metadata["fingerprint_columns"] == ["features", "label", "label_ids", "labels", "row"]
    assert metadata["seeds"] == {"seed": 11, "data_seed": 12, "sampler_seed": 12}
    assert metadata["model"] == {"class": "MeanModel", "name_or_path": None, "commit_hash": None}
    assert (metadata["max_grad_norm"], metadata["gradient_accumulation_steps"]) == (0.5, 2)
    assert (metadata["per_device_train_batch_size"], metadata["label_smoothing_factor"]) == (4, 0.0)
    assert metadata["versions"]["torch"] == version("torch")
    assert trajectory.optimizer.groups[0].names == ("layers.0.weight", "head.weight")
    assert [group.weight_decay for group in trajectory.optimizer.groups] == [0.1, 0.0]


def test_cost_is_told(tmp_path, caplog):
    callback = TrajectoryCallback(tmp_path / "trajectory", num_states=3)
    assert callback.summary() == "Nothing is recorded yet."
    with caplog.at_level(logging.INFO, logger="hf_rgm"):
        _, trajectory = train(tmp_path, MeanModel(), callback=callback)
    assert callback.summary() in caplog.text
    assert "Recording 3 states" in caplog.text
    assert f"Recorded 18 steps in {tmp_path / 'trajectory'}" in callback.summary()
    cost = trajectory.metadata["recording"]
    assert 0 < cost["recording_seconds"] < cost["training_seconds"]
    assert f"{cost['recording_seconds'] / cost['training_seconds']:.1%}" in callback.summary()


def count_hooks(model):
    return sum(len(p._post_accumulate_grad_hooks or {}) for p in model.parameters())


def test_hooks_are_removed_at_the_end_and_never_doubled(tmp_path):
    class Count(StopAt):
        counts: list[int] = []

        def on_step_end(self, args, state, control, model, **kwargs):
            self.counts.append(count_hooks(model))

    model = MeanModel()
    callback = TrajectoryCallback(tmp_path / "trajectory")
    trainer = make_trainer(tmp_path, model, callback, Count(-1), StopAt(2))
    trainer.train()
    assert count_hooks(model) == 0
    trainer.train()
    assert count_hooks(model) == 0
    assert set(Count.counts) == {len(list(model.parameters()))}


def test_hooks_of_a_failed_run_are_replaced(tmp_path):
    model = OutOfMemoryModel(fails_at=3, message="broken")
    callback = TrajectoryCallback(tmp_path / "trajectory")
    trainer = make_trainer(tmp_path, model, callback)
    with pytest.raises(RuntimeError, match="broken"):
        trainer.train()
    with pytest.raises(ValueError, match="not complete"):
        Trajectory.load(tmp_path / "trajectory")
    trainer.train()
    assert count_hooks(model) == 0
    assert Trajectory.load(tmp_path / "trajectory").num_steps == 18


def test_second_run_replaces_the_first_and_says_so(tmp_path, caplog):
    callback = TrajectoryCallback(tmp_path / "trajectory", num_states=7)
    trainer = make_trainer(tmp_path, MeanModel(), callback)
    trainer.train()
    trainer.args.num_train_epochs = 1
    with caplog.at_level(logging.WARNING, logger="hf_rgm"):
        trainer.train()
    assert "is replaced by that of another training run" in caplog.text
    trajectory = Trajectory.load(tmp_path / "trajectory")
    assert (trajectory.num_steps, trajectory.state_steps) == (6, (0, 1, 2, 3, 4, 5, 6))
    assert_identical(trajectory.final.parameters, trainable(trainer.model))
    assert len(list((tmp_path / "trajectory" / "states").iterdir())) == 7


def test_smaller_batch_size_after_running_out_of_memory(tmp_path):
    model = OutOfMemoryModel(fails_at=5)
    trainer, trajectory = train(tmp_path, model, per_device_train_batch_size=8, auto_find_batch_size=True)
    rows = [row.tolist() for row in trajectory.steps.rows]
    # Batches of 7 after batches of 8; four of the latter had passed before memory ran out.
    assert rows == model.seen[4:]
    assert [len(row) for row in rows] == [7, 7, 7, 1] * 3
    assert trajectory.metadata["per_device_train_batch_size"] == 7
    assert trajectory.metadata["updates_before"] == 4
    assert_identical(trajectory.final.parameters, trainable(trainer.model))


def test_complete_trajectory_of_another_run_is_kept(tmp_path):
    train(tmp_path, MeanModel())
    before = (tmp_path / "trajectory" / "trajectory.json").read_text()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        train(tmp_path, MeanModel(seed=1))
    assert (tmp_path / "trajectory" / "trajectory.json").read_text() == before
    callback = TrajectoryCallback(tmp_path / "trajectory", overwrite=True)
    trainer, trajectory = train(tmp_path, MeanModel(seed=1), callback=callback)
    assert_identical(trajectory.final.parameters, trainable(trainer.model))


def test_folder_with_other_things_is_left_alone(tmp_path):
    folder = tmp_path / "trajectory"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds no trajectory, so it is left alone"):
        train(tmp_path, MeanModel(), callback=TrajectoryCallback(folder, overwrite=True))
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        train(tmp_path, MeanModel(), callback=TrajectoryCallback(tmp_path / "file"))


def test_only_the_files_of_a_trajectory_are_replaced(tmp_path):
    train(tmp_path, MeanModel())
    notes = [tmp_path / "trajectory" / name for name in ("notes.txt", "states/notes.txt", "steps/part-a.safetensors")]
    for path in notes:
        path.write_text("mine")
    unfinished = tmp_path / "trajectory" / "steps" / ".part-00000003.safetensors.hf-rgm-saving"
    unfinished.mkdir()
    (unfinished / "part-00000003.safetensors").write_text("interrupted")
    callback = TrajectoryCallback(tmp_path / "trajectory", overwrite=True, num_states=2)
    _, trajectory = train(tmp_path, MeanModel(), callback=callback)
    assert [path.read_text() for path in notes] == ["mine"] * 3
    assert trajectory.state_steps == (0, 18)
    assert not list((tmp_path / "trajectory").glob("*/.*"))


def test_unreadable_trajectory_is_replaced_only_on_demand(tmp_path):
    train(tmp_path, MeanModel())
    path = tmp_path / "trajectory" / "trajectory.json"
    path.write_text(json.dumps({"format_version": 99}))
    with pytest.raises(FileExistsError, match=r"cannot be read.*version 99.*overwrite=True"):
        train(tmp_path, MeanModel())
    (tmp_path / "trajectory" / "steps" / "part-00000000.parquet").write_text("rows, as format version 1 kept them")
    train(tmp_path, MeanModel(), callback=TrajectoryCallback(tmp_path / "trajectory", overwrite=True))
    assert not list((tmp_path / "trajectory").glob("steps/*.parquet"))


def test_parameter_without_gradient_is_named(tmp_path, caplog):
    class Sometimes(MeanModel):
        def __init__(self):
            super().__init__()
            self.extra = torch.nn.Parameter(torch.zeros(3))
            self.never = torch.nn.Parameter(torch.ones(2))

        def forward(self, features, labels=None, row=None):
            output = super().forward(features, labels, row)
            if "loss" in output and 0 in row:
                output["loss"] = output["loss"] + self.extra.sum()
            return output

    with caplog.at_level(logging.WARNING, logger="hf_rgm"):
        _, trajectory = train(tmp_path, Sometimes())
    assert "Parameters ['extra'] (1 in all) had no gradient in some" in caplog.text
    assert "never" not in trajectory.final.moments["exp_avg"]
    assert torch.equal(trajectory.final.parameters["never"], torch.ones(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_states": 1}, "`num_states` must be at least 2 .*, got 1"),
        ({"dtype": torch.float16}, "torch.float32 or torch.bfloat16, got torch.float16"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TrajectoryCallback("trajectory", **arguments)


def test_callback_added_during_training_says_so(tmp_path):
    callback = TrajectoryCallback(tmp_path / "trajectory")
    trainer = make_trainer(tmp_path, MeanModel())

    class Add(StopAt):
        def on_epoch_begin(self, args, state, control, **kwargs):
            trainer.add_callback(callback)

    trainer.add_callback(Add(-1))
    with pytest.raises(RuntimeError, match="Add it before calling `trainer.train"):
        trainer.train()


def test_evaluating_outside_training_is_fine(tmp_path):
    trainer = make_trainer(tmp_path, MeanModel(), TrajectoryCallback(tmp_path / "trajectory"))
    assert "eval_loss" in trainer.evaluate()
    assert not (tmp_path / "trajectory").exists()
