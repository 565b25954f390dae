from __future__ import annotations

import pytest
import torch

from hf_rgm.model.functional_model import FunctionalModel
from hf_rgm.model.losses import RowLoss
from hf_rgm.model.row_gradients import row_derivatives, row_gradients
from hf_rgm.model.row_reader import RowReader
from hf_rgm.synset.inputs import ContinuousInputs, EmbeddedTokens, SoftTokens, choose_ids, first_tokens, input_space
from hf_rgm.synset.samples import SynsetGradients, SyntheticSamples
from tests.text import DECODERS, ENCODERS, VOCABULARY, classifier, language_model, tagger, texts
from tests.vision import vit

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
"""Float32 by another order of operations."""
NUM_ROWS, NUM_TOKENS = 6, 5
MODELS = {
    **{kind: (lambda kind=kind: classifier(kind), "class") for kind in (*ENCODERS, *DECODERS)},
    "bert tagger": (lambda: tagger("bert"), "tags"),
    **{f"{kind} LM": (lambda kind=kind: language_model(kind), "text") for kind in DECODERS},
}


@pytest.fixture(params=MODELS, scope="module")
def parts(request):
    make, labels = MODELS[request.param]
    model = FunctionalModel(make())
    reader = RowReader(texts(labels=labels), model)
    return model, reader, RowLoss(labels_per_row=reader.labels_per_row())


def one_by_one(model, inputs, labels, row_loss):
    rows = []
    for row in range(len(labels)):
        leaves = {name: value.clone().requires_grad_() for name, value in model.parameters().items()}
        logits = model.logits(leaves, {name: value[row : row + 1] for name, value in inputs.items()})
        loss = row_loss(logits, labels[row : row + 1])[0]
        gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        rows.append(model.space.flatten(dict(zip(leaves, gradients, strict=True))))
    return torch.stack(rows)


def test_row_gradients_and_derivatives_are_those_of_a_loop(parts):
    model, reader, row_loss = parts
    inputs, labels = reader.batch(range(NUM_ROWS))
    expected = one_by_one(model, inputs, labels, row_loss)
    with model.differentiable():
        got = row_gradients(model, model.parameters(), inputs, labels, row_loss)
        torch.testing.assert_close(got, expected, **CLOSE)
        for count in (2, 7):
            directions = torch.randn(count, model.num_parameters, generator=torch.Generator().manual_seed(3))
            change = row_derivatives(model, model.parameters(), directions, inputs, labels, row_loss)
            torch.testing.assert_close(change, directions @ expected.T, **CLOSE)


def synthetic(model, reader, kind):
    space = input_space(model, kind, num_tokens=NUM_TOKENS, num_choices=4)
    inputs, labels = reader.batch(range(NUM_ROWS))
    real, labels = space.read(inputs, labels)
    generator = torch.Generator().manual_seed(0)
    start = space.start("random", real, torch.arange(4), generator)
    num_labels = model.logits(model.parameters(), inputs).shape[-1]
    targets = torch.randn(4, *labels.shape[1:], num_labels, generator=generator)
    samples = SyntheticSamples(targets=targets, log_weights=torch.zeros(targets.shape[:-1]), **start)
    return space, samples.map(lambda tensor: tensor.unflatten(0, (2, 2)))


@pytest.mark.parametrize("kind", ["inputs_embeds", "soft_tokens"])
def test_clusters_vectorise_to_the_second_order(parts, kind):
    """`SynsetGradients` compares both ways itself, and takes one cluster at a time where they differ."""
    model, reader, _ = parts
    space, samples = synthetic(model, reader, kind)
    gradients = SynsetGradients(model, space)
    with model.differentiable():
        gradients(model.parameters(), samples)
    assert gradients._vectorized


def test_trained_embeddings_get_soft_tokens_and_frozen_ones_free_vectors():
    model = classifier("bert")
    assert isinstance(input_space(FunctionalModel(model)), SoftTokens)
    model.get_input_embeddings().requires_grad_(False)
    assert isinstance(input_space(FunctionalModel(model)), EmbeddedTokens)
    assert type(input_space(FunctionalModel(vit()))) is ContinuousInputs


def test_tied_embeddings_are_trained_embeddings():
    model = language_model("gpt2")
    model.transformer.wte.requires_grad_(False)
    assert not FunctionalModel(model).trains_embeddings
    model.lm_head.weight.requires_grad_(True)
    assert FunctionalModel(model).trains_embeddings


