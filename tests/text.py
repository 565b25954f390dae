"""Small text models, built in code, and rows of token ids for them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)

VOCABULARY, LENGTH = 23, 6
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "bert": SMALL,
    "roberta": SMALL,
    "distilbert": {
        "vocab_size": VOCABULARY,
        "dim": 8,
        "n_layers": 1,
        "n_heads": 2,
        "hidden_dim": 12,
        "max_position_embeddings": 24,
    },
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 24, "pad_token_id": 0},
    "llama": {**SMALL, "num_key_value_heads": 1},
    "qwen2": {**SMALL, "num_key_value_heads": 1},
    "qwen3": {**SMALL, "num_key_value_heads": 1, "head_dim": 4},
}
ENCODERS = ("bert", "roberta", "distilbert")
DECODERS = ("gpt2", "llama", "qwen2", "qwen3")


def text_config(kind: str, **changes):
    return AutoConfig.for_model(kind, **{**CONFIGS[kind], **changes})


def classifier(kind: str, *, num_labels: int = 3, seed: int = 0, **changes) -> PreTrainedModel:
    set_seed(seed)
    return AutoModelForSequenceClassification.from_config(text_config(kind, num_labels=num_labels, **changes)).eval()


def lora(model: PreTrainedModel) -> PeftModel:
    """Low-rank adapters of queries and values of a classifier, whose head is trained too."""
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS"
    )
    return get_peft_model(model, config)


def tagger(kind: str, *, num_labels: int = 3, seed: int = 0) -> PreTrainedModel:
    set_seed(seed)
    return AutoModelForTokenClassification.from_config(text_config(kind, num_labels=num_labels)).eval()


def language_model(kind: str, *, seed: int = 0, **changes) -> PreTrainedModel:
    set_seed(seed)
    return AutoModelForCausalLM.from_config(text_config(kind, **changes)).eval()


def word_tokenizer(words: Iterable[str], **settings) -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary is the words of some texts."""
    special = ["<pad>", "<eos>", "<unk>"]
    known = sorted({word for text in words for word in text.split()} - set(special))
    vocabulary = {word: number for number, word in enumerate(special + known)}
    assert len(vocabulary) <= VOCABULARY
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", **settings
    )


def texts(num_rows: int = 24, *, labels: str = "class", seed: int = 0) -> Dataset:
    """
    Rows of `LENGTH` tokens of which the last ones may be padding; every third token tells the class.

    `labels`: `"class"`, `"tags"` (one for each token) or `"text"` (the tokens themselves, for language models).
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in range(num_rows):
        length = LENGTH - row % 3
        ids = torch.randint(6, VOCABULARY, (LENGTH,), generator=generator)
        ids[::3] = 3 + row % 3
        mask = (torch.arange(LENGTH) < length).long()
        ids = torch.where(mask == 1, ids, 0)
        ignored = torch.full((LENGTH,), -100)
        targets = {"class": torch.tensor(row % 3), "tags": ids % 3, "text": ids}[labels]
        rows.append(
            {
                "input_ids": ids.tolist(),
                "attention_mask": mask.tolist(),
                "labels": torch.where(mask == 1, targets, ignored).tolist() if labels != "class" else int(targets),
            }
        )
    return Dataset.from_list(rows).with_format("torch")
