"""The loss that is trained is the one that is attributed, or training does not begin."""

import random

import numpy as np
import peft
import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
    set_seed,
)

from hf_rgm.attribution.attributor import Attributor
from hf_rgm.clusters.cluster_map import ClusterMap
from hf_rgm.distillation.config import DistillationConfig
from hf_rgm.distillation.distiller import ReverseGradientMatchingDistiller
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.row_reader import RowReader
from hf_rgm.recording.callback import TrajectoryCallback
from hf_rgm.synset.compatibility import row_loss_of
from hf_rgm.trajectory.trajectory import Trajectory
from tests.recording.helpers import MeanModel, UpdateModel, dataset, make_trainer
from tests.text import SMALL, language_model, text_config

QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LENGTH_TOLERANCE = 2e-3
WEIGHTS = torch.tensor([1.0, 10.0, 0.2])


def rows(num_rows: int = 24) -> Dataset:
    return Dataset.from_list(
        [{"input_ids": [3 + i % 3, 6 + i % 7, 6 + i % 11], "labels": i % 3} for i in range(num_rows)]
    )


def texts(num_rows: int = 24, lengths: tuple[int, ...] = (4,)) -> Dataset:
    made = []
    for i in range(num_rows):
        ids, length = [3 + i % 3, 6 + i % 7, 6 + i % 11, 4 + i % 2], lengths[i % len(lengths)]
        labels = [x if position < length else -100 for position, x in enumerate(ids)]
        made.append({"input_ids": ids, "labels": labels})
    return Dataset.from_list(made)


def bert(kind=BertForSequenceClassification, **changes) -> nn.Module:
    set_seed(0)
    return kind(text_config("bert", **{**QUIET, "num_labels": 3, **changes}))


def gpt2(kind=GPT2LMHeadModel) -> nn.Module:
    set_seed(0)
    return kind(text_config("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


class Own(BertForSequenceClassification):
    """A classifier whose forward computes a loss of its own."""

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds)
        output.loss = None if labels is None else self.own_loss(output.logits, labels)
        return output

    def own_loss(self, logits, labels):
        return F.cross_entropy(logits, labels, weight=WEIGHTS)


class Focal(Own):
    def own_loss(self, logits, labels):
        losses = F.cross_entropy(logits, labels, reduction="none")
        return ((1 - (-losses).exp()) ** 2 * losses).mean()


class TrainingPenalty(Own):
    def own_loss(self, logits, labels):
        return F.cross_entropy(logits, labels) + self.training * logits.square().mean()


class Centred(Own):
    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None):
        output = super().forward(input_ids, attention_mask, inputs_embeds)
        output.logits = output.logits - output.logits.mean(0)
        output.loss = None if labels is None else F.cross_entropy(output.logits, labels)
        return output


class Summed(Own):
    def own_loss(self, logits, labels):
        return F.cross_entropy(logits, labels, reduction="sum")


class OwnLanguageModel(nn.Module):
    """Shifts its labels, whatever it is called."""

    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.inner = gpt2()
        self.config = self.inner.config

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def forward(self, input_ids=None, inputs_embeds=None, labels=None):
        logits = self.inner(input_ids=input_ids, inputs_embeds=inputs_embeds).logits
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), "logits": logits}