@pytest.mark.parametrize("make", [classifier, language_model])
def test_soft_tokens_that_are_sure_are_tokens(make):
    model = FunctionalModel(make("gpt2"))
    ids = torch.randint(VOCABULARY, (3, NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    sure = torch.stack([ids, (ids + 1) % VOCABULARY], dim=-1)
    logits = torch.tensor([200.0, 0.0]).expand(3, NUM_TOKENS, 2)
    soft = SyntheticSamples(logits, torch.zeros(3, 3), torch.zeros(3), input_ids=sure)
    parameters = model.parameters()
    expected = model.logits(parameters, {"input_ids": ids})
    torch.testing.assert_close(model.logits(parameters, SoftTokens(model).to_forward(soft)), expected, **CLOSE)
    free = SyntheticSamples(model.embed(parameters, ids), torch.zeros(3, 3), torch.zeros(3))
    torch.testing.assert_close(model.logits(parameters, EmbeddedTokens(model).to_forward(free)), expected, **CLOSE)


def test_only_soft_tokens_reach_trained_embeddings():
    model = FunctionalModel(language_model("llama"))
    reader = RowReader(texts(labels="text"), model)
    moved = {}
    for kind in ("inputs_embeds", "soft_tokens"):
        space, samples = synthetic(model, reader, kind)
        with model.differentiable():
            gradient = SynsetGradients(model, space)(model.parameters(), samples)
        moved[kind] = bool(model.space.unflatten(gradient)["model.embed_tokens.weight"].any())
    assert moved == {"inputs_embeds": False, "soft_tokens": True}


def test_first_tokens_leave_out_padding_and_begin_again():
    inputs = {
        "input_ids": torch.tensor([[5, 6, 7, 0], [0, 0, 8, 9], [1, 2, 3, 4]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1]]),
    }
    labels = torch.tensor([[15, 16, 17, -100], [-100, -100, 18, 19], [11, 12, 13, 14]])
    ids, own = first_tokens(inputs, labels, 3)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 8], [1, 2, 3]]
    assert own.tolist() == [[15, 16, 17], [18, 19, 18], [11, 12, 13]]
    ids, own = first_tokens(inputs, torch.tensor([0, 1, 2]), 5)
    assert ids.tolist() == [[5, 6, 7, 5, 6], [8, 9, 8, 9, 8], [1, 2, 3, 4, 1]]
    assert own.tolist() == [0, 1, 2]


def test_a_row_of_padding_and_further_inputs_are_refused():
    inputs = {"input_ids": torch.ones(1, 2, dtype=torch.int64), "attention_mask": torch.zeros(1, 2)}
    with pytest.raises(ValueError, match="all padding"):
        first_tokens(inputs, torch.zeros(1), 2)
    with pytest.raises(NotImplementedError, match=r"\['bbox'\] beside `input_ids`"):
        first_tokens({**inputs, "bbox": torch.zeros(1)}, torch.zeros(1), 2)


@pytest.mark.parametrize("with_own", [False, True])
def test_choices_differ_hold_the_own_id_first_and_prefer_what_occurs(with_own):
    pool = torch.tensor([4, 4, 4, 7, 9, 9])
    own = torch.full((50,), 7) if with_own else None
    ids = choose_ids(pool, own, (50,), 3, 30, torch.Generator().manual_seed(0))
    assert ids.shape == (50, 3)
    assert all(sorted(row) == [4, 7, 9] for row in ids.tolist())
    if with_own:
        assert (ids[:, 0] == 7).all()
    more = choose_ids(pool, own, (50,), 10, 30, torch.Generator().manual_seed(0))
    assert more.shape == (50, 10)
    assert all(len(set(row)) == 10 and {4, 7, 9} <= set(row) for row in more.tolist())
    assert choose_ids(pool, own, (50,), 99, 30, torch.Generator()).shape == (50, 30)


def test_encoder_decoders_are_refused():
    from transformers import AutoModelForSeq2SeqLM, T5Config

    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(NotImplementedError, match="T5ForConditionalGeneration is an encoder-decoder"):
        input_space(FunctionalModel(AutoModelForSeq2SeqLM.from_config(config)))
