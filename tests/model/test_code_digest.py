"""What a function does counts, not its name or where it stands."""

import functools

import torch
from torch import nn

from hf_rgm.model.code_digest import code_digest

FACTOR = 2.0


def made(body, **scope):
    """A function `loss` of this body, as in another edition of a script."""
    namespace = {"torch": torch, "__name__": "script", **scope}
    exec(f"def loss(logits, labels):\n    return {body}", namespace)
    return namespace["loss"]


def test_the_same_code_is_the_same_function():
    assert code_digest(made("logits - labels")) == code_digest(made("logits - labels"))


def test_other_code_constants_globals_closures_and_helpers_count():
    digests = [
        code_digest(function)
        for function in (
            made("logits - labels"),
            made("logits + labels"),
            made("logits - 2 * labels"),
            made("logits - factor * labels", factor=2),
            made("logits - factor * labels", factor=3),
            made("logits - helper(labels)", helper=made("logits")),
            made("logits - helper(labels)", helper=made("labels")),
            made("(lambda x: x - factor)(logits)", factor=2),
            made("(lambda x: x - factor)(logits)", factor=3),
            *((lambda logits, labels, w=w: w * logits) for w in (1, 2)),
            *(functools.partial(made("logits - labels"), labels=label) for label in (0, 1)),
            *(nn.CrossEntropyLoss(weight=weight, reduction="none") for weight in (None, torch.ones(2), torch.ones(3))),
            nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1),
        )
    ]
    assert len({*digests}) == len(digests)


def test_closures_that_refer_to_themselves_end():
    def walk(depth):
        return walk(depth - 1) * FACTOR if depth else 1

    assert code_digest(walk) == code_digest(walk)
