"""Random numbers for one image: a stream that depends on (seed, epoch, index) only, and not on the thread."""

import numpy as np

_BITS = 0xFFFFFFFFFFFFFFFF
_STEP = 0x9E3779B97F4A7C15


def mix(*numbers: int) -> int:
    """Mix several numbers into a 63-bit seed, by the steps of splitmix64 (https://prng.di.unimi.it/splitmix64.c)."""
    state = 0
    for number in numbers:
        state = _scramble((state ^ number) + _STEP & _BITS)
    return state >> 1


class SampleRng:
    """A splitmix64 stream, which takes no time to seed; torch's and NumPy's generators take 10 to 130 microseconds."""

    __slots__ = ("state",)

    def __init__(self, *seeds: int) -> None:
        self.state = mix(*seeds)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Draw a number from `low` to below `high`."""
        self.state = self.state + _STEP & _BITS
        return low + (high - low) * ((_scramble(self.state) >> 11) * 2.0**-53)

    def below(self, count: int) -> int:
        """Draw one of 0, 1, ..., count - 1."""
        return int(self.uniform() * count)


class BatchRng:
    """The streams `SampleRng(*seeds, i)` of many images at once, in NumPy arrays. `indices`, int64 (N,), are the i."""

    def __init__(self, seeds: tuple[int, ...], indices: np.ndarray) -> None:
        state = 0
        for seed in seeds:
            state = _scramble((state ^ seed) + _STEP & _BITS)
        self.states = _scramble_all((np.uint64(state) ^ indices.astype(np.uint64)) + np.uint64(_STEP)) >> np.uint64(1)

    def uniform(self, low: float = 0.0, high: float = 1.0, rows: "slice | np.ndarray" = slice(None)) -> np.ndarray:
        """Draw a float64 from `low` to below `high` from each stream of `rows`; the other streams do not advance."""
        self.states[rows] += np.uint64(_STEP)
        return low + (high - low) * ((_scramble_all(self.states[rows]) >> np.uint64(11)) * 2.0**-53)

    def below(self, counts: "int | np.ndarray", rows: "slice | np.ndarray" = slice(None)) -> np.ndarray:
        """Draw an int64 from 0 to counts - 1 from each stream of `rows`."""
        return (self.uniform(rows=rows) * counts).astype(np.int64)


def _scramble(state: int) -> int:
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _BITS
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _BITS
    return state ^ (state >> 31)


def _scramble_all(states: np.ndarray) -> np.ndarray:
    states = (states ^ (states >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    states = (states ^ (states >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return states ^ (states >> np.uint64(31))
