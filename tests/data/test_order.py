"""Groups stay whole, on every process, in every iteration, and after a resume."""

import itertools
from collections import Counter

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader, skip_first_batches
from datasets import Dataset
from torch.utils.data import BatchSampler, DataLoader
from transformers import TrainerControl, TrainerState, TrainingArguments
from trl.trainer.utils import RepeatSampler

from trl_grpo_ext.data import EpochOrder, GroupOrder, repeat_stream

# batch size, generations, steps per generation, iterations, processes: what TRL allows has whole groups in a generation
SETTINGS = [
    {"batch_size": 6, "num_generations": 3, "steps_per_generation": 1, "num_iterations": 1},
    {"batch_size": 2, "num_generations": 4, "steps_per_generation": 6, "num_iterations": 2},
    {"batch_size": 4, "num_generations": 2, "steps_per_generation": 3, "num_iterations": 3},
    {"batch_size": 1, "num_generations": 5, "steps_per_generation": 5, "num_iterations": 1},
    {"batch_size": 3, "num_generations": 2, "steps_per_generation": 2, "num_iterations": 2},
]


def micro_batches(order, batch_size, world_size, rank):
    """What accelerate's own sharding deals to a process."""
    batches = BatchSampler(order, batch_size=batch_size, drop_last=False)
    return list(BatchSamplerShard(batches, num_processes=world_size, process_index=rank))


def test_the_order_by_hand():
    order = GroupOrder(
        range(5), num_generations=2, batch_size=4, steps_per_generation=2, num_iterations=2, shuffle=False
    )
    # 4 * 2 / 2 = 4 prompts a generation, each twice, the whole twice; the fifth prompt is too few
    assert list(order) == [0, 0, 1, 1, 2, 2, 3, 3] * 2
    # Two processes: prompts 0 and 1 are the first's, 2 and 3 the second's; micro-batches of 2 rows take turns
    order = GroupOrder(range(5), num_generations=2, batch_size=2, steps_per_generation=2, world_size=2, shuffle=False)
    assert list(order) == [0, 0, 2, 2, 1, 1, 3, 3]


@pytest.mark.parametrize("size", [1, 7, 12, 61])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("shuffle", [False, True])
def test_on_one_process_it_is_trl_s_order(size, settings, shuffle):
    order = GroupOrder(range(size), **settings, shuffle=shuffle, seed=3)
    rows = settings["batch_size"] * settings["steps_per_generation"]
    theirs = RepeatSampler(
        range(size),
        mini_repeat_count=settings["num_generations"],
        batch_size=rows // settings["num_generations"],
        repeat_count=settings["num_iterations"],  # GRPOTrainer multiplies it by the steps and repeats whole batches
        shuffle=shuffle,
        seed=3,
    )
    assert len(order) == len(theirs)
    assert list(order) == list(theirs)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_process_reads_whole_groups_in_every_iteration(world_size, settings, shuffle):
    size = 71
    order = GroupOrder(range(size), **settings, world_size=world_size, shuffle=shuffle, seed=1)
    indices = list(order)
    assert len(indices) == len(order)
    steps, iterations = settings["steps_per_generation"], settings["num_iterations"]
    dealt = [micro_batches(indices, settings["batch_size"], world_size, rank) for rank in range(world_size)]
    assert len({len(batches) for batches in dealt}) == 1
    cycle = steps * iterations
    assert len(dealt[0]) % cycle == 0
    seen = Counter()
    for start in range(0, len(dealt[0]), cycle):
        generation = []
        for batches in dealt:
            passes = [
                [i for batch in batches[begin : begin + steps] for i in batch]
                for begin in range(start, start + cycle, steps)
            ]
            assert all(rows == passes[0] for rows in passes)  # every iteration repeats the first
            groups = [key for key, _ in itertools.groupby(passes[0])]
            assert passes[0] == [i for i in groups for _ in range(settings["num_generations"])]
            generation += groups
        assert len(set(generation)) == len(generation)  # no prompt on two processes
        seen.update(generation)
    assert set(seen.values()) == {1}
    prompts = settings["batch_size"] * steps * world_size // settings["num_generations"]
    assert len(seen) == size // prompts * prompts


