"""Options of training and ways to ask: each goes the whole path, and gives the scores of the plain way."""

from __future__ import annotations

import copy

import numpy as np
import peft
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from hf_rgm import (
    AttributionPipeline,
    Attributor,
    ClusterMap,
    DistillationConfig,
    ReverseGradientMatchingDistiller,
    TrajectoryCallback,
)
from hf_rgm.model.row_reader import as_rows
from tests.recording.runs import KINDS
from tests.text import classifier, language_model, word_tokenizer
from tests.training import recorded_model

WORDS = "the a cat dog bird sat ran sang on under mat road tree where who why".split()
TOKENIZER = word_tokenizer(WORDS)
NUM_ROWS, MAX_LENGTH = 24, 4
CLUSTERS = ClusterMap.from_ids([i % 3 for i in range(NUM_ROWS)])
CONFIG = DistillationConfig.from_preset("quick", num_iterations=20)
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def raw() -> Dataset:
    """Texts of 3 to 6 words, with a column that nothing takes."""
    generator = np.random.default_rng(0)
    made = [" ".join(generator.choice(WORDS, 3 + i % 4)) for i in range(NUM_ROWS)]
    return Dataset.from_list([{"text": text, "label": i % 3, "source": "s"} for i, text in enumerate(made)])


def tokenised(**options) -> Dataset:
    return raw().map(lambda row: TOKENIZER(row["text"], **options))


def train(folder, data, **trainer):
    arguments = {"output_dir": str(folder / "out"), "max_steps": 6, "learning_rate": 5e-3, "use_cpu": True}
    arguments |= {"report_to": "none", "save_strategy": "no", "remove_unused_columns": data.format["type"] != "custom"}
    callback = TrajectoryCallback(folder / "trajectory", num_states=3)
    built = Trainer(
        classifier("bert"), TrainingArguments(**arguments), train_dataset=data, callbacks=[callback], **trainer
    )
    built.train()
    return built.model.eval()


