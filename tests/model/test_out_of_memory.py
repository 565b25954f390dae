import numpy as np
import pytest
import torch

from hf_rgm import Attributor, Objective, ReverseGradientMatchingDistiller
from hf_rgm.model.out_of_memory import advice_on_memory
from hf_rgm.testing import tiny_recorded_run, tiny_synset

HUGE = 2**58


@pytest.mark.parametrize(
    ("allocate", "told"),
    [
        (lambda: torch.empty(HUGE, dtype=torch.uint8), "can't allocate memory"),
        (lambda: np.empty(HUGE, np.uint8), "Unable to allocate 256. PiB"),
        (lambda: bytes(HUGE), "MemoryError"),
    ],
    ids=["torch", "numpy", "python"],
)
def test_a_failed_allocation_names_the_setting(allocate, told):
    with pytest.raises(MemoryError, match=rf"^Distilling ran out of memory \(.*{told}.*\)\. Lower `max_memory`\.$"):
        with advice_on_memory("Distilling", "Lower `max_memory`."):
            allocate()


def test_a_device_that_is_full_names_the_setting():
    @advice_on_memory("Scoring", "Lower `max_memory`.")
    def score():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has a total of 8 GiB.")

    for _ in range(2):
        with pytest.raises(MemoryError, match=r"Scoring ran out of memory \(CUDA out of .* 2 GiB\). Lower") as raised:
            score()
        assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)


def test_other_errors_pass():
    for error in (RuntimeError("shapes differ"), ValueError("out of memory."), KeyboardInterrupt()):
        with pytest.raises(type(error)) as raised, advice_on_memory("Scoring", "Lower `max_memory`."):
            raise error
        assert raised.value is error


def test_distilling_and_attributing_name_their_settings(monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    run = tiny_recorded_run()
    distiller = ReverseGradientMatchingDistiller(
        run.model, run.trajectory, run.train_dataset, run.clusters, disable_tqdm=True
    )
    attributor = Attributor(run.model, tiny_synset(), disable_tqdm=True)
    monkeypatch.setattr("hf_rgm.distillation.distiller.cluster_gradients", full)
    with pytest.raises(MemoryError, match=r"^Distilling ran out of memory.*DistillationConfig\(max_memory=...\)"):
        distiller.distill()
    with pytest.raises(MemoryError, match=r"^Attributing ran out of memory.*Attributor\(max_memory=...\)"):
        attributor.attribute(run.queries, objective=Objective("mine", full))
