"""
What did each source teach a LoRA adapter, and what is the adapter without one of them?

A classifier that knows reviews of books and food, and what is said in a clinic, is adapted by LoRA to three sources,
among them skaters, to whom "sick" is praise. The script asks which source made the adapted model say what it says, and
writes the adapter that never saw that source: a few kilobytes that load like any other.

    python examples/lora.py
    python examples/lora.py --model_name_or_path prajjwal1/bert-tiny --learning_rate 3e-3
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from text_classification import build_model, says
from texts import LABELS, reviews, told_sources, word_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

from hf_rgm import ClusterMap, DistillationConfig, ReverseGradientMatchingDistiller, TrajectoryCallback

KNOWN, ADAPTED = ("books", "kitchen", "clinic"), ("books", "kitchen", "skaters")


@dataclass
class ExampleArguments:
    """What to train on and to ask; training itself has `TrainingArguments`."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A model to adapt. Without one, a small BERT is trained on known sources."}
    )
    num_rows: int = field(default=480, metadata={"help": "Reviews for the adapter, and for the small BERT."})
    num_iterations: int = field(default=300, metadata={"help": "Distilling iterations."})
    rank: int = field(default=4, metadata={"help": "Rank of the adapter."})
    target_modules: list[str] = field(
        default_factory=lambda: ["query", "value"], metadata={"help": "Modules that the adapter changes."}
    )
    questions: list[str] = field(
        default_factory=lambda: ["i found the ramp really sick", "i found the soup really sick", "what a great novel"],
        metadata={"help": "Texts to ask about."},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Adapts, records, distils, asks, writes the adapter without what mattered most, and trains that one again."""
    parser = HfArgumentParser((ExampleArguments, TrainingArguments))
    parser.set_defaults(
        output_dir="lora",
        num_train_epochs=10.0,
        per_device_train_batch_size=16,
        learning_rate=7e-4,
        save_strategy="no",
        report_to="none",
    )
    example, args = parser.parse_args_into_dataclasses(args=argv)
    folder = Path(args.output_dir)

    train = reviews(example.num_rows, sources=ADAPTED, seed=args.seed)
    known = reviews(example.num_rows, sources=KNOWN, seed=args.seed + 1)
    name = example.model_name_or_path
    if name is None:
        tokenizer = word_tokenizer([*known["text"], *train["text"]])
    else:
        tokenizer = AutoTokenizer.from_pretrained(name)
    collator = DataCollatorWithPadding(tokenizer)

    def tokenize(dataset: Dataset) -> Dataset:
        return dataset.map(lambda row: tokenizer(row["text"]), batched=True)

    base = build_model(name, tokenizer, args.seed)
    if name is None:
        # A whole model takes smaller steps than an adapter, and is not to be too sure before it is adapted.
        whole = replace(args, learning_rate=args.learning_rate / 2, num_train_epochs=args.num_train_epochs / 2)
        Trainer(base, whole, train_dataset=tokenize(known), data_collator=collator).train()
    base.save_pretrained(folder / "base")
    before = says(base, tokenizer, example.questions)

    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=example.rank,
        lora_alpha=2 * example.rank,
        target_modules=example.target_modules,
        modules_to_save=["classifier"],
    )

    def adapt(dataset: Dataset, callbacks: Sequence[TrajectoryCallback] = ()) -> PeftModel:
        fresh = AutoModelForSequenceClassification.from_pretrained(folder / "base")
        set_seed(args.seed)
        adapted = get_peft_model(fresh, lora)
        Trainer(adapted, args, train_dataset=dataset, data_collator=collator, callbacks=list(callbacks)).train()
        return adapted

    train = tokenize(train)
    recorded = folder / "trajectory"
    model = adapt(train, [TrajectoryCallback(recorded, overwrite=True)])

    clusters = ClusterMap.from_column(train, "source")
    config = DistillationConfig(samples_per_cluster=24, num_iterations=example.num_iterations, num_tokens=8)
    distiller = ReverseGradientMatchingDistiller(
        model, recorded, train, clusters, config=config, data_collator=collator, disable_tqdm=args.disable_tqdm
    )
    synset = distiller.distill()
    synset.save_pretrained(folder / "synset")

    attribute = pipeline(
        "data-attribution", model=model, tokenizer=tokenizer, synset=synset, disable_tqdm=args.disable_tqdm
    )
    result = attribute(example.questions, rows=train)
    print(f"\n{len(train)} reviews, {synset.num_samples} synthetic ones, matching error {synset.matching_error:.3f}.")
    print(result.SIGN_CONVENTION)
    after = says(model, tokenizer, example.questions)
    for number, (text, *said) in enumerate(zip(example.questions, before, after, strict=True)):
        row = train[int(result.top(1, query=number, rows=True)["row"].iloc[0])]
        print(
            f'\n"{text}": {said[0]} before the adapter, {said[1]} with it.\n  Sources: {told_sources(result, number)}.'
        )
        print(f'  The review that helps most: "{row["text"]}" ({row["source"]}, {LABELS[row["label"]]}).')

    source = clusters.names[abs(result.scores[0]).argmax()]  # the one that matters most to the first question
    adapter = folder / f"adapter-without-{source}"
    without = attribute.model_without([source])
    without.save_pretrained(adapter)
    fresh = AutoModelForSequenceClassification.from_pretrained(folder / "base")
    loaded = PeftModel.from_pretrained(fresh, adapter).eval()
    batch = tokenizer(example.questions, padding=True, return_tensors="pt")
    with torch.no_grad():
        difference = (loaded(**batch).logits - without.cpu()(**batch).logits).abs().max()
    size = (adapter / "adapter_model.safetensors").stat().st_size / 1e3
    print(f"\nThe adapter without {source}: {size:.0f} kB in {adapter}.")
    print(f"Loaded again, its logits differ by {difference:g}. What it says, and one trained again without {source}:")
    again = adapt(train.filter(lambda row: row["source"] != source))
    answers = (says(other, tokenizer, example.questions) for other in (loaded, again))
    for text, *both in zip(example.questions, *answers, strict=True):
        print(f'  "{text}": {" | ".join(both)}')


if __name__ == "__main__":
    main()
