import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader, skip_first_batches
from accelerate.utils import DataLoaderConfiguration
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from hf_rgm.recording.batches import RowSchedule


def prepared(num_rows, batch_size, *, shuffle=True, seed=3, **arguments):
    """A dataloader as the Trainer's, whose batches are the rows themselves."""
    configuration = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed)
    accelerator = Accelerator(cpu=True, dataloader_config=configuration)
    return accelerator.prepare(DataLoader(range(num_rows), batch_size=batch_size, shuffle=shuffle, **arguments))


def real_epoch(dataloader, epoch, skip=0):
    """The batches that the Trainer's loop draws in an epoch, after skipping some."""
    loader = skip_first_batches(dataloader, skip) if skip else dataloader
    loader.set_epoch(epoch)
    return [batch.tolist() for batch in loader]


@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.integers(1, 40),
    batch_size=st.integers(1, 9),
    accumulation=st.integers(1, 4),
    seed=st.integers(0, 2**40),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
def test_schedule_is_what_the_dataloader_gives(num_rows, batch_size, accumulation, seed, shuffle, drop_last):
    if drop_last and num_rows < batch_size:
        return
    dataloader = prepared(num_rows, batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last)
    schedule = RowSchedule(dataloader, accumulation)
    assert schedule.seed == (seed if shuffle else None)
    for epoch in range(3):
        batches = real_epoch(dataloader, epoch)
        schedule.begin_epoch()
        updates = [schedule.next_update() for _ in range(schedule.updates_per_epoch)]
        assert [batch.tolist() for update in updates for batch in update] == batches
        assert all(len(update) == accumulation for update in updates[:-1])


def shared_loaders(num_processes, num_rows, batch_size, *, seed=3, shuffle=True, drop_last=False, **arguments):
    """The dataloaders of processes that train together, as Accelerate prepares them."""
    return [
        prepare_data_loader(
            DataLoader(range(num_rows), batch_size=batch_size, shuffle=shuffle, drop_last=drop_last),
            num_processes=num_processes,
            process_index=index,
            put_on_device=False,
            use_seedable_sampler=True,
            data_seed=seed,
            **arguments,
        )
        for index in range(num_processes)
    ]


@settings(max_examples=30, deadline=None)
@given(
    num_processes=st.integers(2, 4),
    num_rows=st.integers(1, 40),
    batch_size=st.integers(1, 5),
    accumulation=st.integers(1, 3),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    split_batches=st.booleans(),
)
def test_schedule_of_several_processes_is_what_their_dataloaders_give(
    num_processes, num_rows, batch_size, accumulation, shuffle, drop_last, split_batches
):
    size = batch_size * num_processes if split_batches else batch_size
    if drop_last and num_rows < batch_size * num_processes:
        return
    loaders = shared_loaders(
        num_processes, num_rows, size, shuffle=shuffle, drop_last=drop_last, split_batches=split_batches
    )
    schedule = RowSchedule(loaders[-1], accumulation)
    assert (schedule.num_processes, schedule.batch_size) == (num_processes, batch_size)
    for epoch in range(2):
        dealt = list(zip(*(real_epoch(loader, epoch) for loader in loaders), strict=True))
        schedule.begin_epoch()
        updates = [schedule.next_update() for _ in range(schedule.updates_per_epoch)]
        assert [batch.tolist() for update in updates for batch in update] == [b for batches in dealt for b in batches]
        assert all(len(update) == accumulation * num_processes for update in updates[:-1])
        assert {row for update in updates for batch in update for row in batch.tolist()} == set(range(num_rows)) or (
            drop_last
        )


def test_schedule_of_several_processes_resumes_in_mid_epoch():
    loaders = shared_loaders(2, 23, 3)
    schedule = RowSchedule(loaders[0], 1, global_step=6)
    dealt = [real_epoch(loader, 1, skip=2) for loader in loaders]
    schedule.begin_epoch()
    assert [[batch.tolist() for batch in schedule.next_update()] for _ in range(2)] == [
        [first, second] for first, second in zip(*dealt, strict=True)
    ]


