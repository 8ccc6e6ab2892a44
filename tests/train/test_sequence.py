"""The sequence of global batches: the same for any processes, workers, micro-batches and resumes,
with one data set and with several, with and without pairs.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.conftest import Mixed
from tests.train.helpers import Parts, assert_same_rows, sources
from train.batch_maker import BatchMaker
from train.batches import plan_batches
from train.buckets import Buckets, bucket_sizes
from train.data import TrainBatch, unpacked
from train.loader import micro_batches
from train.mixture import Mixture


class Names:
    """Makes micro-batches that are lists of [sample, its reference], without reading them."""

    def __init__(self, mixture: Mixture, seed: int, buckets: Buckets | None = None) -> None:
        self._order = mixture.order(seed, buckets)
        self._pairs = mixture.pairs(self._order)

    def __call__(self, positions: range) -> tuple[int, list[list[int]]]:
        numbers = [[self._order.sample(p), self._pairs.reference(p)] for p in positions]
        return positions.start, numbers


class Stretch(NamedTuple):
    """Some steps between a start and a stop. micro: most samples of a micro-batch. ahead:
    micro-batches that are read ahead, which a stop loses.
    """

    steps: int
    world: int
    workers: int
    micro: int
    ahead: int = 0


def stretches(size: int, workers: st.SearchStrategy[int]) -> st.SearchStrategy[Stretch]:
    worlds = st.sampled_from([n for n in range(1, size + 1) if size % n == 0])
    micro, ahead = st.integers(1, size), st.integers(0, 3)
    return st.builds(Stretch, st.integers(1, 5), worlds, workers, micro, ahead)


def global_batches(
    samples: Mixture,
    seed: int,
    size: int,
    parts: list[Stretch],
    start: int = 0,
    buckets: Buckets | None = None,
) -> list[list[list[int]]]:
    """Returns the samples of each step of a run that was stopped after each stretch, and continued
    by other processes. start: position of the first.
    """
    batches = []
    for steps, world, workers, most, ahead in parts:
        plan = plan_batches(size, most, world)
        ranks = [
            micro_batches(
                Names(samples, seed, buckets),
                start=start,
                size=plan.micro,
                rank=rank,
                world=world,
                workers=workers,
                ahead=ahead,
            )
            for rank in range(world)
        ]
        for _ in range(steps):
            # in the order of positions: the sum over a step doesn't depend on it
            micro = sorted(next(rank) for rank in ranks for _ in range(plan.accumulation))
            batches.append([names for _, part in micro for names in part])
            start += size
    return batches


@pytest.fixture(scope="module", params=["one", "pairs", "mixture", "mixture of pairs"])
def samples(request: pytest.FixtureRequest, mixed: Mixed, data: Path) -> Mixture:
    return {
        "one": lambda: Mixture(sources(data)),
        "pairs": lambda: Mixture(mixed.sources[:1], pair_prob=0.5),
        "mixture": lambda: Mixture(mixed.sources[:2]),
        "mixture of pairs": lambda: Mixture(mixed.sources, pair_prob=0.5),
    }[request.param]()


@given(
    data=st.data(),
    size=st.integers(1, 8),
    seed=st.integers(0, 2**40),
    first=st.sampled_from([0, 1, 9_980]),  # a mixture is shuffled in blocks of 10,000
)
@settings(max_examples=12, deadline=None)
def test_the_sequence_is_that_of_one_process_however_often_it_is_resumed(
    samples: Mixture, data: st.DataObject, size: int, seed: int, first: int
) -> None:
    make = Names(samples, seed)
    parts = data.draw(st.lists(stretches(size, st.just(0)), min_size=1, max_size=4))
    steps = sum(part.steps for part in parts)
    starts = range(first, first + steps * size, size)
    undisturbed = [make(range(start, start + size))[1] for start in starts]
    assert global_batches(samples, seed, size, parts, first) == undisturbed


def test_worker_processes_change_nothing(mixed: Mixed) -> None:
    samples = Mixture(mixed.sources, pair_prob=0.5)
    undisturbed = global_batches(samples, 3, 6, [Stretch(9, 1, 0, 6)])
    parts = [Stretch(3, 2, 2, 2, 3), Stretch(2, 1, 2, 4), Stretch(4, 3, 1, 1, 1)]
    assert global_batches(samples, 3, 6, parts) == undisturbed


@given(data=st.data(), seed=st.integers(0, 2**40), first=st.sampled_from([0, 2, 9_980]))
@settings(max_examples=12, deadline=None)
def test_with_buckets_too(shaped: Path, data: st.DataObject, seed: int, first: int) -> None:
    samples = Mixture(sources(shaped))
    buckets = samples.buckets(bucket_sizes(32, 8), 2)
    make = Names(samples, seed, buckets)
    parts = data.draw(st.lists(stretches(2, st.just(0)), min_size=1, max_size=4))
    starts = range(first, first + 2 * sum(part.steps for part in parts), 2)
    undisturbed = [make(range(start, start + 2))[1] for start in starts]
    assert global_batches(samples, seed, 2, parts, first, buckets) == undisturbed
    for step in undisturbed:
        assert len({buckets.size(number) for number, _ in step}) == 1


@pytest.mark.parametrize("pair_prob", [0.0, 0.6])
def test_the_tensors_don_t_depend_on_processes_workers_and_micro_batches(
    mixed: Mixed, parts: Parts, pair_prob: float
) -> None:
    mixture = Mixture(mixed.sources, pair_prob=pair_prob)
    maker = BatchMaker(mixture, mixture.order(3), replace(parts.preparation, cache_size=5))

    def batches(start: int, size: int, rank: int, world: int, workers: int) -> list[TrainBatch]:
        source = micro_batches(
            maker.fetch,
            maker.make,
            start=start,
            size=size,
            rank=rank,
            world=world,
            workers=workers,
            ahead=workers,
        )
        return [unpacked(next(source), parts.preparation, "cpu") for _ in range(2)]

    [whole, _] = batches(6, 8, 0, 1, 0)
    by_rank = [batches(6, 2, rank, 2, workers) for rank, workers in ((0, 2), (1, 0))]
    assert_same_rows(whole, *(by_rank[rank][step] for step in (0, 1) for rank in (0, 1)))
