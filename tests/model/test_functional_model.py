from __future__ import annotations

import copy
import functools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.func import grad
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from hf_rgm.attribution.attributor import Attributor
from hf_rgm.model.functional_model import FunctionalModel, ParameterSpace, main_input_name, parameters_sha256
from hf_rgm.model.row_gradients import row_derivatives, row_gradients
from hf_rgm.testing import TinyConfig, TinyModel, tiny_dataset
from tests.recorded import TinyNet
from tests.text import classifier, language_model, texts
from tests.vision import distilled_run, train, vit, vit_run

FLOAT_TOLERANCE = 1e-6
"""Rounding of one float32 forward pass by another order of operations."""


def space():
    return ParameterSpace(("a", "b", "c"), (torch.Size([2, 3]), torch.Size([]), torch.Size([4])))


def pixels(count=5):
    return torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_flatten_and_unflatten_are_inverse(batch):
    vector = torch.randn(*batch, space().num_parameters)
    named = space().unflatten(vector)
    assert [tuple(t.shape) for t in named.values()] == [(*batch, 2, 3), batch, (*batch, 4)]
    assert torch.equal(space().flatten(named), vector)


def test_flatten_keeps_the_order_of_names_not_of_the_mapping():
    named = {"c": torch.full((4,), 3.0), "b": torch.tensor(2.0), "a": torch.ones(2, 3)}
    assert space().flatten(named).tolist() == [1.0] * 6 + [2.0] + [3.0] * 4


def test_expand_groups_spreads_each_groups_value():
    values = space().expand_groups([0.5, 7.0], lambda name: int(name == "c"), torch.device("cpu"))
    assert values.tolist() == [0.5] * 7 + [7.0] * 4
    assert space().expand_groups([2.0, 2.0], lambda name: 0, torch.device("cpu")).tolist() == [2.0]


def test_logits_equal_the_models_own_forward():
    model = vit().eval()
    functional = FunctionalModel(model)
    with torch.no_grad():
        expected = model(pixel_values=pixels()).logits
        got = functional.logits(functional.parameters(), {"pixel_values": pixels()})
    torch.testing.assert_close(got, expected, atol=FLOAT_TOLERANCE, rtol=1e-5)


def test_logits_follow_the_parameters_that_are_passed():
    model = TinyModel(TinyConfig(num_labels=3))
    functional = FunctionalModel(model)
    other = {name: value + 0.1 for name, value in functional.parameters().items()}
    shifted = functional.module_with(other, like=model)
    assert torch.equal(functional.logits(other, {"pixel_values": pixels()}), shifted(pixels()).logits)


