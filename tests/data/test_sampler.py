"""The order is a function of (seed, epoch); ranks share it without loss or padding."""

import pytest

from alexlab.data.sampler import EvalBatchSampler, TrainBatchSampler


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_together_see_the_global_batches(world_size: int) -> None:
    alone = TrainBatchSampler(103, 8, seed=1)
    ranks = [TrainBatchSampler(103, 8, 1, rank, world_size) for rank in range(world_size)]
    for sampler in (alone, *ranks):
        sampler.set_epoch(5)
    for batch, *parts in zip(alone, *ranks, strict=True):
        assert batch == [key for part in parts for key in part]
        assert {epoch for _, epoch in batch} == {5}
    assert len(alone) == 103 // 8


def test_epochs_and_seeds_have_different_orders_that_repeat() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = TrainBatchSampler(50, 10, seed)
        sampler.set_epoch(epoch)
        return [i for batch in sampler for i, _ in batch]

    assert sorted(order(0, 0)) == list(range(50))
    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(s, e)) for s in range(3) for e in range(3)}) == 9


def test_a_resumed_epoch_starts_at_its_batch_and_the_next_epoch_is_complete() -> None:
    whole, late = TrainBatchSampler(60, 7, 3), TrainBatchSampler(60, 7, 3)
    late.resume_at = (4, 5)
    for epoch, first in ((4, 5), (5, 0)):
        whole.set_epoch(epoch)
        late.set_epoch(epoch)
        assert list(late) == list(whole)[first:]


@pytest.mark.parametrize("seed", [None, 3])
def test_evaluation_counts_each_image_once(seed: int | None) -> None:
    for size in (1, 2, 5, 16, 17, 31):
        for world_size in (1, 2, 3, 8):
            ranks = [EvalBatchSampler(size, 4, [rank], world_size, seed) for rank in range(world_size)]
            assert {len(list(rank)) for rank in ranks} == {len(ranks[0])}, "a rank with fewer makes the others wait"
            alone = EvalBatchSampler(size, 4, range(world_size), world_size, seed)
            assert list(alone) == [batch for rank in ranks for batch in rank]
            assert sorted(i for batch in alone for i, _ in batch) == list(range(size))
            assert len(alone) == world_size * len(ranks[0])


def test_the_first_batch_of_a_limited_evaluation_mixes_the_classes() -> None:
    first = next(iter(EvalBatchSampler(1000, 64, seed=0)))
    assert max(i for i, _ in first) > 500
    assert first == next(iter(EvalBatchSampler(1000, 64, seed=0)))