def test_processes_together_train_on_the_prompts_of_one():
    """Two processes of half the batch take the same prompts per generation as one of the whole."""
    one = GroupOrder(range(50), num_generations=2, batch_size=8, steps_per_generation=3, seed=5)
    two = GroupOrder(range(50), num_generations=2, batch_size=4, steps_per_generation=3, world_size=2, seed=5)
    a, b = list(one), list(two)
    assert len(a) == len(b) == 48 * 2
    for start in range(0, len(a), 24):
        assert Counter(a[start : start + 24]) == Counter(b[start : start + 24])


def test_every_epoch_has_its_order_and_can_be_entered_anywhere():
    def make(**overrides):
        settings = {"num_generations": 2, "batch_size": 2, "steps_per_generation": 1, "seed": 7} | overrides
        return GroupOrder(range(20), **settings)

    through = make()
    epochs = []
    for epoch in range(3):
        through.set_epoch(epoch)
        epochs.append(list(through))
    assert len({tuple(order) for order in epochs}) == 3
    assert all(Counter(order) == Counter(epochs[0]) for order in epochs)
    resumed = make()
    resumed.set_epoch(2)
    assert list(resumed) == epochs[2]
    assert list(resumed) == epochs[2]  # twice in the same epoch
    assert list(make(seed=8)) != epochs[0]
    assert list(make(seed=7)) == epochs[0]
    fixed = make(shuffle=False)
    fixed.set_epoch(1)
    assert list(fixed) == [i for i in range(20) for _ in range(2)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resumed_epoch_has_its_order_on_every_process(world_size, tmp_path):
    """Through what accelerate makes of the sampler: 12 prompts twice are 6 micro-batches of 4, of which 2 are done."""
    settings = {"num_generations": 2, "batch_size": 4, "steps_per_generation": 1, "world_size": world_size, "seed": 7}
    order = GroupOrder(range(12), **settings)
    order.set_epoch(3)
    expected = [i for start in range(0, 24, 4 * world_size) for i in list(order)[start : start + 4]]
    fresh = GroupOrder(range(12), **settings)
    loader = DataLoader(list(range(12)), batch_size=4, sampler=fresh, collate_fn=list)
    prepared = prepare_data_loader(loader, num_processes=world_size, process_index=0, put_on_device=False)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    state = TrainerState(epoch=3 + 2 / (6 // world_size))
    EpochOrder().on_epoch_begin(args, state, TrainerControl(), train_dataloader=prepared)
    resumed = skip_first_batches(prepared, 2)
    resumed.set_epoch(3)  # as transformers does, which is enough on one process
    assert [i for batch in resumed for i in batch] == expected[8:]


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    list(GroupOrder(range(20), num_generations=2, batch_size=2, steps_per_generation=1))
    assert torch.equal(torch.get_rng_state(), state)


def test_too_few_prompts_for_one_generation_are_none():
    order = GroupOrder(range(3), num_generations=2, batch_size=8, steps_per_generation=1)
    assert len(order) == 0
    assert list(order) == []


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_stream_is_repeated_in_the_same_order(world_size, settings):
    size = 71
    rows = Dataset.from_dict({"prompt": [f"p{i}" for i in range(size)], "answer": list(range(size))})
    stream = repeat_stream(rows.to_iterable_dataset(), **settings, world_size=world_size, shuffle=False, seed=0)
    found = list(stream)
    order = list(GroupOrder(range(size), **settings, world_size=world_size, shuffle=False))
    assert [row["answer"] for row in found] == order
    assert [row["prompt"] for row in found] == [f"p{i}" for i in order]


def test_a_shuffled_stream_keeps_its_groups_and_changes_with_seed_and_epoch():
    rows = Dataset.from_dict({"prompt": [f"p{i}" for i in range(40)]})

    def read(seed, epoch=0):
        stream = repeat_stream(
            rows.to_iterable_dataset(),
            num_generations=2,
            batch_size=4,
            steps_per_generation=1,
            num_iterations=1,
            world_size=1,
            shuffle=True,
            seed=seed,
        )
        stream.set_epoch(epoch)
        return [row["prompt"] for row in stream]

    first = read(0)
    assert sorted(first) == sorted(f"p{i}" for i in range(40) for _ in range(2))
    assert first[::2] == first[1::2]
    assert first[::2] != [f"p{i}" for i in range(40)]
    assert read(0) == first
    assert read(1) != first
    assert read(0, epoch=1) != first
