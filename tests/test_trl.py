"""The whole path on models that TRL's `SFTTrainer` trained."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, PeftModel
from transformers import DataCollatorWithFlattening, PrinterCallback

from hf_rgm import (
    Attributor,
    ClusterMap,
    DistillationConfig,
    ReverseGradientMatchingDistiller,
    TrajectoryCallback,
)
from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.losses import label_losses
from hf_rgm.model.row_gradients import cluster_gradients
from hf_rgm.model.row_reader import RowReader
from tests.text import classifier, language_model, word_tokenizer

trl = pytest.importorskip("trl")

CLOSE = {"atol": 1e-6, "rtol": 1e-4}
"""Float32 by another order of operations."""

WORDS = "the a cat dog bird sat ran sang on under mat road tree where who why".split()
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '> ' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + ' <eos> ' }}{% endgeneration %}"
    "{% else %}{{ m.content + ' ' }}{% endif %}{% endfor %}"
)
LORA = LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
NUM_ROWS = 24


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer([*WORDS, "<user>", "<assistant>"], chat_template=TEMPLATE)


def sentence(generator: np.random.Generator, source: str, length: int) -> str:
    return " ".join(generator.choice(WORDS[:8] if source == "zoo" else WORDS[8:], length))


def rows(kind: str, num_rows: int = NUM_ROWS, seed: int = 0) -> Dataset:
    """Sentences of different lengths from two sources, as TRL takes them."""
    generator = np.random.default_rng(seed)
    items = []
    for row in range(num_rows):
        source = ("zoo", "road")[row % 2]
        prompt, answer = (sentence(generator, source, 2 + (row + shift) % 3) for shift in (0, 1))
        items.append(
            {
                "text": {"text": f"{prompt} {answer}"},
                "prompts": {"prompt": f"{prompt} ", "completion": answer},
                "chat": {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]},
            }[kind]
            | {"source": source}
        )
    return Dataset.from_list(items)


def sft_trainer(folder, tokenizer, dataset, *, peft_config=None, callbacks=(), **settings):
    arguments = trl.SFTConfig(
        output_dir=str(folder / "out"),
        **{"num_train_epochs": 5, "per_device_train_batch_size": 8, "learning_rate": 5e-3, "bf16": False, **settings},
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = trl.SFTTrainer(
        language_model("gpt2", bos_token_id=1, eos_token_id=1),
        arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def trained(folder, tokenizer, dataset, **settings):
    callback = TrajectoryCallback(folder / "trajectory", num_states=4)
    trainer = sft_trainer(folder, tokenizer, dataset, callbacks=[callback], **settings)
    trainer.train()
    return trainer


RUNS = {
    "language modelling": ("text", {}),
    "prompt and completion": ("prompts", {}),
    "prompt and completion, loss on both": ("prompts", {"completion_only_loss": False}),
    "assistant only": ("chat", {"assistant_only_loss": True}),
    "assistant only, cut": ("chat", {"assistant_only_loss": True, "max_length": 5}),
    "packed": ("text", {"packing": True, "packing_strategy": "wrapped", "max_length": 8}),
    "LoRA": ("prompts", {"peft_config": LORA}),
    "label smoothing": ("prompts", {"label_smoothing_factor": 0.2}),
}


@pytest.fixture(params=RUNS, scope="module")
def run(request, tokenizer, tmp_path_factory):
    kind, settings = RUNS[request.param]
    folder = tmp_path_factory.mktemp("run")
    trainer = trained(folder, tokenizer, rows(kind), **settings)
    dataset = trainer.train_dataset
    # Packed rows mix texts, and have lost their columns.
    packed = settings.get("packing", False)
    clusters = (
        ClusterMap.from_ids(np.arange(len(dataset)) % 2) if packed else ClusterMap.from_column(dataset, "source")
    )
    distiller = ReverseGradientMatchingDistiller(
        trainer.model,
        folder / "trajectory",
        dataset,
        clusters,
        config=DistillationConfig(samples_per_cluster=2, num_iterations=80, num_tokens=6),
        data_collator=trainer.data_collator,
        disable_tqdm=True,
    )
    return trainer, distiller


def full_gradient(trainer, functional) -> torch.Tensor:
    """Gradient of the Trainer's own loss of the whole training set as one batch."""
    columns = ["input_ids", "labels"]
    batch = trainer.data_collator(trainer.train_dataset.select_columns(columns).to_list())
    model = trainer.model.eval()
    own = [value for name, value in model.named_parameters() if name in functional.space.names]
    _, count = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)  # what training divides by
    loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=count)
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, own)])


def distilled_gradient(distiller) -> torch.Tensor:
    model = distiller.model
    groups = range(distiller.clusters.num_clusters)
    num_rows = len(distiller.reader)
    total = cluster_gradients(
        model, [model.space.flatten(model.parameters())], distiller.batches, groups, num_rows, distiller.row_loss
    )
    return total[0].sum(0)


def test_cluster_gradients_add_up_to_that_of_the_trainers_own_loss(run):
    trainer, distiller = run
    expected = full_gradient(trainer, distiller.model)
    assert expected.norm() > 0.01
    torch.testing.assert_close(distilled_gradient(distiller), expected, **CLOSE)


