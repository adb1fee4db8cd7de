"""Random numbers of one image: a stream that follows from (seed, epoch, index), the same in any thread."""

import numpy as np

_BITS = 0xFFFFFFFFFFFFFFFF
_STEP = 0x9E3779B97F4A7C15


def mix(*numbers: int) -> int:
    """A 63-bit seed from several numbers (splitmix64's steps; https://prng.di.unimi.it/splitmix64.c)."""
    state = 0
    for number in numbers:
        state = _scrambled((state ^ number) + _STEP & _BITS)
    return state >> 1


class Draws:
    """A stream of splitmix64. torch's and NumPy's generators take 10 to 130 microseconds to seed; this one none."""

    __slots__ = ("state",)

    def __init__(self, *seeds: int) -> None:
        self.state = mix(*seeds)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number from `low` to below `high`."""
        self.state = self.state + _STEP & _BITS
        return low + (high - low) * ((_scrambled(self.state) >> 11) * 2.0**-53)

    def below(self, count: int) -> int:
        """One of 0, 1, ..., count - 1."""
        return int(self.uniform() * count)


class ManyDraws:
    """The streams `Draws(*seeds, i)` of many images, side by side."""

    def __init__(self, seeds: tuple[int, ...], numbers: np.ndarray) -> None:
        """
        Args:
            numbers: int64 (N,), each image's.
        """
        state = 0
        for seed in seeds:
            state = _scrambled((state ^ seed) + _STEP & _BITS)
        self.states = _scrambled_all((np.uint64(state) ^ numbers.astype(np.uint64)) + np.uint64(_STEP)) >> np.uint64(1)

    def uniform(self, low: float = 0.0, high: float = 1.0, among: "slice | np.ndarray" = slice(None)) -> np.ndarray:
        """float64 from `low` to below `high`, one of each stream `among` them; the others stay where they are."""
        self.states[among] += np.uint64(_STEP)
        return low + (high - low) * ((_scrambled_all(self.states[among]) >> np.uint64(11)) * 2.0**-53)

    def below(self, counts: "int | np.ndarray", among: "slice | np.ndarray" = slice(None)) -> np.ndarray:
        """int64 from 0 to counts - 1."""
        return (self.uniform(among=among) * counts).astype(np.int64)


def _scrambled(state: int) -> int:
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _BITS
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _BITS
    return state ^ (state >> 31)


def _scrambled_all(states: np.ndarray) -> np.ndarray:
    states = (states ^ (states >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    states = (states ^ (states >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return states ^ (states >> np.uint64(31))
