"""Which prompts every micro-step trains on, against a simulation that spells it out."""

import itertools

import pytest

from trl_grpo_ext.data import GenerationFeed, Take

CASES = list(itertools.product([1, 2, 3, 4, 6], [1, 2, 3, 4, 6], [1, 2, 3]))  # accumulation, steps, iterations


def epoch(number, generations, steps, iterations):
    """The micro-batches of an epoch as `GroupOrder` makes them: one row each, named after generation and slice."""
    return [
        [{"row": (number, generation, piece)}]
        for generation in range(generations)
        for _ in range(iterations)
        for piece in range(steps)
    ]


def expected_use(number, generations, steps, iterations):
    """What each micro-step of that epoch must train on: (generation's rows, slice)."""
    return [
        ([(number, generation, piece) for piece in range(steps)], piece)
        for generation in range(generations)
        for _ in range(iterations)
        for piece in range(steps)
    ]


class Consumer:
    """Uses takes as the trainer does, holding the latest generation, and notes what every micro-step used."""

    def __init__(self):
        self.generation = None
        self.used = []
        self.drawn = 0

    def step(self, takes):
        for take in takes:
            if take.new_rows is not None:
                self.generation = [row["row"] for row in take.new_rows]
                self.drawn += 1
            self.used += [(self.generation, piece) for piece in take.slices]
        return sum(len(take.slices) for take in takes)


def optimizer_steps(num_micro_steps, accumulation):
    """Micro-steps of each optimizer step of an epoch, the last one shorter if need be, as the Trainer asks for them."""
    full, rest = divmod(num_micro_steps, accumulation)
    return [accumulation] * full + ([rest] if rest else [])


@pytest.mark.parametrize(("accumulation", "steps", "iterations"), CASES)
def test_every_micro_step_uses_its_generation(accumulation, steps, iterations):
    generations = 5
    feed, consumer = GenerationFeed(steps, iterations), Consumer()
    expected = []
    for number in range(2):
        batches = epoch(number, generations, steps, iterations)
        iterator = iter(batches)
        for count in optimizer_steps(len(batches), accumulation):
            assert consumer.step(feed.take(iterator, count)) == count
        assert next(iterator, None) is None
        assert feed.take(iterator, accumulation) == []
        expected += expected_use(number, generations, steps, iterations)
    assert consumer.used == expected
    assert consumer.drawn == 2 * generations


@pytest.mark.parametrize(("accumulation", "steps", "iterations"), CASES)
def test_resuming_anywhere_goes_on_as_without_the_interruption(accumulation, steps, iterations):
    generations = 4
    batches = epoch(0, generations, steps, iterations)
    counts = optimizer_steps(len(batches), accumulation)
    through = Consumer()
    iterator, feed = iter(batches), GenerationFeed(steps, iterations)
    saved = []  # after every optimizer step: position, latest generation, how much was used
    for count in counts:
        through.step(feed.take(iterator, count))
        saved.append((feed.position, through.generation, len(through.used)))
    for done, (position, generation, used) in enumerate(saved[:-1], start=1):
        resumed, feed = Consumer(), GenerationFeed(steps, iterations)
        resumed.generation = generation
        feed.resume(position)
        iterator = iter(batches[done * accumulation :])  # the Trainer skips what the done steps had read, one per step
        for count in counts[done:]:
            assert resumed.step(feed.take(iterator, count)) == count
        assert resumed.used == through.used[used:]
        # and the next epoch begins with a generation of its own
        second = iter(epoch(1, 1, steps, iterations))
        resumed.used = []
        resumed.step(feed.take(second, min(accumulation, steps * iterations)))
        assert resumed.used[0] == expected_use(1, 1, steps, iterations)[0]


def test_takes_by_hand():
    # 2 micro-batches a generation, used twice: a cycle of 4 micro-steps; optimizer steps of 3
    feed = GenerationFeed(2, 2)
    a, b, c, d = ({"row": name} for name in "abcd")
    iterator = iter([[a], [b], [a], [b], [c], [d], [c], [d]])
    assert feed.take(iterator, 3) == [Take([a, b], range(0, 2)), Take(None, range(0, 1))]
    assert feed.position == 3
    # The last micro-step of the first cycle, then the next generation
    assert feed.take(iterator, 3) == [Take(None, range(1, 2)), Take([c, d], range(0, 2))]
    assert feed.take(iterator, 3) == [Take(None, range(0, 2))]  # the iterator ends
    assert feed.position == 0


def test_reading_ahead_where_the_optimizer_step_is_shorter():
    feed = GenerationFeed(4, 1)
    rows = [[{"row": i}] for i in range(8)]
    iterator = iter(rows)
    assert feed.take(iterator, 1) == [Take([row for batch in rows[:4] for row in batch], range(0, 1))]
    assert next(iterator) == rows[4]  # four were read


def test_a_generation_that_cannot_be_filled_is_not_begun():
    feed = GenerationFeed(3, 1)
    iterator = iter([[{"row": 0}], [{"row": 1}]])
    assert feed.take(iterator, 3) == []
    assert feed.position == 0


def test_a_new_epoch_ends_a_cycle_that_was_cut_short():
    """As `max_steps` or an early end leaves it: the new iterator stands at a generation's first row."""
    feed = GenerationFeed(2, 1)
    feed.take(iter([[{"row": 0}], [{"row": 1}]]), 1)
    assert feed.position == 1
    (take,) = feed.take(iter([[{"row": 2}], [{"row": 3}]]), 1)
    assert take == Take([{"row": 2}, {"row": 3}], range(0, 1))


def test_resuming_between_cycles_skips_nothing():
    feed = GenerationFeed(2, 1)
    feed.resume(0)
    (take,) = feed.take(iter([[{"row": 2}], [{"row": 3}]]), 2)
    assert take == Take([{"row": 2}, {"row": 3}], range(0, 2))