def pipeline(folder, model, data):
    known = {"trajectory": folder / "trajectory", "rows": data, "clusters": CLUSTERS, "disable_tqdm": True}
    return AttributionPipeline(model, tokenizer=TOKENIZER, **known)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The plain way: tokenised rows, cut to four tokens, and their collator."""
    folder, data = tmp_path_factory.mktemp("run"), tokenised(truncation=True, max_length=MAX_LENGTH)
    model = train(folder, data, data_collator=DataCollatorWithPadding(TOKENIZER))
    attributor = Attributor(
        *(model,),
        trajectory=folder / "trajectory",
        rows=data,
        clusters=CLUSTERS,
        data_collator=DataCollatorWithPadding(TOKENIZER),
        disable_tqdm=True,
    )
    return folder, model, data, attributor.attribute(data.select(range(NUM_ROWS)))


def assert_same(result, expected):
    np.testing.assert_allclose(result.scores, expected.scores[: len(result.scores)], **CLOSE)
    np.testing.assert_allclose(result.row_scores, expected.row_scores[: len(result.scores)], **CLOSE)


def test_rows_that_are_transformed_when_read(tmp_path, recorded):
    data = raw().with_transform(
        lambda batch: {**TOKENIZER(batch["text"], truncation=True, max_length=MAX_LENGTH), "labels": batch["label"]}
    )
    model = train(tmp_path, data, data_collator=DataCollatorWithPadding(TOKENIZER))
    ask, collator = pipeline(tmp_path, model, data), DataCollatorWithPadding(TOKENIZER)
    for queries in (data, data.select(range(3)), data[:3]):
        assert_same(ask(queries), recorded[-1])
    parts = model, tmp_path / "trajectory", data, CLUSTERS
    distiller = ReverseGradientMatchingDistiller(*parts, config=CONFIG, data_collator=collator, disable_tqdm=True)
    by_synset = AttributionPipeline(model, synset=distiller.distill(), tokenizer=TOKENIZER, disable_tqdm=True)
    np.testing.assert_allclose(by_synset(data[:3]).scores, recorded[-1].scores[:3], rtol=0.02, atol=1e-3)
    assert_same(by_synset(data[:3], rows=data), recorded[-1])


def test_a_tokenizer_stands_for_the_collator(tmp_path, recorded):
    data = recorded[2]
    model = train(tmp_path, data, processing_class=TOKENIZER)
    known = {"trajectory": tmp_path / "trajectory", "rows": data, "clusters": CLUSTERS, "disable_tqdm": True}
    assert_same(Attributor(model, **known, data_collator=TOKENIZER).attribute(data), recorded[-1])
    with pytest.raises(ValueError, match="do not collate by `default_data_collator`.*`data_collator=tokenizer`"):
        Attributor(model, **known)
    parts = model, tmp_path / "trajectory", data, CLUSTERS
    distiller = ReverseGradientMatchingDistiller(*parts, config=CONFIG, data_collator=TOKENIZER, disable_tqdm=True)
    assert distiller.distill().matching_error < 1


def test_texts_are_cut_as_in_training(recorded, caplog):
    folder, model, data, expected = recorded
    ask, texts = pipeline(folder, model, data), raw()
    assert max(len(text.split()) for text in texts["text"]) > MAX_LENGTH
    assert_same(ask(texts), expected)
    assert f"cut to the {MAX_LENGTH} tokens of the longest training row" in caplog.text
    unlabelled = ask(data.remove_columns("label"))
    np.testing.assert_allclose(ask(texts["text"][:3]).scores, unlabelled.scores[:3], **CLOSE)


def test_a_dictionary_of_columns_is_rows(recorded):
    folder, model, data, expected = recorded
    ask = pipeline(folder, model, data)
    for queries in (data[:3], raw()[:3], data.with_format("numpy")[:3]):
        assert_same(ask(queries), expected)
    assert_same(ask.attributor.attribute(data[:3]), expected)
    assert_same(ask(data[0]), expected)
    with pytest.raises(ValueError, match="Got a dataset with the splits train, test. Choose one of them"):
        ask(DatasetDict(train=data, test=data))


@pytest.mark.parametrize(
    ("given", "num_rows"),
    [
        ({"input_ids": [[1, 2], [3]], "labels": [0, 1]}, 2),
        ({"input_ids": [1, 2], "labels": [1, 2]}, 1),  # a text with a label for each token
        ({"input_ids": [[1, 2], [3, 4]], "labels": [[1, 2], [3, 4]]}, 2),
        ({"input_ids": [[1, 2], [3, 4]], "labels": 0}, 1),  # two choices
        ({"input_ids": [1, 2], "labels": [0.0, 1.0]}, 1),  # two labels
        ({"input_ids": torch.ones(2, 3), "start_positions": torch.ones(2), "end_positions": torch.ones(2)}, 2),
        ({"pixel_values": torch.zeros(3, 8, 8)}, 1),
        ({"pixel_values": torch.zeros(3, 8, 8), "labels": 1}, 1),
        ({"pixel_values": torch.zeros(2, 3, 8, 8), "labels": [1, 0]}, 2),
        ({"text": "a cat"}, 1),
        ({"text": ["a cat", "a dog"]}, 2),
    ],
)
def test_rows_and_columns_are_told_apart(given, num_rows):
    rows = as_rows(given)
    assert len(rows) == num_rows and all(row.keys() == given.keys() for row in rows)
    if num_rows == 1:
        assert rows[0] is given


def test_the_pipeline_estimates_texts(recorded):
    folder, model, data, _ = recorded
    ask = pipeline(folder, model, data)
    few, many = (ask.estimate(["a cat sat", "who sang"], num_queries=number) for number in (2, 1000))
    assert 0 < few.disk_bytes < many.disk_bytes


@pytest.mark.parametrize("case", ["prompt tuning, language model", "P-tuning, language model", "LoHa"])
def test_adapters_go_the_whole_path(tmp_path, case):
    kind = KINDS["PEFT"][case]
    rows, clusters = kind.data(), ClusterMap.from_ids([i % 3 for i in range(24)])
    model = recorded_model(kind.model(), rows, tmp_path, num_states=3, max_steps=4)
    known = {"trajectory": tmp_path / "trajectory", "rows": rows, "clusters": clusters, "disable_tqdm": True}
    result = Attributor(model, **known).attribute(rows.select(range(3)), engine="adjoint", rewind=0.0)
    assert np.abs(result.row_scores).max() > 0
    parts = model, tmp_path / "trajectory", rows, clusters
    if case == "LoHa":
        with pytest.raises(NotImplementedError, match="Attribute by the rows, without a synset"):
            ReverseGradientMatchingDistiller(*parts, config=CONFIG)
        return
    unlabelled = Attributor(model, **known).attribute(rows.select(range(3)).remove_columns("labels"))
    np.testing.assert_allclose(unlabelled.objective_values, result.objective_values, **CLOSE)  # of the text itself
    synset = ReverseGradientMatchingDistiller(*parts, config=CONFIG, disable_tqdm=True).distill()
    assert synset.matching_error < 0.1


def test_a_frozen_base_in_bf16_goes_the_whole_path(tmp_path):
    rows, clusters = KINDS["Models"]["Llama"].data(), ClusterMap.from_ids([i % 3 for i in range(24)])
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(language_model("llama").to(torch.bfloat16), config)
    model = recorded_model(model, rows, tmp_path, num_states=3, max_steps=6, learning_rate=0.05)
    known = {"rows": rows, "clusters": clusters, "disable_tqdm": True, "force": True}
    in_16, in_32 = (
        Attributor(own, trajectory=tmp_path / "trajectory", **known).attribute(rows.select(range(3)))
        for own in (model, copy.deepcopy(model).float())
    )
    np.testing.assert_allclose(in_16.row_scores, in_32.row_scores, rtol=1e-4, atol=1e-7)
    assert np.abs(in_32.row_scores).max() > 1e-5
    parts = model, tmp_path / "trajectory", rows, clusters
    synset = ReverseGradientMatchingDistiller(*parts, config=CONFIG, disable_tqdm=True).distill()
    assert synset.matching_error < 1
