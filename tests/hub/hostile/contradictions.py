"""What artefacts must not say, though every file is whole."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tests.hub.hostile.damage import FINAL, HUNDRED_GB, RUN, STATE, STEPS, Case
from tests.hub.hostile.edits import (
    Route,
    a_linked_folder,
    a_pickle,
    all_of,
    bad_value,
    first_byte,
    header,
    remove,
    set_json,
    tensor,
    tensors,
)


def cluster_maps() -> Iterator[Case]:
    """What a map of clusters must not say."""
    file = "clusters.json"
    damaged = "cluster map in .* is damaged"
    for done, edit, message in (
        ("names more clusters than rows have", set_json(file, ("names",), [str(k) for k in range(13)]), damaged),
        ("names a cluster without rows", set_json(file, ("names",), ["a", "b", "c", "d", "e"]), damaged),
        ("names fewer clusters than rows have", set_json(file, ("names",), ["a"]), damaged),
        ("names two clusters alike", set_json(file, ("names", 1), "imdb"), damaged),
        ("announces -1 rows", set_json(file, ("num_rows",), -1), "expected"),
        ("announces 10**18 rows", set_json(file, ("num_rows",), 10**18), "expected"),
        ("has a parent that is not there", set_json(file, ("parents", 0), 99), damaged),
        ("has a parent beyond 64 bits", set_json(file, ("parents", 0), 2**63), damaged),
        ("has parents without names", set_json(file, ("parent_names",), None), damaged),
        ("has fewer parents than clusters", set_json(file, ("parents",), [0]), damaged),
    ):
        yield Case("ClusterMap", f"{file} {done}", edit, message, on_hub=done == "announces 10**18 rows")
    rows = "clusters.safetensors"
    yield Case("ClusterMap", f"{rows} has cluster 10**15", tensor(rows, "cluster_ids", bad_value(10**15)), damaged)
    yield Case("ClusterMap", f"{rows} has cluster -1", tensor(rows, "cluster_ids", bad_value(-1)), damaged)
    yield Case(
        "ClusterMap",
        f"{rows} and {file} announce 10**8 rows, of which there are 12",
        all_of(
            set_json(file, ("num_rows",), 10**8),
            header(rows, lambda told: told["cluster_ids"].update(shape=[10**8], data_offsets=[0, 8 * 10**8])),
        ),
        f"{rows} is damaged",
    )
    yield Case(
        "ClusterMap",
        "rows.parquet, which is only to look at, is a pickle",
        a_pickle("rows.parquet"),
        None,
    )


def results() -> Iterator[Case]:
    """What a result must not say."""
    file, matrices = "attribution.json", "attribution.safetensors"
    damaged = "is damaged: "
    for done, edit, message in (
        ("names no queries", set_json(file, ("query_ids",), []), "expected"),
        ("names no clusters", set_json(file, ("cluster_names",), []), "expected"),
        ("names two queries alike", set_json(file, ("query_ids", 1), "a"), damaged),
        ("names queries by numbers and text alike", set_json(file, ("query_ids",), [1, "1"]), damaged),
        ("has a query id beyond 64 bits", set_json(file, ("query_ids",), [1, 2**63]), "no 64-bit integers"),
        ("announces -1 rows", set_json(file, ("num_rows",), -1), "expected"),
        ("announces 10**18 rows", set_json(file, ("num_rows",), 10**18), "expected"),
        ("has a fidelity that is no report", set_json(file, ("metadata", "fidelity"), {"x": 1}), "fidelity report"),
    ):
        yield Case("AttributionResult", f"{file} {done}", edit, message, on_hub=done == "names no queries")
    for done, edit, message in (
        (
            "has a negative cluster size",
            tensor(matrices, "cluster_sizes", bad_value(-4)),
            "expected",
        ),
        (
            "has cluster sizes beyond 64 bits",
            tensor(matrices, "cluster_sizes", lambda x: x * 0 + 2**62),
            "expected",
        ),
        ("has cluster 2**40", tensor(matrices, "cluster_ids", bad_value(2**40)), damaged),
        ("has a row in cluster -1", tensor(matrices, "cluster_ids", bad_value(-1)), damaged),
        (
            "has sizes other than its clusters'",
            tensor(matrices, "cluster_sizes", lambda x: x[[1, 0, 2]] + torch.tensor([1, 0, -1])),
            damaged,
        ),
    ):
        yield Case("AttributionResult", f"{matrices} {done}", edit, message)


def trajectories() -> Iterator[Case]:
    """What a recorded run must not say."""
    file, steps = "trajectory.json", STEPS
    group: Route = ("optimizer", "groups", 0)
    for done, edit, message in (
        ("has -1 steps", set_json(file, ("num_steps",), -1), "has -1 steps"),
        ("has no steps", set_json(file, ("num_steps",), 0), "has 0 steps"),
        ("has 2**63 steps", set_json(file, ("num_steps",), 2**63), "steps"),
        ("has 10**15 steps", set_json(file, ("num_steps",), 10**15), "names states at steps"),
        ("has no rows", set_json(file, ("num_rows",), 0), "on 0 rows"),
        ("is not complete", set_json(file, ("complete",), False), "is not complete"),
        ("names no states", set_json(file, ("state_steps",), []), "names states at steps"),
        ("names a state before the first", set_json(file, ("state_steps", 0), -1), "names states at steps"),
        ("names 10**6 states", set_json(file, ("state_steps",), list(range(10**6))), "names states at steps"),
        ("has an optimizer of another name", set_json(file, ("optimizer", "name"), "lion"), "optimizer .* is damaged"),
        ("has an optimizer whose name is a list", set_json(file, ("optimizer", "name"), ["adamw"]), "is damaged"),
        ("has no parameter groups", set_json(file, ("optimizer", "groups"), []), "is damaged"),
        (
            "has 10**5 parameters in two groups",
            set_json(file, (*group, "names"), ["a"] * 10**5),
            "more than one group",
        ),
        ("has betas of 1", set_json(file, (*group, "betas"), [1, 1]), r"in \[0, 1\)"),
        ("has three betas", set_json(file, (*group, "betas"), [0.1, 0.1, 0.1]), "`betas` must be two"),
        ("has a weight decay of 1e300", set_json(file, (*group, "weight_decay"), 1e300), "at most 1e"),
        ("has a negative eps", set_json(file, (*group, "eps"), -1.0), "must not be negative"),
        ("has a dampening of -1e300", set_json(file, (*group, "dampening"), -1e300), "at most 1e"),
        ("lacks a parameter of the states", set_json(file, ("parameters",), {}), "lacks parameters|too many"),
        ("has parameters of negative sizes", set_json(file, ("parameters", "hidden.bias"), [-8]), "expected"),
        ("has parameters of 100 GB", set_json(file, ("parameters", "hidden.weight"), HUNDRED_GB), "expected"),
        ("was used -1 times before", set_json(file, ("updates_before",), -1), "updates_before must be"),
        ("was used 2**60 times before", set_json(file, ("updates_before",), 2**60), "updates_before must be"),
    ):
        yield Case("Trajectory", f"trajectory.json {done}", edit, message, on_hub=done == "has 10**15 steps")

    rates, rows, offsets, sizes = "learning_rates", "rows", "rows.offsets", "micro_batch_sizes"
    for done, edit, message in (
        ("has a learning rate of 1e30", tensor(steps, rates, bad_value(1e30)), "must be between 0 and"),
        ("has a negative learning rate", tensor(steps, rates, bad_value(-1.0)), "must be between 0 and"),
        ("has a learning rate of NaN", tensor(steps, rates, bad_value(float("nan"))), "must be between 0 and"),
        (
            "has three learning rates a step, for two groups",
            tensor(steps, rates, lambda x: x[:, [0, 1, 1]]),
            "3 learning rates a step",
        ),
        ("has no learning rates", tensor(steps, rates, lambda x: x[:, :0]), "0 learning rates a step"),
        (
            "has a clipping factor of infinity",
            tensor(steps, "clip_factor", bad_value(float("inf"))),
            "must be between 0 and",
        ),
        ("has a clipping factor of NaN", tensor(steps, "clip_factor", bad_value(float("nan"))), "must be between"),
        ("has skipped a step by a byte of 255", first_byte(steps, "skipped", 255), None),
        ("has rows that the training set lacks", tensor(steps, rows, bad_value(48)), r"names rows \d+ to 48"),
        ("has row -1", tensor(steps, rows, bad_value(-1)), "names rows -1 to"),
        ("has rows without offsets", tensors(steps, lambda x: x.pop(offsets)), "has no tensor 'rows.offsets'"),
        ("has offsets of too few steps", tensor(steps, offsets, lambda x: x[1:]), "expected"),
        ("has offsets that do not begin at 0", tensor(steps, offsets, bad_value(1)), "do not divide"),
        ("has offsets beyond the rows", tensor(steps, offsets, lambda x: 2 * x), "do not divide"),
        ("has fewer rows than offsets", tensor(steps, rows, lambda x: x[1:]), "do not divide"),
        (
            "has offsets that go back, to 2**62",
            tensor(steps, offsets, lambda x: torch.cat([x[:1], x[1:2] * 0 + 2**62, x[2:]])),
            "do not divide",
        ),
        (
            "has offsets that go back, to -2**62",
            tensor(steps, offsets, lambda x: torch.cat([x[:1], x[1:2] * 0 - 2**62, x[2:]])),
            "do not divide",
        ),
        (
            "has batches of other sizes than their rows",
            tensor(steps, sizes, lambda x: x * 0 + 2**62),
            "but batches of",
        ),
        ("has batches of negative sizes", tensor(steps, sizes, lambda x: -x), "but batches of"),
        ("has fewer steps than announced", tensors(steps, lambda x: _shorten(x, 40)), "records no steps 40 to 47"),
        ("has no steps", tensors(steps, lambda x: _shorten(x, 0)), "has no steps"),
        (
            "says that it begins at another step",
            header(steps, lambda told: told["__metadata__"].update(first_step="\x1b[2J")),
            r"begins at step \\x1b\[2J, not at 0",
        ),
        (
            "does not say at which step it begins",
            header(steps, lambda told: told.pop("__metadata__")),
            "begins at step None",
        ),
    ):
        yield Case("Trajectory", f"{STEPS.rpartition('/')[2]} {done}", edit, message)
    second = "exp_avg_sq.hidden.weight"
    yield Case(
        "Trajectory", "a state lacks the moments of some parameters", tensors(STATE, lambda x: x.pop(second)), None
    )
    yield Case(
        "Trajectory",
        "a state has moments of an unknown kind",
        tensors(STATE, lambda x: x.update({"\x1b.hidden.weight": x.pop(second)})),
        "does not keep",
    )
    yield Case("Trajectory", "the last state is missing", remove(FINAL), "is missing", FileNotFoundError, on_hub=True)
    yield Case(
        "Trajectory",
        "a state is of a precision that there is not",
        header(STATE, lambda told: told["__metadata__"].update(precision="\x1b[2J")),
        r"states in '\\x1b\[2J'",
    )
    yield Case(
        "Trajectory",
        "the last state holds differences from itself",
        header(FINAL, lambda told: told["__metadata__"].update(precision="bfloat16")),
        "differences from nothing",
    )


def _shorten(content: dict[str, torch.Tensor], length: int) -> None:
    """Keeps the first steps of a table."""
    for name, column in content.items():
        if name in ("rows", "micro_batch_sizes"):
            content[name] = column[: int(content[f"{name}.offsets"][length])]
    for name, column in content.items():
        if name not in ("rows", "micro_batch_sizes"):
            content[name] = column[: length + name.endswith(".offsets")]


PRIVACY = {"distance": 1.0, "row_distance": 1.0, "share_nearer": 0.5}


def synsets() -> Iterator[Case]:
    """What a synset must not say, and what must be found when it is used."""
    file, matrices = "synset.json", "synset.safetensors"
    apart = "do not belong together"
    for done, edit, message in (
        ("names 0 runs", set_json(file, ("num_runs",), 0), "names 0 recorded runs"),
        ("names -1 runs", set_json(file, ("num_runs",), -1), "names -1 recorded runs"),
        ("names other parameters than its run ends at", set_json(file, ("parameters_sha256",), "0" * 64), apart),
        (
            "announces a tensor too many",
            set_json(file, ("tensors",), {"inputs": [6], "\x1b": [6]}),
            "announces the tensors",
        ),
        ("announces inputs of one dimension", set_json(file, ("tensors", "inputs"), [6]), "expected"),
        ("announces inputs of no samples", set_json(file, ("tensors", "inputs"), [6, 0, 2**62]), "expected"),
        ("announces inputs of negative sizes", set_json(file, ("tensors", "inputs"), [6, -5, -1, 4, 4]), "expected"),
        ("announces inputs of 7 clusters", set_json(file, ("tensors", "inputs"), [7, 5, 1, 4, 4]), "expected"),
        ("announces no residuals", set_json(file, ("tensors", "residuals"), []), "expected"),
        ("was matched at no state", set_json(file, ("matched_states",), []), apart),
        ("was matched at a state of run 7", set_json(file, ("matched_states", 0), [7, 10]), "step 10 of run 7"),
        ("was matched at a state of run -1", set_json(file, ("matched_states", 0), [-1, 10]), "step 10 of run -1"),
        ("was matched at step 11", set_json(file, ("matched_states", 0), [0, 11]), "step 11 of run 0"),
        (
            "was matched at a state of three numbers",
            set_json(file, ("matched_states", 0), [0, 10, 1]),
            "a run and a step",
        ),
        (
            "takes an argument that is none",
            set_json(file, ("input_name",), "x; import os"),
            "must be a forward argument",
        ),
        ("is of soft tokens without ids", set_json(file, ("input_name",), "soft_tokens"), "holds no input_ids"),
        ("has no labels a row", set_json(file, ("metadata", "labels_per_row"), 0), "no mean number"),
        ("has a label smoothing of 2", set_json(file, ("metadata", "label_smoothing_factor"), 2), r"not in \[0, 1\)"),
        ("has the tokens of one sample", set_json(file, ("metadata",), {"tokens": [[1]]}), "tokens of 1 samples"),
        ("has token -1", set_json(file, ("metadata",), {"tokens": [[-1]] * 30}), "not all ids of tokens"),
        ("has token 2**60", set_json(file, ("metadata",), {"tokens": [[2**60]] * 30}), "not all ids of tokens"),
        ("has a privacy without distance", set_json(file, ("metadata",), {"privacy": {"x": 1}}), "lacks distance"),
        (
            "has a privacy with half of its figures",
            set_json(file, ("metadata",), {"privacy": PRIVACY | {"share_nearer": None}}),
            "belong together",
        ),
        (
            "has a privacy of tokens without their number",
            set_json(file, ("metadata",), {"privacy": PRIVACY | {"kept_tokens": 1}}),
            "belong together",
        ),
        (
            "has a fidelity that is no report",
            set_json(file, ("fidelity",), {"format_version": 1}),
            "report is damaged",
        ),
    ):
        yield Case("Synset", f"{file} {done}", edit, message, on_hub=done == "was matched at a state of run 7")
    sharper = set_json(file, ("tensors", "targets"), [6, 5, 7])
    for done, edit, message in (
        ("has negative residuals", tensor(matrices, "residuals", bad_value(-1.0)), "residuals that are"),
        ("has residuals of NaN", tensor(matrices, "residuals", bad_value(float("nan"))), "residuals that are"),
        (
            "has inputs of another shape than the model takes",
            all_of(
                set_json(file, ("tensors", "inputs"), [6, 5, 3]),
                tensor(matrices, "inputs", lambda x: x[..., :3, 0, 0].expand(6, 5, 1)[..., [0, 0, 0]]),
            ),
            None,
        ),
        (
            "has targets of seven labels for a model of three",
            all_of(sharper, tensor(matrices, "targets", lambda x: torch.zeros(6, 5, 7))),
            None,
        ),
        (
            "has target ids that are no labels",
            all_of(
                set_json(file, ("tensors", "target_ids"), [6, 5, 3]),
                tensors(matrices, lambda x: x.update(target_ids=torch.full((6, 5, 3), 10**12))),
            ),
            None,
        ),
        (
            "has negative target ids",
            all_of(
                set_json(file, ("tensors", "target_ids"), [6, 5, 3]),
                tensors(matrices, lambda x: x.update(target_ids=torch.full((6, 5, 3), -1))),
            ),
            "target_ids",
        ),
        ("has weights of 1e38", tensor(matrices, "log_weights", lambda x: x * 0 + 1e38), "has log-weights beyond"),
        (
            "has log-weights of -1e30",
            tensor(matrices, "log_weights", lambda x: x * 0 - 1e30),
            "has log-weights beyond",
        ),
        ("has inputs of 1e38", tensor(matrices, "inputs", lambda x: x * 0 + 1e38), None),
    ):
        yield Case("Synset", f"{matrices} {done}", edit, message)
    steps, run = f"{RUN}/{STEPS}", f"{RUN}/trajectory.json"
    large = tensor(steps, "learning_rates", lambda x: x * 0 + 1e6)
    yield Case("Synset", "its run has learning rates of 1e6", large, None)
    betas = [set_json(run, ("optimizer", "groups", k, "betas"), [0.9999999, 0.9999999]) for k in (0, 1)]
    yield Case("Synset", "its run has betas of 0.9999999", all_of(*betas), None)
    yield Case("Synset", "its run has different betas by group", betas[0], None)
    plain = [set_json(run, ("optimizer", "name"), "sgd")]
    yield Case("Synset", "its run is said to be of another optimizer", all_of(*plain), "this optimizer does not keep")
    yield Case(
        "Synset",
        "a state of its run lacks all moments",
        tensors(f"{RUN}/{STATE}", lambda x: [x.pop(key) for key in list(x) if key.startswith("exp_avg")]),
        None,
    )
    negative = tensor(f"{RUN}/{STATE}", "exp_avg_sq.hidden.weight", lambda values: values * 0 - 1)
    yield Case("Synset", "a state of its run has negative second moments", negative, None)
    immense = tensor(f"{RUN}/{STATE}", "exp_avg_sq.hidden.weight", lambda values: values * 0 + 3e38)
    yield Case("Synset", "a state of its run has second moments of 3e38", immense, None)
    yield Case("Synset", "its run has other rows than its clusters", set_json(run, ("num_rows",), 47), apart)
    yield Case("Synset", "its run is missing", remove(run), "has no trajectory.json", FileNotFoundError, on_hub=True)
    yield Case(
        "Synset",
        "the folder of its runs is a link out of the folder",
        a_linked_folder("trajectories"),
        "a link that leads out",
    )
    yield Case(
        "Synset",
        "the table of samples and the card are missing",
        all_of(remove("data/train.parquet"), remove("README.md")),
        None,
        on_hub=True,
    )
