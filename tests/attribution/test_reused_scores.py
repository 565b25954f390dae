"""Scores in an `output_dir` are taken again only for the same rows, collator, loss and objective."""

import pytest
from torch.nn import functional as F
from transformers import default_data_collator

from hf_rgm import Attributor, DistillationConfig, Objective, ReverseGradientMatchingDistiller
from hf_rgm.testing import tiny_recorded_run

RUN = tiny_recorded_run()


def plain(logits, labels):
    return F.cross_entropy(logits, labels, reduction="none")


def weighted_where_it_does_not_show(logits, labels):
    return F.cross_entropy(logits, labels, reduction="none") * (1 + (logits.detach() > 1e6).any(-1))


def brighter(items):
    batch = default_data_collator(items)
    return batch | {"pixel_values": batch["pixel_values"] + (batch["labels"] == 2).float()[:, None, None, None] * 1e-3}


def margin(forward, queries):
    return -plain(forward(queries.inputs), queries.labels)


def without_a_gradient(forward, queries):
    logits = forward(queries.inputs)
    return -plain(logits, queries.labels) + 0 * logits.sum()


def folders(parent, *, row_loss=plain, collator=default_data_collator, objective=margin):
    options = {"trajectory": RUN.trajectory, "rows": RUN.train_dataset, "clusters": RUN.clusters}
    asked = Attributor(RUN.model, **options, row_loss=row_loss, data_collator=collator, disable_tqdm=True)
    asked.attribute(RUN.queries, engine="adjoint", objective=Objective("mine", objective), output_dir=parent)
    return {path.name for path in parent.iterdir()}


@pytest.mark.parametrize(
    "change",
    [{"row_loss": weighted_where_it_does_not_show}, {"collator": brighter}, {"objective": without_a_gradient}],
    ids=["loss", "collator", "objective"],
)
def test_scores_of_another_question_are_not_taken(tmp_path, change):
    first = folders(tmp_path)
    assert folders(tmp_path) == first
    assert len(folders(tmp_path, **change)) == 2


@pytest.mark.parametrize(
    "change", [{"row_loss": weighted_where_it_does_not_show}, {"data_collator": brighter}], ids=["loss", "collator"]
)
def test_blocks_of_another_distillation_are_refused(tmp_path, change):
    config = DistillationConfig(num_iterations=5, tolerance=0.0, responses="none")
    parts = RUN.model, RUN.trajectory, RUN.train_dataset, RUN.clusters
    options = {"config": config, "output_dir": tmp_path, "disable_tqdm": True}
    ReverseGradientMatchingDistiller(*parts, row_loss=plain, **options).distill()
    ReverseGradientMatchingDistiller(*parts, row_loss=plain, **options)
    with pytest.raises(FileExistsError, match="belongs to another distillation"):
        ReverseGradientMatchingDistiller(*parts, **({"row_loss": plain} | change), **options)
