"""
Kinds of runs, and what recording does with each: the page `docs/runs.md`.

    python -m tests.recording.runs
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers as hf
from datasets import Dataset
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, set_seed

from tests.recording import test_trained_loss as losses
from tests.recording.helpers import MeanModel, UpdateModel, dataset
from tests.recording.test_trained_loss import bert, gpt2, rows, texts
from tests.recording.test_training_watch import At, average, clamp, freeze, reverse, scale_by_hook
from tests.text import VOCABULARY, classifier, language_model, word_tokenizer
from tests.text import texts as padded

PAGE = Path(__file__).resolve().parents[2] / "docs" / "runs.md"
INTRODUCTION = """# Kinds of runs

What recording does with each kind of run. **Exact** means: from one recorded state to the next, the recorded update is
the trained one (to 1e-5), and the gradient of the attributed loss on the rows of that step is the gradient that was
trained (cosine above 0.999, and the same length). All else is refused: before the first step where that can be known,
else at the step at which it happens. `tests/recording/test_runs.py` trains and checks every line of this page, which
`python -m tests.recording.runs` writes.

Three things are not exact, and none of these runs has them: dropout and NEFTune (attribution takes the gradient
without noise, and warns of NEFTune), masks and augmentation that are drawn at random (it takes one draw, and warns),
and batch normalisation (it takes the running statistics, and warns).

Recording costs some gradients of a few rows before the first step and after the last, and four norms of the model at
every step. Measured by hand on a CPU, that was 4.6% of the training thread's time for a BERT of 4 layers and 4 million
parameters (200 steps of 0.2 s), and a third more time for one of 17,000 parameters, whose steps take 4 ms.
"""
EXACT = "exact"

Build = Callable[[], Any]


@dataclass(frozen=True)
class Kind:
    """A kind of run: how it is made, and the error that refuses it, if any."""

    model: Build = bert
    data: Build = rows
    refused: str | None = None  # part of the message
    at_step: bool = False
    kind: type[Trainer] = Trainer
    row_loss: Any = None
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None
    callback: TrainerCallback | None = None
    trainer: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    resumed: bool = False

    @property
    def outcome(self) -> str:
        if self.refused is None:
            return EXACT
        when = "refused at the step" if self.at_step else "refused before training"
        return f'{when}: "{self.refused}"'


def tokens(labels: str) -> Build:
    return lambda: padded(labels=labels)


def pictures() -> Dataset:
    values = np.random.default_rng(0).normal(size=(24, 3, 8, 8)).astype(np.float32)
    return Dataset.from_dict({"pixel_values": values.tolist(), "labels": [i % 3 for i in range(24)]}).with_format(
        "torch"
    )


def transformed() -> Dataset:
    raw = Dataset.from_dict({"ids": [row["input_ids"] for row in rows()], "kind": [i % 3 for i in range(24)]})
    return raw.with_transform(lambda batch: {"input_ids": batch["ids"], "labels": batch["kind"]})


def questions() -> Dataset:
    return (
        rows()
        .remove_columns("labels")
        .map(lambda row, i: {"start_positions": i % 2, "end_positions": 1 + i % 2}, with_indices=True)
    )


def relabelled(make: Callable[[int], Any]) -> Build:
    return lambda: rows().remove_columns("labels").map(lambda row, i: {"labels": make(i)}, with_indices=True)


def pairs() -> Dataset:
    made = [{"input_ids": row["input_ids"], "labels": row["input_ids"][::-1]} for row in texts()]
    return Dataset.from_list([{**row, "decoder_input_ids": [0, *row["labels"][:-1]]} for row in made])


def seeded(make: Callable[[], nn.Module]) -> Build:
    def build() -> nn.Module:
        set_seed(0)
        return make()

    return build


def llama() -> nn.Module:
    return language_model("llama")


def adapted(make: Callable[[], peft.PeftConfig], base: Build = bert) -> Build:
    """A model with adapters, whose parameters are moved from where their gradients vanish."""

    def build() -> nn.Module:
        model = peft.get_peft_model(base(), make())
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "lora_B" in name:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        return model

    return build


TARGETS = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
T5 = {"vocab_size": VOCABULARY, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
VIT = {"image_size": 8, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


class Convolutional(nn.Module):
    """A network of one's own, which takes pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))

    def forward(self, pixel_values, labels=None):
        logits = self.layers(pixel_values)
        return {"logits": logits} | ({} if labels is None else {"loss": F.cross_entropy(logits, labels)})