def test_gradient_and_curvature_of_an_sdpa_model_equal_finite_differences():
    functional = FunctionalModel(vit(initializer_range=0.3).eval())
    functional.module.double()
    inputs = {"pixel_values": pixels(3).double()}
    vector = functional.space.flatten(functional.parameters())
    direction = torch.randn(len(vector), generator=torch.Generator().manual_seed(4)).double()

    def loss(v):
        return functional.logits(functional.space.unflatten(v), inputs).logsumexp(-1).sum()

    gradient = torch.func.grad(loss)
    with functional.differentiable():
        slope, eager = gradient(vector) @ direction, torch.func.jvp(gradient, (vector,), (direction,))[1]
        # Eager attention takes its softmax in float32, too coarse for differences; sdpa stays in float64.
        functional.module.set_attn_implementation("sdpa")
        step = 1e-5
        difference = (loss(vector + step * direction) - loss(vector - step * direction)) / (2 * step)
        change = (gradient(vector + step * direction) - gradient(vector - step * direction)) / (2 * step)
        backward = torch.func.vjp(gradient, vector)[1](direction)[0]
    torch.testing.assert_close(slope, difference, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(backward, change, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(eager, backward, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(6,), (5, 6)])
def test_layer_normalisation_from_elementary_operations_is_the_fused_one(shape, affine):
    layer = nn.LayerNorm(shape, eps=0.1, elementwise_affine=affine).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    inputs = torch.randn(2, 5, 6).double()
    functional = FunctionalModel(TinyNet())
    with functional.differentiable():
        got = layer(inputs)
    torch.testing.assert_close(got, layer(inputs), atol=1e-12, rtol=1e-12)


def test_dropout_is_off_and_the_result_repeats():
    functional = FunctionalModel(vit(hidden_dropout_prob=0.5).train())
    first, second = (functional.logits(functional.parameters(), {"pixel_values": pixels()}) for _ in range(2))
    assert torch.equal(first, second)


def snapshot(model):
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "pointers": [p.data_ptr() for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "dtypes": [p.dtype for p in model.parameters()],
        "gradients": [p.grad is None for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "attention": model.config._attn_implementation,
        "hooks": [len(m._forward_hooks) for m in model.modules()],
        "checkpointing": model.is_gradient_checkpointing,
    }


@pytest.mark.parametrize("training", [True, False])
def test_the_users_model_is_left_as_it_is(training):
    run = vit_run()
    model = copy.deepcopy(run.model).train(training)
    model.zero_grad()
    model.vit.embeddings.requires_grad_(False)
    model.gradient_checkpointing_enable()
    model.classifier.register_forward_hook(lambda module, inputs, output: None)
    before = snapshot(model)
    attributor = Attributor(model, run.synset, disable_tqdm=True)
    attributor.attribute(run.queries, rows=run.train_dataset)
    attributor.attribute(run.queries, engine="replay", objective="accuracy")
    attributor.model_without([0])
    after = snapshot(model)
    assert before.pop("state").keys() == after["state"].keys()
    assert all(torch.equal(value, run.model.state_dict()[name]) for name, value in after.pop("state").items())
    assert before == after
    assert before["attention"] == "sdpa"


def test_flash_kernels_are_allowed_again_afterwards():
    functional = FunctionalModel(vit())
    with functional.differentiable():
        assert not torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), functional.differentiable():
        pass


def test_frozen_parameters_share_memory_and_trainable_ones_do_not():
    model = vit()
    model.vit.requires_grad_(False)
    functional = FunctionalModel(model)
    assert functional.space.names == ("classifier.weight", "classifier.bias")
    own = dict(functional.module.named_parameters())
    for name, parameter in model.named_parameters():
        assert (own[name].data_ptr() == parameter.data_ptr()) == name.startswith("vit.")
        assert not own[name].requires_grad


def test_frozen_bfloat16_parameters_stay_bfloat16_in_the_users_model():
    model = vit().to(torch.bfloat16)
    model.vit.requires_grad_(False)
    functional = FunctionalModel(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    plain = FunctionalModel(copy.deepcopy(model).float(), trainable_names=functional.space.names)
    ours, expected = (own.logits(own.parameters(), {"pixel_values": pixels()}) for own in (functional, plain))
    torch.testing.assert_close(ours, expected, atol=FLOAT_TOLERANCE, rtol=0)


def test_names_bring_back_what_requires_grad_lost():
    functional = FunctionalModel(vit(), trainable_names=("classifier.bias",))
    assert functional.num_parameters == 3
    frozen = vit().requires_grad_(False)
    assert FunctionalModel(frozen, trainable_names=("classifier.bias",)).num_parameters == 3


def test_computes_in_float32_after_mixed_precision_training(tmp_path):
    """A Trainer with `bf16=True` leaves its autocast wrapped around the forward."""
    trained = train(vit(), tiny_dataset(8, seed=0), tmp_path / "trajectory", bf16=True).model
    fresh = vit()
    fresh.load_state_dict(trained.state_dict())
    functional = FunctionalModel(trained)
    got = functional.logits(functional.parameters(), {"pixel_values": pixels()})
    assert functional.forward_arguments[0] == "pixel_values"
    torch.testing.assert_close(got, fresh.eval()(pixels()).logits, atol=FLOAT_TOLERANCE, rtol=1e-5)


def test_a_wrapper_around_the_forward_does_not_tie_copies_to_the_original():
    model = TinyNet()
    inner = model.forward
    model.forward = functools.wraps(inner)(lambda *args, **kwargs: inner(*args, **kwargs))
    functional = FunctionalModel(model)
    zeros = {name: torch.zeros_like(value) for name, value in functional.parameters().items()}
    features = {"features": torch.ones(2, 5)}
    assert not functional.logits(zeros, features).any()
    assert not functional.module_with(zeros, like=model)(**features).any()
    assert model(**features).any()


def test_hooks_of_gradient_checkpointing_do_not_hinder_functional_transforms():
    model = classifier("bert")
    # Transformers keeps the handle of the second hook only.
    model.enable_input_require_grads()
    model.enable_input_require_grads()
    functional, plain = FunctionalModel(model), FunctionalModel(classifier("bert"))
    ids = {"input_ids": torch.tensor([[3, 4, 5]])}
    got, expected = (
        torch.func.jacrev(lambda p, f=f: f.logits(p, ids))(f.parameters())["classifier.bias"]
        for f in (functional, plain)
    )
    assert torch.equal(got, expected)


def test_a_bfloat16_model_is_recorded_distilled_saved_and_attributed(tmp_path):
    run = distilled_run(vit().to(torch.bfloat16))
    scores = Attributor(run.model, run.synset, disable_tqdm=True).attribute(run.queries).scores
    run.model.save_pretrained(tmp_path / "model")
    run.synset.save_pretrained(tmp_path / "synset")
    loaded = type(run.model).from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert next(loaded.parameters()).dtype == torch.bfloat16
    again = Attributor(loaded, tmp_path / "synset", disable_tqdm=True)
    assert (again.attribute(run.queries).scores == scores).all()
    assert next(again.model_without([0]).parameters()).dtype == torch.bfloat16


def test_the_main_input_is_the_declared_one_that_the_forward_takes():
    class Undeclared(PreTrainedModel):
        config_class = TinyConfig

        def forward(self, labels=None, features=None, **more):
            return None

    class Anything(Undeclared):
        def forward(self, *args, **more):
            return None

    assert Undeclared.main_input_name == "input_ids"
    assert main_input_name(Undeclared(TinyConfig())) == "features"
    assert main_input_name(Anything(TinyConfig())) == "input_ids"
    assert main_input_name(TinyModel(TinyConfig())) == "pixel_values"
    assert main_input_name(TinyNet()) == "features"
    assert main_input_name(get_peft_model(classifier("bert"), LoraConfig(target_modules=["query"]))) == "input_ids"


def test_a_frozen_model_is_refused():
    with pytest.raises(ValueError, match="TinyNet.*requires_grad=True.*nothing was trained"):
        FunctionalModel(TinyNet().requires_grad_(False))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no parameter 'head' and 1 others that the recorded run trained"):
        FunctionalModel(TinyNet(), trainable_names=("head", "layers.0.weight", "tail"))


def test_an_output_without_logits_is_refused():
    class Odd(TinyNet):
        def forward(self, features):
            return [features]

    functional = FunctionalModel(Odd())
    with pytest.raises(TypeError, match="forward of Odd returned list.*with `logits`"):
        functional.logits(functional.parameters(), {"features": torch.zeros(1, 5)})


def test_a_dictionary_of_outputs_is_read():
    class Spoken(TinyNet):
        def forward(self, features):
            return {"loss": None, "logits": super().forward(features)}

    torch.manual_seed(0)
    functional, features = FunctionalModel(Spoken()), torch.ones(2, 5)
    found = functional.logits(functional.parameters(), {"features": features})
    torch.testing.assert_close(found, functional.module(features)["logits"])


def test_batch_normalisation_is_warned_of(caplog):
    FunctionalModel(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    assert "Sequential has batch normalisation" in caplog.text


def test_hash_depends_on_names_shapes_and_values_but_not_on_order_or_dtype():
    base = {"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(2, 2)}
    same = {"b": torch.zeros(2, 2, dtype=torch.bfloat16), "a": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    assert parameters_sha256(same) == parameters_sha256(base)
    for other in (
        {**base, "a": torch.tensor([1.0, 2.0 + 1e-6])},
        {**base, "b": torch.zeros(4)},
        {"a": base["a"], "c": base["b"]},
        {**base, "a": base["a"].flip(0)},
    ):
        assert parameters_sha256(other) != parameters_sha256(base)
    assert parameters_sha256({"b": torch.arange(6.0).reshape(2, 3).T}) == parameters_sha256(
        {"b": torch.arange(6.0).reshape(2, 3).T.contiguous()}
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_frozen_weights_in_16_bits_stay_so_and_compute_as_in_float32(kind):
    targets = {"llama": ["q_proj"], "gpt2": ["c_attn"]}[kind]
    config = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=targets, init_lora_weights=False)
    original = get_peft_model(language_model(kind).to(torch.bfloat16), config)
    ours, plain = FunctionalModel(original), FunctionalModel(copy.deepcopy(original).float())
    own = {parameter.data_ptr() for parameter in original.parameters()}
    in_16 = [parameter for parameter in ours.module.parameters() if parameter.dtype == torch.bfloat16]
    assert in_16 and all(parameter.data_ptr() in own for parameter in in_16)
    assert all(parameter.dtype == torch.float32 for parameter in ours.parameters().values())
    assert ours.frozen_sha256() == plain.frozen_sha256() == FunctionalModel(original).frozen_sha256()
    inputs = {"input_ids": torch.stack(list(texts(4, labels="text")["input_ids"]))}
    labels, directions = inputs["input_ids"], torch.randn(2, ours.num_parameters)

    def derivatives(model):
        parameters = model.parameters()
        embedded = model.embed(parameters, labels[:1]).detach().requires_grad_()
        with model.differentiable():
            gradients = grad(lambda p: model.logits(p, {"inputs_embeds": embedded}).square().sum())(parameters)
            energy = sum(gradient.square().sum() for gradient in gradients.values())
            return (
                model.logits(parameters, inputs),
                row_gradients(model, parameters, inputs, labels),
                row_derivatives(model, parameters, directions, inputs, labels),
                torch.autograd.grad(energy, embedded)[0],
            )

    for found, expected in zip(derivatives(ours), derivatives(plain), strict=True):
        assert found.dtype == torch.float32 and expected.abs().max() > 0
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert ours.has_forward_mode
