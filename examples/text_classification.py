"""
Which source taught a text classifier the meaning of a word?

Short reviews come from four sources. In the clinic "sick" is bad, among skaters it is praise. The script trains a
classifier with `Trainer`, asks which source made it say what it says, and what it would say without that source; then
it trains again without it, to see.

    python examples/text_classification.py
    python examples/text_classification.py --model_name_or_path prajjwal1/bert-tiny --learning_rate 3e-4
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from texts import LABELS, reviews, told_sources, word_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
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
        default=None, metadata={"help": "A model to fine-tune. Without one, a small BERT is trained from scratch."}
    )
    num_rows: int = field(default=480, metadata={"help": "Training reviews."})
    num_iterations: int = field(default=300, metadata={"help": "Distilling iterations."})
    questions: list[str] = field(
        default_factory=lambda: ["i found the soup really sick", "what a sick board", "what a great novel"],
        metadata={"help": "Texts to ask about."},
    )


def build_model(name: str | None, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """The named model, or a small BERT."""
    set_seed(seed)
    labels = {"num_labels": len(LABELS), "id2label": dict(enumerate(LABELS))}
    if name is not None:
        return AutoModelForSequenceClassification.from_pretrained(name, **labels)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,  # so small a model hardly learns from the usual 0.02
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
        **labels,
    )
    return BertForSequenceClassification(config)


def says(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[str]:
    """What a model says of some texts, and its log-odds."""
    with torch.no_grad():
        logits = model.eval().cpu()(**tokenizer(list(texts), padding=True, return_tensors="pt")).logits
    best, odds = logits.argmax(-1), logits.softmax(-1).amax(-1).logit()
    return [f"{LABELS[label]} (log-odds {margin:.1f})" for label, margin in zip(best, odds.tolist(), strict=True)]


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, records, distils, asks, and checks by training again."""
    parser = HfArgumentParser((ExampleArguments, TrainingArguments))
    parser.set_defaults(
        output_dir="text-classification",
        num_train_epochs=8.0,
        per_device_train_batch_size=16,
        learning_rate=5e-4,
        save_strategy="no",
        report_to="none",
    )
    example, args = parser.parse_args_into_dataclasses(args=argv)

    train = reviews(example.num_rows, seed=args.seed)
    if example.model_name_or_path is None:
        tokenizer = word_tokenizer(train["text"])
    else:
        tokenizer = AutoTokenizer.from_pretrained(example.model_name_or_path)
    collator = DataCollatorWithPadding(tokenizer)

    def tokenize(dataset: Dataset) -> Dataset:
        return dataset.map(lambda row: tokenizer(row["text"]), batched=True)

    def build_trainer(dataset: Dataset, callbacks: Sequence[TrajectoryCallback] = ()) -> Trainer:
        model = build_model(example.model_name_or_path, tokenizer, args.seed)
        return Trainer(model, args, train_dataset=dataset, data_collator=collator, callbacks=list(callbacks))

    train = tokenize(train)
    recorded = Path(args.output_dir) / "trajectory"
    trainer = build_trainer(train, [TrajectoryCallback(recorded, overwrite=True)])
    trainer.train()
    model = trainer.model

    clusters = ClusterMap.from_column(train, "source")
    config = DistillationConfig(samples_per_cluster=24, num_iterations=example.num_iterations, num_tokens=8)
    distiller = ReverseGradientMatchingDistiller(
        model, recorded, train, clusters, config=config, data_collator=collator, disable_tqdm=args.disable_tqdm
    )
    synset = distiller.distill()
    synset.save_pretrained(Path(args.output_dir) / "synset")

    attribute = pipeline(
        "data-attribution", model=model, tokenizer=tokenizer, synset=synset, disable_tqdm=args.disable_tqdm
    )
    result = attribute(example.questions, rows=train)
    print(f"\n{len(train)} reviews, {synset.num_samples} synthetic ones, matching error {synset.matching_error:.3f}.")
    print(result.SIGN_CONVENTION)
    for number, (text, said) in enumerate(
        zip(example.questions, says(model, tokenizer, example.questions), strict=True)
    ):
        row = train[int(result.top(1, query=number, rows=True)["row"].iloc[0])]
        print(f'\n"{text}": {said}.\n  Sources: {told_sources(result, number)}.')
        print(f'  The review that helps most: "{row["text"]}" ({row["source"]}, {LABELS[row["label"]]}).')

    source = result.top(1, query=0)["cluster"].iloc[0]
    print(f"\nWithout {source}, predicted and trained again:")
    predicted = attribute.model_without([source], rows=train)
    again = build_trainer(train.filter(lambda row: row["source"] != source))
    again.train()
    answers = (says(other, tokenizer, example.questions) for other in (predicted, again.model))
    for text, *both in zip(example.questions, *answers, strict=True):
        print(f'  "{text}": {" | ".join(both)}')


if __name__ == "__main__":
    main()
