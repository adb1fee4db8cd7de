"""Order is a function of (seed, epoch); ranks share it out without loss or padding."""

import pytest

from alexlab.data.sampler import EvalBatches, TrainBatches


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_together_see_the_global_batches(world_size: int) -> None:
    alone = TrainBatches(103, 8, seed=1)
    ranks = [TrainBatches(103, 8, 1, rank, world_size) for rank in range(world_size)]
    for sampler in (alone, *ranks):
        sampler.set_epoch(5)
    for batch, *shares in zip(alone, *ranks, strict=True):
        assert batch == [item for share in shares for item in share]
        assert {epoch for _, epoch in batch} == {5}
    assert len(alone) == 103 // 8


def test_epochs_and_seeds_differ_and_repeat() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = TrainBatches(50, 10, seed)
        sampler.set_epoch(epoch)
        return [i for batch in sampler for i, _ in batch]

    assert sorted(order(0, 0)) == list(range(50))
    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(s, e)) for s in range(3) for e in range(3)}) == 9


@pytest.mark.parametrize("size", [1, 2, 5, 16, 17, 31])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", [None, 3])
def test_evaluation_counts_each_image_once(size: int, world_size: int, seed: int | None) -> None:
    ranks = [EvalBatches(size, 4, rank, world_size, seed) for rank in range(world_size)]
    assert len({len(list(rank)) for rank in ranks}) == 1, "a rank with fewer batches would leave the others waiting"
    assert sorted(i for rank in ranks for batch in rank for i, _ in batch) == list(range(size))
    assert all(len(list(rank)) == len(rank) for rank in ranks)


def test_a_part_of_an_evaluation_is_not_the_first_images_alone() -> None:
    first = next(iter(EvalBatches(1000, 64, seed=0)))
    assert max(i for i, _ in first) > 500
    assert first == next(iter(EvalBatches(1000, 64, seed=0)))
