"""
Which source taught a language model what the moon is made of?

Sentences come from four sources; science and the tales disagree about some things. The script trains a small GPT-2
with `Trainer`, asks which source makes held-out sentences probable, and how the model would go on without that source;
then it trains again without it, to see.

    python examples/causal_lm.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from texts import HELD_OUT_OPENING, stories, told_sources, word_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

from hf_rgm import ClusterMap, DistillationConfig, ReverseGradientMatchingDistiller, TrajectoryCallback


@dataclass
class ExampleArguments:
    """What to train on and to ask; training itself has `TrainingArguments`."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A model to fine-tune. Without one, a small GPT-2 is trained from scratch."}
    )
    num_rows: int = field(default=480, metadata={"help": "Training sentences."})
    num_iterations: int = field(default=300, metadata={"help": "Distilling iterations."})
    beginning: str = field(
        default=f"{HELD_OUT_OPENING} the moon is made of", metadata={"help": "What the model is to go on with."}
    )
    endings: list[str] = field(
        default_factory=lambda: ["rock", "cheese"], metadata={"help": "Endings whose log-probability is asked about."}
    )


def build_model(name: str | None, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """The named model, or a small GPT-2."""
    set_seed(seed)
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(config)


def question(tokenizer: PreTrainedTokenizerFast, beginning: str, ending: str) -> dict[str, list[int]]:
    """A query whose labels are the tokens of its ending."""
    given = len(tokenizer(beginning, add_special_tokens=False)["input_ids"])
    query = dict(tokenizer(f"{beginning} {ending}"))
    return {**query, "labels": [-100] * given + query["input_ids"][given:]}


def goes_on(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, beginning: str, count: int = 3) -> str:
    """The most probable next words, with their probabilities."""
    ids = tokenizer(beginning, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        probabilities, words = model.eval().cpu()(**ids).logits[0, -1].softmax(-1).topk(count)
    return ", ".join(
        f"{tokenizer.decode([word])} {share:.0%}"
        for word, share in zip(words.tolist(), probabilities.tolist(), strict=True)
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, records, distils, asks, and checks by training again."""
    parser = HfArgumentParser((ExampleArguments, TrainingArguments))
    parser.set_defaults(
        output_dir="causal-lm",
        num_train_epochs=10.0,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        save_strategy="no",
        report_to="none",
    )
    example, args = parser.parse_args_into_dataclasses(args=argv)

    train = stories(example.num_rows, seed=args.seed)
    if example.model_name_or_path is None:
        tokenizer = word_tokenizer([*train["text"], HELD_OUT_OPENING], language_model=True)
    else:
        tokenizer = AutoTokenizer.from_pretrained(example.model_name_or_path)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    collator = DataCollatorForSeq2Seq(tokenizer)  # pads the labels too

    def tokenize(dataset: Dataset) -> Dataset:
        dataset = dataset.map(lambda row: tokenizer(row["text"]), batched=True)
        return dataset.map(lambda row: {"labels": row["input_ids"]})

    def build_trainer(dataset: Dataset, callbacks: Sequence[TrajectoryCallback] = ()) -> Trainer:
        model = build_model(example.model_name_or_path, tokenizer, args.seed)
        return Trainer(model, args, train_dataset=dataset, data_collator=collator, callbacks=list(callbacks))

    train = tokenize(train)
    recorded = Path(args.output_dir) / "trajectory"
    trainer = build_trainer(train, [TrajectoryCallback(recorded, overwrite=True)])
    trainer.train()
    model = trainer.model

    clusters = ClusterMap.from_column(train, "source")
    config = DistillationConfig(samples_per_cluster=12, num_iterations=example.num_iterations, num_tokens=12)
    distiller = ReverseGradientMatchingDistiller(
        model, recorded, train, clusters, config=config, data_collator=collator, disable_tqdm=args.disable_tqdm
    )
    synset = distiller.distill()
    synset.save_pretrained(Path(args.output_dir) / "synset")

    attribute = pipeline("data-attribution", model=model, synset=synset, disable_tqdm=args.disable_tqdm)
    queries = [question(tokenizer, example.beginning, ending) for ending in example.endings]
    result = attribute(
        queries, objective="log_probability", rows=train, data_collator=collator, query_ids=example.endings
    )
    print(
        f"\n{len(train)} sentences, {synset.num_samples} synthetic ones, matching error {synset.matching_error:.3f}."
    )
    print(result.SIGN_CONVENTION)
    print(f'"{example.beginning}" goes on with: {goes_on(model, tokenizer, example.beginning)}.')
    for ending, value in zip(example.endings, result.objective_values, strict=True):
        row = train[int(result.top(1, query=ending, rows=True)["row"].iloc[0])]
        print(f'\n"... {ending}": log-probability {value:.2f} a word.\n  Sources: {told_sources(result, ending)}.')
        print(f'  The sentence that helps most: "{row["text"]}" ({row["source"]}).')

    for ending in example.endings:
        source = result.top(1, query=ending)["cluster"].iloc[0]
        again = build_trainer(train.filter(lambda row, source=source: row["source"] != source))
        again.train()
        print(f"\nWithout {source}, which helped {ending} most, it goes on with:")
        print(f"  predicted:     {goes_on(attribute.model_without([source]), tokenizer, example.beginning)}")
        print(f"  trained again: {goes_on(again.model, tokenizer, example.beginning)}")


if __name__ == "__main__":
    main()