class WeightedLoss(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        return losses.weighted(model(**inputs).logits, labels).mean()


class SignUpdate(torch.optim.Optimizer):
    """What Lion does without momentum."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["lr"] * parameter.grad.sign()


def huber(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.huber_loss(logits[:, 0], labels, reduction="none")


class Huber(losses.Own):
    def own_loss(self, logits, labels):
        return huber(logits, labels).mean()


def focal(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    values = F.cross_entropy(logits, labels, reduction="none")
    return (1 - (-values).exp()) ** 2 * values


def mean_of_focal(output, labels, num_items_in_batch=None):
    return focal(output.logits, labels).mean()


def groups(first: Mapping[str, Any], second: Mapping[str, Any], kind: type = torch.optim.AdamW) -> Any:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        own = [*model.parameters()]
        return kind([{"params": own[::2], **first}, {"params": own[1::2], **second}], lr=5e-3)

    return make


def torch_optimizer(kind: type, **settings: Any) -> Any:
    return lambda model: kind(model.parameters(), **settings)


def mixtral(**settings: Any) -> Build:
    def build() -> nn.Module:
        model = losses.mixtral()
        for name, value in settings.items():
            setattr(model.config, name, value)
        return model

    return build


def ignored() -> Dataset:
    return rows().map(lambda row, i: {"labels": -100 if i % 4 == 1 else row["labels"]}, with_indices=True)


def clipped(**settings: Any) -> dict[str, Any]:
    return {"max_grad_norm": 0.05, **settings}


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([item[name] for item in items]) for name in ("input_ids", "labels")}


def stream() -> Any:
    return rows().to_iterable_dataset()


NOT_THE_LOSS = "is not the cross entropy of the logits"
FULL = {"per_device_train_batch_size": 24}
UNSUPPORTED = "is not supported"

KINDS: dict[str, dict[str, Kind]] = {
    "Models": {
        "BERT": Kind(),
        "DistilBERT": Kind(
            lambda: classifier("distilbert", dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0)
        ),
        "RoBERTa": Kind(lambda: classifier("roberta", **losses.QUIET)),
        "BERT, tokens classified": Kind(lambda: bert(hf.BertForTokenClassification), tokens("tags"), arguments=FULL),
        "BERT, masked tokens": Kind(lambda: bert(hf.BertForMaskedLM), texts),
        "GPT-2": Kind(gpt2, texts),
        "GPT-2, padded": Kind(gpt2, tokens("text"), arguments=FULL),
        "GPT-2, texts classified": Kind(lambda: classifier("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)),
        "a subclass of GPT-2": Kind(lambda: gpt2(losses.MyGPT2), texts),
        "a language model of one's own": Kind(losses.OwnLanguageModel, texts),
        "Llama": Kind(llama, texts),
        "Qwen3": Kind(lambda: language_model("qwen3"), texts),
        "Mixtral": Kind(mixtral(output_router_logits=False), texts),
        "Mixtral with the router's penalty": Kind(losses.mixtral, texts, "adds a penalty of the router"),
        "T5, `decoder_input_ids` among the columns": Kind(
            seeded(lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, dropout_rate=0.0))), pairs
        ),
        "T5, which makes its own `decoder_input_ids`": Kind(
            seeded(lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, dropout_rate=0.0))),
            lambda: pairs().remove_columns("decoder_input_ids"),
            "cannot be computed without labels and in float32",
        ),
        "ViT": Kind(
            seeded(lambda: hf.ViTForImageClassification(hf.ViTConfig(**VIT, intermediate_size=8, num_labels=3))),
            pictures,
        ),
        "a convolutional network of one's own": Kind(seeded(Convolutional), pictures),
        "Bloom": Kind(losses.bloom, texts),
        "BERT, multiple choice": Kind(
            lambda: bert(hf.BertForMultipleChoice),
            lambda: Dataset.from_list(
                [{"input_ids": [[3, 6 + i % 5, 7], [4, 8, 9 + i % 3]], "labels": i % 2} for i in range(24)]
            ),
        ),
        "BERT, spans": Kind(lambda: bert(hf.BertForQuestionAnswering, num_labels=2), questions),
        "BERT, spans of texts that are padded by batch": Kind(
            lambda: bert(hf.BertForQuestionAnswering, num_labels=2),
            lambda: questions().map(lambda row, i: {"input_ids": row["input_ids"][: 2 + i % 2]}, with_indices=True),
            trainer={"data_collator": hf.DataCollatorWithPadding(word_tokenizer(["word"]))},
            refused="chooses among the positions of a text",
        ),
        "rows that are centred on their batch": Kind(
            lambda: bert(losses.Centred), refused="rows of a batch change each other's losses"
        ),
    },
    "Losses": {
        "mean of every micro-batch": Kind(MeanModel, dataset),
        "mean of the update": Kind(UpdateModel, dataset),
        "labels of -100": Kind(data=ignored, arguments=FULL),
        "label smoothing": Kind(arguments={"label_smoothing_factor": 0.2}),
        "label smoothing, language model": Kind(gpt2, texts, arguments={"label_smoothing_factor": 0.2}),
        "class weights in the model": Kind(lambda: bert(losses.Own), refused=NOT_THE_LOSS),
        "class weights in the model, with `row_loss`": Kind(
            lambda: bert(losses.Own), row_loss=losses.weighted, arguments=FULL
        ),
        "focal loss in the model": Kind(lambda: bert(losses.Focal), refused=NOT_THE_LOSS),
        "focal loss in the model, with `row_loss`": Kind(lambda: bert(losses.Focal), row_loss=focal),
        "class weights in `compute_loss`": Kind(kind=WeightedLoss, refused=NOT_THE_LOSS),
        "class weights in `compute_loss`, with `row_loss`": Kind(kind=WeightedLoss, row_loss=losses.weighted),
        "three times the loss in `compute_loss`": Kind(kind=losses.Tripled),
        "`compute_loss_func`, focal": Kind(trainer={"compute_loss_func": mean_of_focal}, refused=NOT_THE_LOSS),
        "`compute_loss_func`, focal, with `row_loss`": Kind(
            trainer={"compute_loss_func": mean_of_focal}, row_loss=focal
        ),
        "`compute_loss_func`, mean of the batch": Kind(trainer={"compute_loss_func": losses.mean_of_batch}),
        "`compute_loss_func`, mean of the update": Kind(trainer={"compute_loss_func": losses.mean_of_update}),
        "another `row_loss` than what is trained": Kind(row_loss=focal, refused="computes is not `row_loss`"),
        "penalty of the weights in `compute_loss`": Kind(kind=losses.Penalised, refused=NOT_THE_LOSS),
        "penalty of the weights in `training_step`": Kind(kind=losses.PenalisedStep, refused=NOT_THE_LOSS),
        "penalty in training mode": Kind(
            lambda: bert(losses.TrainingPenalty), refused="in training mode cannot be attributed"
        ),
        "sum over the batch": Kind(lambda: bert(losses.Summed), refused="is not a mean over rows or labels"),
        "regression": Kind(lambda: bert(num_labels=1), relabelled(float)),
        "regression, several numbers a row": Kind(
            lambda: bert(problem_type="regression"), relabelled(lambda i: [float(i), 1.0, i / 2])
        ),
        "several labels a row": Kind(lambda: bert(), relabelled(lambda i: [float(k in (i % 3, 1)) for k in range(3)])),
        "numbers, Huber's loss": Kind(
            lambda: bert(Huber, num_labels=1), relabelled(float), "is not the squared error of the logits"
        ),
        "numbers, Huber's loss, with `row_loss`": Kind(
            lambda: bert(Huber, num_labels=1), relabelled(float), row_loss=huber
        ),
        "no label but -100": Kind(data=relabelled(lambda i: -100), refused="has a label other than -100"),
    },
    "PEFT": {
        "LoRA": Kind(adapted(lambda: peft.LoraConfig(r=2, **TARGETS))),
        "LoRA, language model": Kind(
            adapted(lambda: peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"]), llama), texts
        ),
        "rsLoRA": Kind(adapted(lambda: peft.LoraConfig(r=2, use_rslora=True, **TARGETS))),
        "DoRA": Kind(adapted(lambda: peft.LoraConfig(r=2, use_dora=True, **TARGETS))),
        "LoHa": Kind(adapted(lambda: peft.LoHaConfig(r=2, **TARGETS))),
        "VeRA": Kind(adapted(lambda: peft.VeraConfig(r=2, **TARGETS))),
        "OFT": Kind(adapted(lambda: peft.OFTConfig(r=2, oft_block_size=0, **TARGETS))),
        "LoKr": Kind(adapted(lambda: peft.LoKrConfig(r=2, **TARGETS))),
        "IA3": Kind(adapted(lambda: peft.IA3Config(feedforward_modules=[], **TARGETS))),
        "AdaLoRA": Kind(losses.adalora, texts, NOT_THE_LOSS),
        "prompt tuning, texts classified": Kind(
            adapted(lambda: peft.PromptTuningConfig(num_virtual_tokens=2, task_type="SEQ_CLS"))
        ),
        "prompt tuning, language model": Kind(losses.prompt_tuning, texts),
        "P-tuning, language model": Kind(
            adapted(
                lambda: peft.PromptEncoderConfig(num_virtual_tokens=2, encoder_hidden_size=4, task_type="CAUSAL_LM"),
                llama,
            ),
            tokens("text"),
            arguments=FULL,
        ),
        "prefix tuning": Kind(adapted(lambda: peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="SEQ_CLS"))),
        "biases alone": Kind(
            lambda: frozen(bert(), lambda name: "bias" not in name),
        ),
        "a frozen body": Kind(lambda: frozen(bert(), lambda name: "classifier" not in name)),
    },
    "Optimizers": {
        "SGD": Kind(arguments={"optim": "sgd", "learning_rate": 0.1}),
        "momentum": Kind(arguments={"optim": "sgd", "optim_args": "momentum=0.9"}),
        "momentum with dampening": Kind(arguments={"optim": "sgd", "optim_args": "momentum=0.9,dampening=0.3"}),
        "Nesterov's momentum": Kind(arguments={"optim": "sgd", "optim_args": "momentum=0.9,nesterov=True"}),
        "Adam, with L2 penalty": Kind(optimizer=torch_optimizer(torch.optim.Adam, lr=5e-3, weight_decay=0.1)),
        "AdamW": Kind(arguments={"optim": "adamw_torch"}),
        "fused AdamW": Kind(arguments={"optim": "adamw_torch_fused"}),
        "groups of different rates": Kind(optimizer=groups({"lr": 1e-3}, {})),
        "groups of different decays": Kind(optimizer=groups({"weight_decay": 0.2}, {"weight_decay": 0.0})),
        "groups of different second betas and eps": Kind(
            optimizer=groups({"betas": (0.9, 0.98), "eps": 1e-4}, {"betas": (0.9, 0.999)})
        ),
        "groups of different first betas": Kind(
            optimizer=groups({"betas": (0.8, 0.99)}, {}), refused="Parameter groups with different"
        ),
        "groups of different momentum": Kind(
            optimizer=groups({"momentum": 0.9}, {}, torch.optim.SGD), refused="Parameter groups with different"
        ),
        "AMSGrad": Kind(optimizer=torch_optimizer(torch.optim.AdamW, lr=1e-3, amsgrad=True), refused="amsgrad"),
        "Adafactor": Kind(arguments={"optim": "adafactor"}, refused="Adafactor"),
        "RMSprop": Kind(arguments={"optim": "rmsprop"}, refused="RMSprop"),
        "Adagrad": Kind(arguments={"optim": "adagrad"}, refused="Adagrad"),
        "NAdam": Kind(optimizer=torch_optimizer(torch.optim.NAdam, lr=1e-3), refused="NAdam"),
        "an optimizer of one's own (Lion)": Kind(
            optimizer=lambda model: SignUpdate(model.parameters()), refused="SignUpdate"
        ),
    },
    "Trainer": {
        "gradient accumulation": Kind(arguments={"gradient_accumulation_steps": 2}),
        "gradient accumulation, mean of the update": Kind(
            UpdateModel, dataset, arguments={"gradient_accumulation_steps": 3}
        ),
        "clipping": Kind(arguments=clipped()),
        "clipping, accumulation and momentum": Kind(
            arguments=clipped(optim="sgd", optim_args="momentum=0.9", learning_rate=0.1, gradient_accumulation_steps=2)
        ),
        "warm-up and cosine rates": Kind(arguments={"warmup_steps": 2, "lr_scheduler_type": "cosine"}),
        "the last batch dropped": Kind(arguments={"per_device_train_batch_size": 7, "dataloader_drop_last": True}),
        "rows in their order": Kind(arguments={"train_sampling_strategy": "sequential"}),
        "rows grouped by length": Kind(arguments={"train_sampling_strategy": "group_by_length"}, refused="order of"),
        "a stream of rows": Kind(data=stream, refused="is a stream"),
        "bf16": Kind(arguments={"bf16": True}),
        "the best checkpoint at the end": Kind(
            MeanModel,
            dataset,
            arguments={"load_best_model_at_end": True, "save_steps": 1, "eval_steps": 1}
            | {"save_strategy": "steps", "eval_strategy": "steps"},
        ),
        "workers that load rows": Kind(arguments={"dataloader_num_workers": 1}),
        "gradient checkpointing": Kind(arguments={"gradient_checkpointing": True}),
        "`remove_unused_columns=False` and a collator": Kind(
            arguments={"remove_unused_columns": False}, trainer={"data_collator": collate}
        ),
        "`with_transform`": Kind(
            data=transformed, arguments={"remove_unused_columns": False}, trainer={"data_collator": collate}
        ),
        "resumed from a checkpoint": Kind(resumed=True),
        "resumed, momentum": Kind(resumed=True, arguments={"optim": "sgd", "optim_args": "momentum=0.9"}),
        "layers frozen on the way": Kind(
            MeanModel, dataset, "are frozen from here on", True, callback=At("on_step_begin", freeze)
        ),
        "averaged weights put into the model": Kind(
            MeanModel, dataset, "outside of the optimizer's step", True, callback=At("on_step_end", average)
        ),
        "weights clamped": Kind(
            MeanModel, dataset, "outside of the optimizer's step", True, callback=At("on_step_end", clamp)
        ),
        "gradients reversed": Kind(
            MeanModel, dataset, "Gradients changed between", True, callback=At("on_pre_optimizer_step", reverse)
        ),
        "hooks on gradients": Kind(
            MeanModel, dataset, "There are gradient hooks on", True, callback=At("on_step_begin", scale_by_hook)
        ),
    },
}


def frozen(model: nn.Module, is_frozen: Callable[[str], bool]) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_frozen(name))
    return model


def render() -> str:
    """The content of `docs/runs.md`."""
    page = INTRODUCTION
    for title, kinds in KINDS.items():
        page += f"\n## {title}\n\n| run | outcome |\n|---|---|\n"
        page += "".join(f"| {name} | {kind.outcome} |\n" for name, kind in kinds.items())
    return page


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
