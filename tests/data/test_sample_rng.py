"""The random numbers of an image."""

import numpy as np

from alexlab.data.sample_rng import SampleRng, mix


def test_the_stream_is_that_of_splitmix64() -> None:
    """Its first numbers from seed 1234567 (Rosetta Code's test of https://prng.di.unimi.it/splitmix64.c)."""
    known = (6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821)
    rng = SampleRng()
    rng.state = 1234567
    assert [rng.uniform() for _ in known] == [(number >> 11) / 2**53 for number in known]


def test_mix_gives_different_seeds() -> None:
    seeds = {mix(s, e, i) for s in range(5) for e in range(20) for i in range(100)}
    assert len(seeds) == 10_000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_numbers_are_evenly_distributed_within_their_bounds() -> None:
    rng = SampleRng(3, 1, 4)
    uniform = np.array([rng.uniform(-2, 5) for _ in range(20_000)])
    assert -2 <= uniform.min() < -1.99
    assert 4.99 < uniform.max() < 5
    assert abs(uniform.mean() - 1.5) < 4 * (49 / 12 / 20_000) ** 0.5
    below = np.bincount([rng.below(7) for _ in range(14_000)])
    assert len(below) == 7
    assert np.abs(below - 2000).max() < 4.5 * 2000**0.5


def test_the_streams_of_neighbouring_images_are_independent() -> None:
    first = np.array([SampleRng(0, 0, i).uniform() for i in range(5000)])
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 4 / 5000**0.5