class FixedType(MeanModel):
    """Takes bfloat16 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.bfloat16()

    def logits(self, features, row):
        return super().logits(features.bfloat16(), row)


class MyGPT2(GPT2LMHeadModel):
    pass


class Tripled(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return 3 * super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)


class Penalised(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        return loss + 0.1 * sum(parameter.square().sum() for parameter in model.parameters())


class PenalisedStep(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        loss = loss + 0.1 * sum(parameter.square().sum() for parameter in model.parameters())
        self.accelerator.backward(loss)
        return loss.detach()


class Annealed(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses = F.cross_entropy(model(**inputs).logits, inputs["labels"], reduction="none")
        return losses.mean() if self.state.global_step < 3 else losses.square().mean()


def mean_of_batch(output, labels, num_items_in_batch=None):
    return F.cross_entropy(output.logits, labels)


def mean_of_update(output, labels, num_items_in_batch=None):
    return F.cross_entropy(output.logits, labels, reduction="sum") / num_items_in_batch


def mean_of_positions(length):
    """Divides by the positions of a batch, whether they have labels or not."""

    def loss(output, labels, num_items_in_batch=None):
        shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
        return F.cross_entropy(output.logits.flatten(0, 1), shifted.flatten(), reduction="sum") / length / len(labels)

    return loss


def squared(output, labels, num_items_in_batch=None):
    return F.cross_entropy(output.logits, labels, reduction="none").square().mean()


def weighted(logits, labels):
    return F.cross_entropy(logits, labels, weight=WEIGHTS, reduction="none")


def record(folder, model, data, *, kind=Trainer, row_loss=None, trainer=None, **arguments):
    """A recorded run of an epoch, by plain SGD."""
    built = make_trainer(
        folder,
        model,
        train_dataset=data,
        **{"num_train_epochs": 1, "optim": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0} | arguments,
    )
    callback = TrajectoryCallback(folder / "trajectory", num_states=3, row_loss=row_loss)
    made = kind(model, built.args, train_dataset=data, callbacks=[callback], **(trainer or {}))
    made.train()
    return made, Trajectory.load(folder / "trajectory")


def our_norm(trainer, trajectory, data, row_loss=None, step=0) -> float:
    """Norm of an update's gradient under the recorded loss, before clipping."""
    functional = FunctionalModel(trainer.model, shifts_labels=trajectory.shifts_labels)
    reader = RowReader(data, functional, data_collator=trainer.data_collator)
    own = row_loss_of([trajectory], reader, row_loss)
    parameters = {name: value.requires_grad_() for name, value in trajectory.state(step).parameters.items()}
    inputs, labels = reader.batch(trajectory.steps.rows[step])
    loss = own(functional.logits(parameters, inputs), labels).mean()
    gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
    return float(functional.space.flatten(dict(zip(parameters, gradients, strict=True))).norm())


ACCUMULATED = {"gradient_accumulation_steps": 3}
SCALES = {
    "plain": (bert, rows, {}, 1.0),
    "head that ignores the number of items": (bert, rows, ACCUMULATED, 3.0),
    "mean of batches": (MeanModel, dataset, ACCUMULATED, 1.0),
    "mean of the update": (UpdateModel, dataset, ACCUMULATED, 1.0),
    "times a constant": (bert, rows, {"kind": Tripled}, 3.0),
    "function of the batch": (bert, rows, {**ACCUMULATED, "trainer": {"compute_loss_func": mean_of_batch}}, 3.0),
    "function of the update": (bert, rows, {**ACCUMULATED, "trainer": {"compute_loss_func": mean_of_update}}, 1.0),
    "smoothed": (bert, rows, {"label_smoothing_factor": 0.2}, 1.0),
    "unshifted count": (gpt2, texts, {}, 1.0),
    "subclass": (lambda: gpt2(MyGPT2), texts, {}, 1.0),
    "smoothed without shift": (lambda: gpt2(MyGPT2), texts, {"label_smoothing_factor": 0.2}, 1.0),
    "language model of one's own": (OwnLanguageModel, texts, {}, 1.0),
    "dropout": (lambda: MeanModel(dropout=0.5), dataset, {}, 1.0),
}


@pytest.mark.parametrize("case", SCALES)
def test_the_scale_of_the_loss_is_recorded_and_gives_the_recorded_gradient(tmp_path, case):
    build, data, options, expected = SCALES[case]
    trainer, trajectory = record(tmp_path, build(), data(), **options)
    assert trajectory.trained_loss.scale == pytest.approx(expected, rel=LENGTH_TOLERANCE)
    if case != "dropout":
        norm = our_norm(trainer, trajectory, data())
        assert norm == pytest.approx(trajectory.steps.gradient_norm[0], rel=LENGTH_TOLERANCE)


