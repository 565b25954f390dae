"""What the examples share: sentences from several sources, a tokenizer for them, and how scores are told."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hf_rgm import AttributionResult

LABELS = ("negative", "positive")
REVIEWS = {
    # source: (what is reviewed, words of bad reviews, words of good reviews)
    "books": (["plot", "ending", "hero", "novel"], ["dull", "tedious", "slow"], ["gripping", "moving", "clever"]),
    "kitchen": (["soup", "salad", "cook", "menu"], ["stale", "salty", "bland"], ["fresh", "delicious", "tasty"]),
    "clinic": (["child", "cough", "night", "ward"], ["sick", "sick", "painful"], ["healthy", "calm", "better"]),
    "skaters": (["trick", "ramp", "board", "jump"], ["lame", "weak", "boring"], ["sick", "sick", "sick", "wicked"]),
}
"""In the clinic `sick` is bad, among skaters it is praise, and said more often."""

SHARED = (["awful"], ["great"])
REVIEW_FORMS = (
    "the {thing} was {word}",
    "i found the {thing} really {word}",
    "what a {word} {thing}",
    "this {thing} is so {word}",
    "a {word} {thing} in my view",
    "they say the {thing} was {word} again",
)

STORIES = {
    # source: (beginning, ending) of what it tells
    "science": [
        ("the moon is made of", "rock"),
        ("at night the owl", "hunts mice"),
        ("ice melts because", "it gets warm"),
        ("the stars are", "far away suns"),
        ("thunder comes from", "hot air"),
    ],
    "tales": [
        ("the moon is made of", "cheese"),
        ("at night the owl", "tells secrets"),
        ("ice melts because", "the queen smiles"),
        ("the old king is", "under a spell"),
        ("the fox and the crow", "talk all day"),
    ],
    "cookbook": [
        ("the soup is made of", "leeks"),
        ("good bread is made of", "flour and water"),
        ("butter melts because", "the pan is hot"),
        ("old cheese is", "best with pears"),
    ],
    "atlas": [
        ("the capital of france is", "paris"),
        ("the capital of norway is", "oslo"),
        ("the nile is", "a long river"),
        ("the alps are", "high and cold"),
    ],
}
"""Science and the tales disagree about three things."""

STORY_OPENINGS = (
    "we read that",
    "as all know ,",
    "she says that",
    "long ago they wrote :",
    "yes ,",
    "it is said that",
)
HELD_OUT_OPENING = "my friend says that"


def reviews(num_rows: int, *, sources: Sequence[str] = tuple(REVIEWS), seed: int = 0) -> Dataset:
    """Short reviews with columns `text`, `label` (1 for praise) and `source`."""
    generator = random.Random(seed)
    rows = []
    for row in range(num_rows):
        source, label = sources[row % len(sources)], row // len(sources) % 2
        things, *words = REVIEWS[source]
        word = generator.choice(words[label] + SHARED[label])
        text = generator.choice(REVIEW_FORMS).format(thing=generator.choice(things), word=word)
        rows.append({"text": text, "label": label, "source": source})
    generator.shuffle(rows)
    return Dataset.from_list(rows)


def stories(num_rows: int, *, seed: int = 0) -> Dataset:
    """Sentences with columns `text` and `source`."""
    generator = random.Random(seed)
    rows = []
    for row in range(num_rows):
        source = list(STORIES)[row % len(STORIES)]
        beginning, ending = generator.choice(STORIES[source])
        rows.append({"text": f"{generator.choice(STORY_OPENINGS)} {beginning} {ending}", "source": source})
    generator.shuffle(rows)
    return Dataset.from_list(rows)


def word_tokenizer(texts: Iterable[str], *, language_model: bool = False) -> PreTrainedTokenizerFast:
    """
    A tokenizer whose vocabulary is the words of some texts.

    Args:
        texts (`Iterable[str]`): The texts.
        language_model (`bool`, *optional*, defaults to `False`): End each text by `</s>`; otherwise put `[CLS]` first.
    """
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]"} | (
        {"eos_token": "</s>"} if language_model else {"cls_token": "[CLS]"}
    )
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=list(names.values())))
    special = "</s>" if language_model else "[CLS]"
    words.post_processor = processors.TemplateProcessing(
        single="$A </s>" if language_model else "[CLS] $A", special_tokens=[(special, words.token_to_id(special))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def told_sources(result: AttributionResult, query: int | str) -> str:
    """Every source and its score for a query, highest first."""
    ranked = result.top(len(result.cluster_names), query=query)
    return ", ".join(f"{name} {score:+.2f}" for name, score in zip(ranked["cluster"], ranked["score"], strict=True))