def test_distils_attributes_and_forgets(run, tmp_path):
    trainer, distiller = run
    dataset = trainer.train_dataset
    synset = distiller.distill()
    assert synset.matching_error < 0.5
    attributor = Attributor(trainer.model, synset, disable_tqdm=True)
    result = attributor.attribute(
        dataset.select(range(3)),
        engine="adjoint",
        objective="log_probability",
        rows=dataset,
        data_collator=trainer.data_collator,
    )
    sums = result.row_scores @ np.eye(2)[distiller.clusters.cluster_ids]
    np.testing.assert_allclose(sums, result.scores, rtol=1e-4, atol=1e-7)
    assert result.scores.any(1).all()

    without = attributor.model_without([0])
    assert type(without) is type(trainer.model)
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    with torch.no_grad():
        before, after = (model.eval()(**inputs).logits for model in (trainer.model, without))
    assert not torch.equal(before, after)
    if isinstance(without, PeftModel):
        without.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(language_model("gpt2"), tmp_path).eval()
    else:
        loaded = language_model("gpt2")
        loaded.load_state_dict(without.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, after, atol=0, rtol=0)


def test_sources_are_kept_where_each_is_packed_by_itself(tokenizer, tmp_path):
    texts = rows("text").map(lambda row: {"input_ids": tokenizer(row["text"] + "<eos>").input_ids})
    parts = []
    for source in ("zoo", "road"):
        own = texts.filter(lambda row, source=source: row["source"] == source).select_columns("input_ids")
        packed = trl.pack_dataset(own, 8, "wrapped")
        parts.append(packed.add_column("source", [source] * len(packed)))
    trainer = trained(tmp_path, tokenizer, concatenate_datasets(parts))
    clusters = ClusterMap.from_column(trainer.train_dataset, "source")
    assert clusters.num_rows == len(trainer.train_dataset) < NUM_ROWS
    distiller = ReverseGradientMatchingDistiller(
        trainer.model, tmp_path / "trajectory", trainer.train_dataset, clusters, data_collator=trainer.data_collator
    )
    torch.testing.assert_close(distilled_gradient(distiller), full_gradient(trainer, distiller.model), **CLOSE)


def test_clusters_of_the_rows_before_packing_are_refused(tokenizer, tmp_path):
    before = rows("text")
    trainer = trained(
        tmp_path, tokenizer, before, packing=True, packing_strategy="wrapped", max_length=8, num_train_epochs=1
    )
    clusters = ClusterMap.from_column(before, "source")
    with pytest.raises(ValueError, match="24"):
        ReverseGradientMatchingDistiller(trainer.model, tmp_path / "trajectory", trainer.train_dataset, clusters)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"packing": True, "max_length": 8}, r"packing_strategy='bfd'.*packing=False"),
        ({"packing": True, "packing_strategy": "bfd_split", "max_length": 8}, r"packing_strategy='bfd_split'"),
        ({"padding_free": True, "max_length": None}, r"padding_free=True.*padding_free=False"),
    ],
)
def test_rows_flattened_into_one_sequence_are_refused_before_training(settings, message, tokenizer, tmp_path):
    callback = TrajectoryCallback(tmp_path / "trajectory")
    trainer = sft_trainer(tmp_path, tokenizer, rows("text"), callbacks=[callback], **settings)
    with pytest.raises(NotImplementedError, match=message):
        trainer.train()


def test_a_flattening_collator_is_refused():
    dataset = Dataset.from_dict({"input_ids": [[5, 6], [7, 8, 9]], "labels": [[5, 6], [7, 8, 9]]})
    reader = RowReader(dataset, FunctionalModel(language_model("gpt2")), data_collator=DataCollatorWithFlattening())
    with pytest.raises(NotImplementedError, match="turns 2 rows of `train_dataset` into 1"):
        reader.batch([0, 1])


def test_another_loss_has_to_be_passed(tokenizer, tmp_path):
    with pytest.raises(NotImplementedError, match="loss_type='dft'.*`row_loss`"):
        trained(tmp_path, tokenizer, rows("prompts"), loss_type="dft", num_train_epochs=1)
    trainer = sft_trainer(tmp_path, tokenizer, rows("prompts"), loss_type="dft", num_train_epochs=1)
    dataset = trainer.train_dataset
    labels_per_row = sum(label != -100 for labels in dataset["labels"] for label in labels[1:]) / len(dataset)

    def dynamic(logits, labels):
        losses = label_losses(logits, labels)
        return (losses * (-losses).exp().detach()).sum(1) / labels_per_row

    trainer.add_callback(TrajectoryCallback(tmp_path / "trajectory", row_loss=dynamic))
    trainer.train()
    given = (trainer.model, tmp_path / "trajectory", dataset, ClusterMap.from_column(dataset, "source"))
    distiller = ReverseGradientMatchingDistiller(*given, data_collator=trainer.data_collator, row_loss=dynamic)
    torch.testing.assert_close(distilled_gradient(distiller), full_gradient(trainer, distiller.model), **CLOSE)


@pytest.mark.parametrize("kind", ["DPO", "Reward"])
def test_preferences_are_refused_before_training(tmp_path, tokenizer, kind):
    generator = np.random.default_rng(0)
    texts = [{name: sentence(generator, "zoo", 3) for name in ("chosen", "rejected")} for _ in range(8)]
    data = Dataset.from_list([{"prompt": "the cat ", **row} for row in texts])
    model = language_model("gpt2") if kind == "DPO" else classifier("gpt2", num_labels=1)
    reference = {"ref_model": language_model("gpt2", seed=1)} if kind == "DPO" else {}
    arguments = getattr(trl, f"{kind}Config")(
        str(tmp_path / "out"), max_steps=2, report_to="none", use_cpu=True, bf16=False, save_strategy="no"
    )
    callbacks = [TrajectoryCallback(tmp_path / "trajectory")]
    common = {"args": arguments, "train_dataset": data, "processing_class": tokenizer, "callbacks": callbacks}
    trainer = getattr(trl, f"{kind}Trainer")(model, **common, **reference)
    with pytest.raises(NotImplementedError, match=f"{kind}Trainer trains on rows without labels.*by `SFTTrainer`"):
        trainer.train()
    assert trainer.state.global_step == 0