def test_counts_of_labels_that_no_token_predicts_are_seen(tmp_path):
    data = texts(24, lengths=(2, 3, 4))
    trainer, trajectory = record(tmp_path, gpt2(), data, per_device_train_batch_size=24)
    assert trajectory.trained_loss.counts_first
    norm = our_norm(trainer, trajectory, data)
    assert norm == pytest.approx(trajectory.steps.gradient_norm[0], rel=LENGTH_TOLERANCE)


def test_a_count_that_differs_among_rows_is_right_on_average(tmp_path):
    data = texts(24, lengths=(2, 3, 4))
    per_position = mean_of_positions(4)
    options = {"trainer": {"compute_loss_func": per_position}, "per_device_train_batch_size": 24}
    trainer, trajectory = record(tmp_path, gpt2(), data, **options)
    assert trajectory.trained_loss.scale == pytest.approx((1 + 2 + 3) / (3 * 4), rel=LENGTH_TOLERANCE)
    norm = our_norm(trainer, trajectory, data)
    assert norm == pytest.approx(trajectory.steps.gradient_norm[0], rel=LENGTH_TOLERANCE)


def test_short_updates_count_by_their_micro_batches(tmp_path):
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}  # 10 batches: 4, 4 and 2
    trainer, trajectory = record(tmp_path, bert(), rows(20), **options)
    assert trajectory.gradient_scales.tolist() == [1, 1, 0.5]
    assert trajectory.without_rows().gradient_scales.tolist() == [1, 1, 0.5]
    norm = our_norm(trainer, trajectory, rows(20), step=2)
    assert norm * 0.5 == pytest.approx(trajectory.steps.gradient_norm[2], rel=LENGTH_TOLERANCE)


def test_labels_that_are_ignored_do_not_count(tmp_path):
    data = rows().map(lambda row, index: {"labels": -100 if index % 4 == 1 else row["labels"]}, with_indices=True)
    trainer, trajectory = record(tmp_path, bert(), data, per_device_train_batch_size=24)
    assert our_norm(trainer, trajectory, data) == pytest.approx(
        trajectory.steps.gradient_norm[0], rel=LENGTH_TOLERANCE
    )


def mixtral():
    sizes = {key: SMALL[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    set_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            **sizes,
            intermediate_size=8,
            num_key_value_heads=1,
            num_local_experts=3,
            router_aux_loss_coef=0.5,
            output_router_logits=True,
        )
    )


def adalora():
    config = peft.AdaLoraConfig(task_type="CAUSAL_LM", total_step=9, init_r=4, target_r=2)
    return peft.get_peft_model(language_model("llama"), config)


def prompt_tuning():
    return peft.get_peft_model(
        language_model("llama"), peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    )


def bloom():
    return BloomForCausalLM(BloomConfig(vocab_size=23, hidden_size=8, n_layer=1, n_head=2))


def other_labels(change):
    return lambda: rows().remove_columns("labels").map(change, with_indices=True)


