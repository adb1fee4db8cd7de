"""Which images form which batch: a function of (seed, epoch), and of nothing else.

The samplers yield (position in the index, epoch) pairs, so that a thread can derive an image's augmentation from
(seed, epoch, index): the batches do not depend on the number of threads, and a resume needs nothing but the step.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler

Batch = list[tuple[int, int]]  # (index of the image, epoch)


class TrainBatches(Sampler[Batch]):
    """Batches of one rank: each global batch of a fresh permutation is dealt out over the ranks.

    The last images of the permutation that do not fill a global batch are left out (other ones each epoch).

    Args:
        size: number of training images.
        global_batch: images a step over all ranks; must divide by world_size.
        epoch: the epoch of the next pass; `set_epoch` changes it.
        repeats: whether all passes are that of epoch 0, to overfit a few batches.
        begins_at: (epoch, batch) of a run that goes on within an epoch: its passes begin with that batch.
    """

    def __init__(self, size: int, global_batch: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        assert global_batch % world_size == 0
        assert global_batch <= size
        self.size, self.global_batch, self.seed = size, global_batch, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.repeats = False
        self.begins_at = (0, 0)

    @property
    def sampler(self) -> "TrainBatches":
        """Lightning calls `set_epoch` on the sampler of a loader's batch sampler, and not on the batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size // self.global_batch

    def __iter__(self) -> Iterator[Batch]:
        return self.of(self.epoch, self.begins_at[1] if self.epoch == self.begins_at[0] else 0)

    def of(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from `first` on, whatever `set_epoch` is told meanwhile."""
        epoch = 0 if self.repeats else epoch
        order = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.size)
        share = self.global_batch // self.world_size
        for b in range(first, len(self)):
            start = b * self.global_batch + self.rank * share
            yield [(int(i), epoch) for i in order[start : start + share]]


class InTurn(Sampler[Batch]):
    """The batches of several ranks one after the other, for one process that does the work of all."""

    def __init__(self, ranks: "list[EvalBatches]") -> None:
        self.ranks = ranks

    def __len__(self) -> int:
        return sum(map(len, self.ranks))

    def __iter__(self) -> Iterator[Batch]:
        return itertools.chain(*self.ranks)


class EvalBatches(Sampler[Batch]):
    """Every image once over all ranks, without padding.

    All ranks yield the same number of batches, the last of which may be short or empty: a rank without a batch would
    skip the hooks in which the others wait for it.

    Args:
        seed: of a fixed order that mixes the classes, for where only the first batches are looked at; None is the
            folder's order.
    """

    def __init__(self, size: int, batch: int, rank: int = 0, world_size: int = 1, seed: int | None = None) -> None:
        self.size, self.batch, self.rank, self.world_size, self.seed = size, batch, rank, world_size, seed

    def __len__(self) -> int:
        return -(-self.size // (self.batch * self.world_size))

    def __iter__(self) -> Iterator[Batch]:
        order: Any = range(self.size)
        if self.seed is not None:
            order = np.random.Generator(np.random.PCG64([self.seed, self.size])).permutation(self.size)
        mine = order[self.rank :: self.world_size]
        for b in range(len(self)):
            yield [(int(i), 0) for i in mine[b * self.batch : (b + 1) * self.batch]]