def test_uneven_batches_are_recorded_where_every_process_has_as_many():
    loaders = shared_loaders(2, 22, 3, even_batches=False)
    schedule = RowSchedule(loaders[0], 1)
    schedule.begin_epoch()
    updates = [schedule.next_update() for _ in range(4)]
    assert [[len(batch) for batch in update] for update in updates] == [[3, 3]] * 3 + [[3, 1]]
    with pytest.raises(NotImplementedError, match=r"2 processes get \[4, 3\] batches.*even_batches.*drop_last"):
        RowSchedule(shared_loaders(2, 21, 3, even_batches=False)[0], 1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_schedule_holds_while_the_dataloader_is_ahead(num_workers):
    dataloader = prepared(10, 4, num_workers=num_workers)
    schedule = RowSchedule(dataloader, 1)
    for epoch in range(2):
        dataloader.set_epoch(epoch)
        schedule.begin_epoch()
        for batch in dataloader:
            assert schedule.next_update()[0].tolist() == batch.tolist()


@pytest.mark.parametrize("global_step", [3, 4, 5, 8])
def test_schedule_resumes(global_step):
    # 23 rows make 6 batches, so 3 updates of 2 batches in an epoch.
    epoch, update = divmod(global_step, 3)
    dataloader = prepared(23, 4)
    schedule = RowSchedule(dataloader, 2, global_step=global_step)
    assert schedule.mid_epoch == (update > 0)
    batches = real_epoch(dataloader, epoch, skip=2 * update)
    schedule.begin_epoch()
    updates = [schedule.next_update() for _ in range(3 - update)]
    assert [batch.tolist() for update in updates for batch in update] == batches
    assert not schedule.mid_epoch
    following = real_epoch(dataloader, epoch + 1)
    schedule.begin_epoch()
    assert [batch.tolist() for batch in schedule.next_update()] == following[:2]


@pytest.mark.parametrize("replacement", [False, True])
def test_sampler_with_replacement_or_more_samples_than_rows(replacement):
    sampler = RandomSampler(range(10), replacement=replacement, num_samples=43)
    configuration = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=5)
    accelerator = Accelerator(cpu=True, dataloader_config=configuration)
    dataloader = accelerator.prepare(DataLoader(range(10), batch_size=4, sampler=sampler))
    schedule = RowSchedule(dataloader, 1)
    batches = real_epoch(dataloader, 0)
    schedule.begin_epoch()
    assert [schedule.next_update()[0].tolist() for _ in range(11)] == batches


def test_schedule_leaves_sampler_and_random_state_alone():
    dataloader = prepared(9, 2)
    sampler = dataloader.get_sampler()
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    schedule = RowSchedule(dataloader, 1)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        generator_before = sampler.generator
        schedule.begin_epoch()
        schedule.next_update()
        assert sampler.epoch == epoch
        assert sampler.generator is generator_before
    assert random.getstate() == state[0]
    assert np.random.get_state()[1].tolist() == state[1]
    assert torch.equal(torch.get_rng_state(), state[2])


def test_moved_sampler_is_noticed():
    dataloader = prepared(9, 2)
    schedule = RowSchedule(dataloader, 1)
    schedule.begin_epoch()
    dataloader.set_epoch(5)
    with pytest.raises(RuntimeError, match="sampler is at epoch 5, the Trainer at epoch 0"):
        schedule.next_update()


def test_epoch_ends():
    schedule = RowSchedule(prepared(9, 2), 5)
    schedule.begin_epoch()
    schedule.next_update()
    with pytest.raises(RuntimeError, match="5 batches, all of which have been used"):
        schedule.next_update()


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(range(4))


def rebalanced():
    from transformers.trainer_pt_utils import LengthGroupedSampler

    return DataLoader(range(4), batch_size=2, sampler=LengthGroupedSampler(2, lengths=[1, 2, 3, 4]))


def dispatched():
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=True))
    return accelerator.prepare(DataLoader(range(4), batch_size=2))


class OddBatches(BatchSampler):
    pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataLoader(range(4), shuffle=True), 'Got a RandomSampler.*"use_seedable_sampler": True'),
        (rebalanced, "Got a LengthGroupedSampler.*train_sampling_strategy"),
        (lambda: DataLoader(Stream()), r"is a stream \(Stream\).*map-style"),
        (dispatched, '"dispatch_batches": False'),
        (lambda: DataLoader(range(4), batch_size=None), "no batch sampler"),
        (lambda: DataLoader(range(4), batch_sampler=OddBatches(range(4), 2, False)), "Got a OddBatches"),
        (lambda: DataLoader(range(4), sampler=SeedableRandomSampler(range(4))), "no `set_epoch`"),
        (lambda: DataLoader(range(4), num_workers=1, in_order=False), "dataloader_in_order=False"),
        (lambda: [[0, 1], [2, 3]], "is of type list"),
    ],
)
def test_unknowable_orders_are_refused(make, message):
    with pytest.raises(NotImplementedError, match=message):
        RowSchedule(make(), 1)
