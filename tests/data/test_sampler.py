"""The order is a function of (seed, epoch); ranks share it without loss or padding."""

from collections import Counter

import numpy as np
import pytest
from test_splits import table

from alexlab.data.sampler import EvalBatchSampler, TrainBatchSampler, sampling_weights
from alexlab.engine.errors import UserError

RARE = [0] * 90 + [1] * 10 + [2] * 3  # the classes of 103 images
WEIGHTS = {
    "shuffle": None,
    "balanced": sampling_weights("balanced", table(RARE)),
    "weighted": sampling_weights("weighted", table(RARE, weights=np.arange(103) % 7)),
}


@pytest.mark.parametrize("sampler", list(WEIGHTS))
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_together_see_the_global_batches(world_size: int, sampler: str) -> None:
    alone = TrainBatchSampler(103, 8, seed=1, weights=WEIGHTS[sampler])
    ranks = [TrainBatchSampler(103, 8, 1, rank, world_size, WEIGHTS[sampler]) for rank in range(world_size)]
    for each in (alone, *ranks):
        each.set_epoch(5)
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


@pytest.mark.parametrize("sampler", list(WEIGHTS))
def test_a_resumed_epoch_starts_at_its_batch_and_the_next_epoch_is_complete(sampler: str) -> None:
    whole, late = (TrainBatchSampler(103, 7, 3, weights=WEIGHTS[sampler]) for _ in range(2))
    late.resume_at = (4, 5)
    for epoch, first in ((4, 5), (5, 0)):
        whole.set_epoch(epoch)
        late.set_epoch(epoch)
        assert list(late) == list(whole)[first:]


# -- classes and weights


def draws_of(sampler: str, epoch: int, seed: int = 0) -> list[int]:
    """Return the draws of an epoch of 103 batches of one image."""
    made = TrainBatchSampler(103, 1, seed, weights=WEIGHTS[sampler])
    return [draw for batch in made.batches(epoch) for draw, _ in batch]


def test_shuffle_is_numpys_permutation() -> None:
    expected = np.random.Generator(np.random.PCG64([3, 4])).permutation(103).tolist()
    assert draws_of("shuffle", 4, seed=3) == expected


def test_balanced_draws_each_class_equally_often() -> None:
    """An epoch has 103 draws: 34.3 of each class, so 3.4 of an image of the second and 11.4 of the third."""
    images = [Counter(draw % 103 for draw in draws_of("balanced", epoch)) for epoch in range(200)]
    for epoch in images:
        assert sum(epoch.values()) == 103
        assert {epoch[i] for i in range(90)} <= {0, 1}, "0.38 of each"
        assert {epoch[i] for i in range(90, 100)} <= {3, 4}
        assert {epoch[i] for i in range(100, 103)} <= {11, 12}
    classes = np.array([[sum(epoch[i] for i in range(103) if RARE[i] == c) for c in range(3)] for epoch in images])
    assert np.allclose(classes.mean(0), 103 / 3, atol=0.5)
    drawn = np.array([[epoch[i] for i in range(103)] for epoch in images]).mean(0)
    expected = np.repeat([103 / 3 / 90, 103 / 3 / 10, 103 / 3 / 3], [90, 10, 3])
    assert np.abs(drawn - expected).max() < 4.5 * 0.5 / 200**0.5, "and each image of a class"
    neighbours = [any(epoch[i] and epoch[i + 1] for epoch in images) for i in range(89)]
    assert all(neighbours), "in any combination"


def test_weighted_draws_in_proportion_to_the_weights() -> None:
    weights = np.arange(103) % 7
    drawn = np.array([np.bincount(np.array(draws_of("weighted", e)) % 103, minlength=103) for e in range(200)])
    expected = 103 * weights / weights.sum()
    assert (drawn >= np.floor(expected)).all()
    assert (drawn <= np.ceil(expected)).all()
    assert np.abs(drawn.mean(0) - expected).max() < 4.5 * 0.5 / 200**0.5
    assert not drawn[:, weights == 0].any()


@pytest.mark.parametrize("sampler", ["balanced", "weighted"])
def test_an_image_that_is_drawn_again_has_another_number(sampler: str) -> None:
    draws = draws_of(sampler, 0)
    assert len(set(draws)) == 103
    numbers = Counter(draw % 103 for draw in draws)
    assert {draw for draw in draws if draw % 103 == 6} == {6 + 103 * n for n in range(numbers[6])}
    assert draws != draws_of(sampler, 1) != draws_of(sampler, 1, seed=1)
    assert draws == draws_of(sampler, 0)


def test_equal_weights_draw_each_image_once() -> None:
    weights = sampling_weights("balanced", table(np.arange(60) % 3))
    for epoch in range(5):
        batches = TrainBatchSampler(60, 60, 0, weights=weights).batches(epoch)
        assert sorted(draw for draw, _ in next(batches)) == list(range(60))


def test_a_class_without_images_does_not_matter() -> None:
    assert np.allclose(sampling_weights("balanced", table([0, 0, 2])), [0.5, 0.5, 1])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sampler", "index", "message"),
    [
        ("balanced", table(np.eye(3, dtype=np.uint8)), "`data.sampler=balanced` needs one class per image, and these"),
        ("weighted", table(RARE), "`data.sampler=weighted` needs a weight for each training image: add a column `weig"),
        (
            "weighted",
            table([0, 1], weights=np.array([1, -2])),
            "the weights are from -2 to 1, and each must be",
        ),
        ("weighted", table([0, 1], weights=np.array([1, np.nan])), "the weights are from nan to nan"),
        ("weighted", table([0, 1], weights=np.array([np.inf, 1])), "the weights are from 1 to inf"),
        ("weighted", table([0, 1], weights=np.array([0, 0])), "the weights are from 0 to 0"),
    ],
)
def test_samplers_refuse_images_that_lack_what_they_need(sampler: str, index: object, message: str) -> None:
    with pytest.raises(UserError) as caught:
        sampling_weights(sampler, index)
    assert message in str(caught.value)


# -- evaluation


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
