"""What is refused before training begins, and how a loss is reduced."""

import types

import pytest
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments

from hf_rgm.recording.callback import TrajectoryCallback
from hf_rgm.recording.description import check_supported, describe_run, fingerprint_columns, loss_reduction
from tests.recording.helpers import MeanModel, UpdateModel, dataset, make_trainer


def supported(kind=DistributedType.NO, **changes):
    defaults = {
        "deepspeed": None,
        "fsdp": None,
        "parallelism_config": None,
        "world_size": 1,
        "n_gpu": 0,
        "average_tokens_across_devices": True,
        "neftune_noise_alpha": None,
        "distributed_state": types.SimpleNamespace(distributed_type=kind),
    }
    return types.SimpleNamespace(**(defaults | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"deepspeed": "config.json"}, "DeepSpeed steps its optimizer inside the backward pass"),
        ({"fsdp": "full_shard"}, "fsdp='full_shard'"),
        ({"kind": DistributedType.FSDP}, "under FSDP1 is not supported.*whole model on every device, or with FSDP2"),
        ({"kind": DistributedType.MEGATRON_LM}, "under MEGATRON_LM is not supported.*whole model on every device"),
        ({"parallelism_config": object()}, "split over devices"),
        ({"n_gpu": 2}, "DataParallel on 2 GPUs.*CUDA_VISIBLE_DEVICES"),
        ({"packing": True, "packing_strategy": "bfd"}, "packing_strategy='bfd'.*flattens.*packing=False"),
        ({"packing": True, "packing_strategy": "wrapped", "padding_free": True}, "padding_free=True"),
    ],
)
def test_unsupported_set_ups_are_refused(changes, message):
    check_supported(supported(), MeanModel(), None)
    with pytest.raises(NotImplementedError, match=message):
        check_supported(supported(**changes), MeanModel(), None)


def test_rows_that_are_packed_but_not_flattened_are_supported():
    check_supported(supported(packing=True, packing_strategy="wrapped", padding_free=False), MeanModel(), None)


def test_several_processes_with_whole_models_are_supported():
    launched = {"kind": DistributedType.MULTI_GPU, "world_size": 4}
    check_supported(supported(**launched), UpdateModel(), None)
    apart = supported(**launched, average_tokens_across_devices=False)
    check_supported(apart, MeanModel(), None)
    with pytest.raises(NotImplementedError, match="each of the 4 processes divides its loss by its own number"):
        check_supported(apart, UpdateModel(), None)


def test_a_model_that_was_split_when_it_was_loaded_is_refused_unless_it_is_by_fsdp(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = fully_shard(MeanModel(), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(NotImplementedError, match="split over devices by other means than FSDP2"):
            check_supported(supported(), model, None)
        check_supported(supported(kind=DistributedType.FSDP, fsdp=True), model, None)
    finally:
        torch.distributed.destroy_process_group()


def test_tensor_parallel_model_is_refused():
    model = MeanModel()
    model.tp_size = 2
    with pytest.raises(NotImplementedError, match="split over devices"):
        check_supported(supported(), model, None)


def test_cycled_momentum_is_refused():
    optimizer = torch.optim.AdamW(MeanModel().parameters())
    fixed = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5, cycle_momentum=False)
    check_supported(supported(), MeanModel(), fixed)
    cycled = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5)
    with pytest.raises(NotImplementedError, match="OneCycleLR changes the momentum.*cycle_momentum=False"):
        check_supported(supported(), MeanModel(), cycled)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(dataset())


TOKENIZED = [row | {"input_ids": [1]} for row in dataset()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optim": "adafactor"}, "Adafactor; only torch's SGD, Adam and AdamW"),
        ({"optim": "rmsprop"}, "RMSprop; only torch's SGD, Adam and AdamW"),
        ({"accelerator_config": {"use_seedable_sampler": False}}, "RandomSampler.*use_seedable_sampler"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches"),
        ({"train_dataset": Stream(), "max_steps": 2}, r"is a stream"),
        ({"train_dataset": Dataset.from_list(dataset()).to_iterable_dataset(), "max_steps": 2}, "is a stream"),
        (
            {"train_sampling_strategy": "group_by_length", "train_dataset": TOKENIZED},
            "LengthGroupedSampler.*train_sampling_strategy",
        ),
        (
            {"train_sampling_strategy": "batch_rebalance", "train_dataset": TOKENIZED},
            "BatchRebalanceSampler.*train_sampling_strategy",
        ),
    ],
)
def test_refusals_come_before_the_first_step(tmp_path, arguments, message):
    model = MeanModel()
    trainer = make_trainer(tmp_path, model, TrajectoryCallback(tmp_path / "trajectory"), **arguments)
    with pytest.raises(NotImplementedError, match=message):
        trainer.train()
    assert model.seen == []
    assert not (tmp_path / "trajectory").exists()


def test_unoptimized_parameters_are_refused(tmp_path):
    model = MeanModel()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    callback = TrajectoryCallback(tmp_path / "trajectory")
    trainer = make_trainer(tmp_path, model, callback, optimizers=(optimizer, None))
    with pytest.raises(ValueError, match=r"are not given to the optimizer.*requires_grad_\(False\)"):
        trainer.train()


class Declared(MeanModel):
    accepts_loss_kwargs = True


class Denying(UpdateModel):
    accepts_loss_kwargs = False


class Wrapper(nn.Module):
    """Passes everything on, as PEFT models do, so that only the model inside tells."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def get_base_model(self):
        return self.inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (MeanModel(), "micro_batch"),
        (UpdateModel(), "update"),
        (Declared(), "update"),
        (Denying(), "micro_batch"),
        (Wrapper(MeanModel()), "micro_batch"),
        (Wrapper(UpdateModel()), "update"),
    ],
    ids=["mean", "update", "declared", "denied", "wrapped mean", "wrapped update"],
)
def test_loss_reduction(tmp_path, model, expected):
    assert loss_reduction(model) == expected
    if not isinstance(model, Wrapper):
        trainer = Trainer(model, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
        assert trainer.model_accepts_loss_kwargs == (expected == "update")


def test_columns_are_those_the_trainer_keeps(tmp_path):
    args = TrainingArguments(str(tmp_path), label_names=["target"], use_cpu=True)
    assert fingerprint_columns(args, UpdateModel()) == ["features", "label", "label_ids", "labels", "row", "target"]
    assert fingerprint_columns(args, Wrapper(MeanModel()))[0] == "features"


def test_pretrained_model_is_named(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertForSequenceClassification(BertConfig(vocab_size=10, **sizes)).save_pretrained(tmp_path / "bert")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "bert")
    run = describe_run(TrainingArguments(str(tmp_path), use_cpu=True), model, batch_size=4, sampler_seed=None)
    assert run["model"]["name_or_path"] == str(tmp_path / "bert")
    assert run["model"]["class"] == "BertForSequenceClassification"
    assert run["loss_reduction"] == "update"