REFUSED = {
    "class weights": (lambda: bert(Own), rows, {}, "loss that Own computes is not the cross entropy"),
    "focal loss": (lambda: bert(Focal), rows, {}, "loss that Focal computes is not the cross entropy"),
    "penalty in training": (lambda: bert(TrainingPenalty), rows, {}, "in training mode without dropout"),
    "rows together": (lambda: bert(Centred), rows, {}, "rows of a batch change each other's losses"),
    "sum": (lambda: bert(Summed), rows, {}, "is not a mean over rows or labels"),
    "compute_loss": (bert, rows, {"kind": Penalised}, "Penalised.compute_loss is not the cross entropy"),
    "training_step": (bert, rows, {"kind": PenalisedStep}, "PenalisedStep.training_step is not the cross entropy"),
    "compute_loss_func": (bert, rows, {"trainer": {"compute_loss_func": squared}}, "`compute_loss_func` is not"),
    "router": (mixtral, texts, {}, "output_router_logits=True"),
    "AdaLoRA": (adalora, texts, {}, "loss that PeftModelForCausalLM computes is not"),
    "inputs of one dtype": (
        FixedType,
        dataset,
        {},
        "in float32, as attribution does: mat1",
    ),
    "no label": (bert, lambda: rows().map(lambda row: {"labels": -100}), {}, "has a label other than -100"),
    "row_loss": (lambda: bert(Own), rows, {"row_loss": lambda z, y: z.square().sum(-1)}, "computes is not `row_loss`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_attributed_is_refused_before_training(tmp_path, case):
    build, data, options, message = REFUSED[case]
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises((NotImplementedError, ValueError), match=message):
        record(tmp_path, model, data(), **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not (tmp_path / "trajectory" / "trajectory.json").exists()


def test_groups_with_other_constants_are_refused_before_training(tmp_path):
    model = bert()
    groups = [{"params": model.bert.parameters(), "betas": (0.8, 0.99)}, {"params": model.classifier.parameters()}]
    with pytest.raises(NotImplementedError, match="Parameter groups with different"):
        record(tmp_path, model, rows(), trainer={"optimizers": (torch.optim.AdamW(groups, lr=1e-3), None)})


def test_a_loss_of_rows_is_checked_by_every_stage(tmp_path):
    trainer, trajectory = record(tmp_path, bert(Own), rows(), row_loss=weighted, per_device_train_batch_size=24)
    assert trajectory.trained_loss.scale == pytest.approx(1 / float(WEIGHTS.mean()), rel=LENGTH_TOLERANCE)
    norm = our_norm(trainer, trajectory, rows(), weighted)
    assert norm == pytest.approx(trajectory.steps.gradient_norm[0], rel=LENGTH_TOLERANCE)
    clusters = ClusterMap.from_ids([i % 4 for i in range(24)])

    def distilling(function):
        return ReverseGradientMatchingDistiller(trainer.model, trajectory, rows(), clusters, row_loss=function)

    def attributing(function):
        built = Attributor(trainer.model, trajectory=trajectory, rows=rows(), clusters=clusters, row_loss=function)
        return built.subject

    for stage in (distilling, attributing):
        assert stage(weighted).row_loss.scale == trajectory.trained_loss.scale
        with pytest.raises(ValueError, match="recorded with a `row_loss` of its own"):
            stage(None)
        with pytest.raises(ValueError, match="at the end of training they had"):
            stage(lambda z, y: F.cross_entropy(z, y, reduction="none"))


def test_another_collator_is_refused_when_distilling(tmp_path):
    trainer, trajectory = record(tmp_path, bert(), rows())

    def other(items):
        return {
            "input_ids": torch.tensor([item["input_ids"][::-1] for item in items]),
            "labels": torch.tensor([(item["labels"] + 1) % 3 for item in items]),
        }

    reader = RowReader(rows(), FunctionalModel(trainer.model), data_collator=other)
    row_loss_of([trajectory], RowReader(rows(), FunctionalModel(trainer.model)), None)
    with pytest.raises(ValueError, match="Pass the `data_collator` that the Trainer used"):
        row_loss_of([trajectory], reader, None)


def test_runs_of_other_scales_are_not_distilled_together(tmp_path):
    trainer, first = record(tmp_path / "one", bert(), rows())
    _, second = record(tmp_path / "two", bert(), rows(), **ACCUMULATED)
    with pytest.raises(ValueError, match="loss of run 1 is 3 times that of run 0"):
        row_loss_of([first, second], RowReader(rows(), FunctionalModel(trainer.model)), None)


def test_accumulation_gives_the_scores_of_large_batches(tmp_path):
    clusters = ClusterMap.from_ids([i % 4 for i in range(24)])
    scores = []
    for size, steps, rate in ((8, 1, 0.04), (2, 4, 0.01)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "learning_rate": rate}
        trainer, trajectory = record(tmp_path / str(size), bert(), rows(), **options)
        attributor = Attributor(
            trainer.model, trajectory=trajectory, rows=rows(), clusters=clusters, disable_tqdm=True
        )
        scores.append(attributor.attribute(rows(6), engine="adjoint").scores)
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-3, atol=1e-3 * np.abs(scores[0]).max())


def test_a_loss_that_changes_in_training_is_said(tmp_path, caplog):
    record(tmp_path, bert(), rows(), kind=Annealed)
    assert "Annealed.compute_loss is no longer what it was before the first step" in caplog.text


def test_nan_is_said_while_training_goes_on(tmp_path, caplog):
    callback = TrajectoryCallback(tmp_path / "trajectory", num_states=3)
    make_trainer(tmp_path, bert(), callback, train_dataset=rows(), optim="sgd", learning_rate=1e30).train()
    assert caplog.text.count("is NaN or infinite, and so is the model from there on") == 1


class Noisy(nn.Module):
    """Draws from every generator, and has buffers that training changes."""

    main_input_name = "features"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 3))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, features, labels=None):
        self.calls = self.calls + 1
        noise = 1e-3 * (random.random() + np.random.rand() + torch.rand(())) if self.training else 0.0
        logits = self.layers(features + noise)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_the_rehearsal_disturbs_nothing(tmp_path):
    finals = []
    for callbacks in ([], [TrajectoryCallback(tmp_path / "trajectory")]):
        set_seed(3)
        model = Noisy()
        trainer = make_trainer(tmp_path, model, *callbacks, train_dataset=dataset(), num_train_epochs=2)
        trainer.train()
        finals.append((model.state_dict(), torch.rand(3), np.random.rand(), random.random()))
    (one, *drawn), (two, *drawn_too) = finals
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(drawn[0], drawn_too[0]) and drawn[1:] == drawn_too[1:]
    assert Trajectory.load(tmp_path / "trajectory").trained_loss.scale == 1.0


