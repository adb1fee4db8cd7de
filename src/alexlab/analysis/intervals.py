"""How sure numbers are: intervals of means and accuracies, and tests of differences. Checked against SciPy's in tests.

`scipy.special` has the distributions. `scipy.stats`, which has the tests too, takes much longer to import.
"""

import math
from collections.abc import Sequence

LEVEL = 0.95  # of intervals: this fraction of them contains the true value, if the assumptions hold
NOISE = 0.05  # a difference with a larger p is within noise


def mean_interval(mean: float, std: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of the mean of n >= 2 numbers, by Student's t: right for few numbers from a normal
    distribution, where a bootstrap of five contains the true mean in 84 % of cases instead of 95.

    Args:
        std: standard deviation of the sample, over n - 1.
    """
    from scipy.special import stdtrit

    half = float(stdtrit(n - 1, 0.5 + LEVEL / 2)) * std / math.sqrt(n)
    return mean - half, mean + half


def difference_of_means(a: tuple[float, float, int], b: tuple[float, float, int]) -> float:
    """Return p of Welch's t test, two-sided: whether two means differ, for two samples of (mean, std, n >= 2), not both
    of deviation 0. Welch 1947, Biometrika 34."""
    from scipy.special import stdtr

    (mean_a, std_a, n_a), (mean_b, std_b, n_b) = a, b
    part_a, part_b = std_a**2 / n_a, std_b**2 / n_b
    freedom = (part_a + part_b) ** 2 / (part_a**2 / (n_a - 1) + part_b**2 / (n_b - 1))
    return 2 * float(stdtr(freedom, -abs(mean_a - mean_b) / math.sqrt(part_a + part_b)))


def holm(p: Sequence[float]) -> list[float]:
    """Return p corrected for their number, so that with 5 % as the limit, the chance that any difference is called
    real by mistake is at most 5 %. Holm 1979, Scandinavian Journal of Statistics 6."""
    corrected, largest = [0.0] * len(p), 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[place]))
        corrected[place] = largest
    return corrected


def accuracy_interval(hits: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of an accuracy of `hits` in n >= 1 images: right for few images and near 0 and 1.
    Wilson 1927, Journal of the American Statistical Association 22."""
    from scipy.special import ndtri

    z2 = float(ndtri(0.5 + LEVEL / 2)) ** 2
    middle = (hits + z2 / 2) / (n + z2)
    half = math.sqrt(z2 * (hits * (n - hits) / n + z2 / 4)) / (n + z2)
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(only_a: int, only_b: int) -> float:
    """Return p of McNemar's exact test, two-sided: whether one of two networks is right more often on the same images.

    Args:
        only_a, only_b: numbers of images on which only the first, or only the second network is right.
    """
    from scipy.special import bdtr

    fewer, both = min(only_a, only_b), only_a + only_b
    return min(1.0, 2 * float(bdtr(fewer, both, 0.5))) if both else 1.0
