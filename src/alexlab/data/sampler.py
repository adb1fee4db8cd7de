"""Samplers: which images form which batch, as a function of (seed, epoch) only.

The samplers yield (draw, epoch) pairs, from which a thread derives an image's augmentation. So the batches do not
depend on the number of threads, and a resumed run needs to know only the step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from alexlab.data.splits import class_counts
from alexlab.engine.errors import UserError

# (draw, epoch): the draw is the index of the image; plus the number of images, for each earlier draw in the same epoch
Key = tuple[int, int]


def sampling_weights(sampler: str, index: Any) -> np.ndarray | None:
    """Return the relative frequency of each image for `data.sampler`: float64 (N,), None if all are equal.

    Raises:
        UserError: the images lack what the sampler needs.
    """
    if sampler == "shuffle":
        return None
    if sampler == "balanced":
        if index.targets.ndim == 2:
            raise UserError(
                "`data.sampler=balanced` needs one class per image, and these images have lists of labels: use "
                "loss.class_weights=auto, or a column of weights with data.sampler=weighted."
            )
        return 1 / class_counts(index)[index.targets]
    weights = index.weights
    if weights is None:
        raise UserError(
            "`data.sampler=weighted` needs a weight for each training image: add a column `weight` to the table of "
            "data=table, or use data.sampler=balanced."
        )
    weights = np.asarray(weights, np.float64)
    if not (np.isfinite(weights).all() and weights.min() >= 0 and weights.max() > 0):
        raise UserError(
            f"`data.sampler=weighted`: the weights are from {weights.min():g} to {weights.max():g}, and each must be a "
            "number from 0 on, and one above 0."
        )
    return weights


def part(global_batch: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return the first image of a rank's part of a global batch, and the one after its last. Parts differ by one image
    if the batch does not divide by the number of ranks."""
    return rank * global_batch // world_size, (rank + 1) * global_batch // world_size


@dataclass(eq=False)
class TrainBatchSampler(Sampler[list[Key]]):
    """The training batches of one rank: a part of each global batch. The order is new in each epoch.

    Images at the end of the order that do not fill a global batch are skipped in that epoch.
    """

    size: int  # number of training images, and of draws per epoch
    global_batch: int  # images per step over all ranks: at least world_size, at most `size`
    seed: int
    rank: int = 0
    world_size: int = 1
    weights: np.ndarray | None = None  # relative frequency of each image, (N,); None draws each once
    epoch: int = field(default=0, init=False)  # of the next pass; `set_epoch` changes it
    repeat: bool = field(default=False, init=False)  # use the order of epoch 0 in every epoch, to overfit a few batches
    # (epoch, batch) of a run that resumes within an epoch: that epoch's pass starts at that batch
    resume_at: tuple[int, int] = field(default=(0, 0), init=False)

    def __post_init__(self) -> None:
        assert self.world_size <= self.global_batch <= self.size

    @property
    def sampler(self) -> "TrainBatchSampler":
        """Lightning calls `set_epoch` on the sampler of a loader's batch sampler, not on the batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size // self.global_batch

    def __iter__(self) -> Iterator[list[Key]]:
        return self.batches(self.epoch, self.resume_at[1] if self.epoch == self.resume_at[0] else 0)

    def batches(self, epoch: int, first: int = 0) -> Iterator[list[Key]]:
        """Yield the batches of `epoch` from number `first` on, even if `set_epoch` is called in between."""
        epoch = 0 if self.repeat else epoch
        order = self._order(epoch)
        own, end = part(self.global_batch, self.rank, self.world_size)
        for batch in range(first, len(self)):
            start = batch * self.global_batch
            yield [(int(i), epoch) for i in order[start + own : start + end]]

    def _order(self, epoch: int) -> np.ndarray:
        """Return the draws of an epoch, int64 (size,)."""
        rng = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        if self.weights is None:
            return rng.permutation(self.size)
        # equidistant points on a line on which each image has a length: an image that is expected 2.3 times is drawn
        # two or three times, where independent draws could give any number
        images = rng.permutation(np.flatnonzero(self.weights))
        ends = np.cumsum(self.weights[images])
        points = (np.arange(self.size) + rng.random()) * (ends[-1] / self.size)
        drawn = np.searchsorted(ends[:-1], points, side="right")  # ascending
        repeats = np.arange(self.size) - np.searchsorted(drawn, drawn)
        return rng.permutation(images[drawn] + self.size * repeats)


@dataclass(eq=False)
class EvalBatchSampler(Sampler[list[Key]]):
    """Batches in which every image comes exactly once over all ranks, without padding.

    All ranks yield the same number of batches, and the last may be short or empty. A rank with fewer batches would
    skip hooks in which the other ranks wait for it.
    """

    size: int  # number of images
    batch_size: int  # images per batch and rank
    ranks: Sequence[int] = (0,)  # whose batches to yield, one after another: several if one process evaluates alone
    world_size: int = 1
    # of a fixed order that mixes the classes, for evaluations of the first batches only; None is the folder's order
    seed: int | None = None

    @property
    def batches_per_rank(self) -> int:
        return -(-self.size // (self.batch_size * self.world_size))

    def __len__(self) -> int:
        return len(self.ranks) * self.batches_per_rank

    def __iter__(self) -> Iterator[list[Key]]:
        order: Any = range(self.size)
        if self.seed is not None:
            order = np.random.Generator(np.random.PCG64([self.seed, self.size])).permutation(self.size)
        for rank in self.ranks:
            indices = order[rank :: self.world_size]
            for start in range(0, self.batches_per_rank * self.batch_size, self.batch_size):
                yield [(int(i), 0) for i in indices[start : start + self.batch_size]]