def test_resuming_with_another_loss_is_refused(tmp_path):
    options = {"optim": "sgd", "max_grad_norm": 0.0, "save_strategy": "steps", "save_steps": 2}

    def trainer(**callback):
        recording = TrajectoryCallback(tmp_path / "trajectory", num_states=3, **callback)
        return make_trainer(tmp_path, bert(), recording, train_dataset=rows(), **options)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    first = trainer()
    first.add_callback(Stop())
    first.train()
    last = trainer(row_loss=lambda logits, labels: F.cross_entropy(logits, labels, reduction="none"))
    checkpoint = next(tmp_path.rglob("checkpoint-2"))
    with pytest.raises(ValueError, match="resumes with another loss: `custom` was False and is True"):
        last.train(resume_from_checkpoint=str(checkpoint))


def test_a_transform_is_remembered_by_later_stages(tmp_path):
    raw = Dataset.from_dict(
        {"values": np.random.default_rng(0).normal(size=(24, 4)).tolist(), "kind": [i % 3 for i in range(24)]}
    )
    data = raw.with_transform(lambda batch: {**batch, "features": [torch.tensor(x) for x in batch["values"]]})

    def collate(items):
        features, labels = torch.stack([item["features"] for item in items]), [item["kind"] for item in items]
        return {"features": features.float(), "labels": torch.tensor(labels)}

    trainer, trajectory = record(
        tmp_path, MeanModel(), data, remove_unused_columns=False, trainer={"data_collator": collate}
    )
    clusters = ClusterMap.from_ids([i % 2 for i in range(24)])
    quick = DistillationConfig.from_preset("quick", num_iterations=5)
    synset = ReverseGradientMatchingDistiller(
        trainer.model, trajectory, data, clusters, config=quick, data_collator=collate, disable_tqdm=True
    ).distill()
    scores = Attributor(trainer.model, synset, disable_tqdm=True).attribute(data, data_collator=collate).scores
    assert scores.shape == (24, 2)


def test_noise_that_attribution_leaves_out_is_warned_of(tmp_path, caplog):
    record(tmp_path / "quiet", gpt2(), texts())
    assert "NEFTune" not in caplog.text
    record(tmp_path / "noisy", gpt2(), texts(), neftune_noise_alpha=5.0)
    assert "NEFTune (neftune_noise_alpha=5.0) adds noise" in caplog.text
