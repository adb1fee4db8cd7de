"""Which part of an image is cropped, compared with torchvision."""

from statistics import NormalDist

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from alexlab.data.sample_rng import SampleRng
from alexlab.data.transforms import SampleTransform

BOUND = 1.95 * (2 / 1500) ** 0.5  # two-sample Kolmogorov-Smirnov, 1,500 numbers each, p = 0.001


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """Return the largest distance of two distribution functions."""
    a, b = np.sort(a), np.sort(b)
    grid = np.concatenate([a, b])
    return float(np.abs(np.searchsorted(a, grid, "right") - np.searchsorted(b, grid, "right")).max() / len(a))


@pytest.mark.parametrize(
    ("extent", "scale"),
    [((500, 375), (0.08, 1.0)), ((500, 375), (0.9, 1.0)), ((900, 100), (0.08, 1.0)), ((90, 700), (0.5, 1.0))],
)
@pytest.mark.parametrize("size", [(64, 64), (32, 96), (70, 35)])
def test_random_resized_crop_has_torchvisions_distribution(
    size: tuple[int, int], extent: tuple[int, int], scale: tuple[float, float]
) -> None:
    """Also if all ten tries often fail, so that the middle is taken; and for a rectangle, around its own aspect."""
    aspect = size[1] / size[0]
    ours = SampleTransform(size, "random_resized", scale=scale)
    theirs = v2.RandomResizedCrop(size, scale=scale, ratio=(3 / 4 * aspect, 4 / 3 * aspect))
    torch.manual_seed(0)
    crops = [ours.crop_box(*extent, SampleRng(7, i)) for i in range(1500)]
    assert {(crop.size, crop.at) for crop in crops} == {(size, (0, 0))}
    boxes = np.array([crop.box for crop in crops])
    drawn = [theirs.make_params([torch.empty(3, extent[1], extent[0], device="meta")]) for _ in range(1500)]
    reference = np.array([(d["left"], d["top"], d["left"] + d["width"], d["top"] + d["height"]) for d in drawn])
    sizes = lambda b: np.stack([b[:, 2] - b[:, 0], b[:, 3] - b[:, 1]], 1)  # noqa: E731
    for edge in range(4):
        assert apart(boxes[:, edge], reference[:, edge]) < BOUND
    for side in range(2):
        assert apart(sizes(boxes)[:, side], sizes(reference)[:, side]) < BOUND
    assert boxes.min() >= 0
    assert (boxes[:, 2:] <= extent).all()


def test_the_papers_crop_is_uniform_over_the_33_x_33_places_of_224_in_256() -> None:
    crops = [SampleTransform(224, "random").crop_box(400, 300, SampleRng(0, i)) for i in range(3000)]
    assert {(crop.box, crop.size) for crop in crops} == {((0, 0, 400, 300), (256, 341))}
    tops, lefts = ([crop.at[axis] for crop in crops] for axis in (0, 1))
    assert sorted(set(tops)) == list(range(33))
    assert sorted(set(lefts)) == [42 + i for i in range(33)], "(341 - 256) / 2 = 42.5 is rounded to even"
    chance = 3000 / 33
    limit = NormalDist().inv_cdf(1 - 1e-5) * chance**0.5
    assert max(abs(tops.count(i) - chance) for i in range(33)) < limit


def test_the_center_crop_is_in_the_middle() -> None:
    assert SampleTransform(224).crop_box(256, 256, SampleRng(0)) == ((0, 0, 256, 256), (256, 256), (16, 16))
    assert SampleTransform(224).crop_box(300, 400, SampleRng(0)) == ((0, 0, 300, 400), (341, 256), (58, 16))


@pytest.mark.parametrize(
    ("extent", "size", "at"),
    [  # 73 x 146 pixels are covered
        ((300, 400), (194, 146), (65, 9)),
        ((400, 100), (73, 292), (4, 82)),
        ((200, 100), (73, 146), (4, 9)),
        ((1000, 501), (73, 145 + 1), (4, 9)),
    ],
)
def test_a_rectangle_is_cut_from_the_smallest_image_that_covers_it(
    extent: tuple[int, int], size: tuple[int, int], at: tuple[int, int]
) -> None:
    assert SampleTransform((64, 128)).crop_box(*extent, SampleRng(0)) == ((0, 0, *extent), size, at)
    turned = SampleTransform((128, 64)).crop_box(*extent[::-1], SampleRng(0))
    assert turned == ((0, 0, *extent[::-1]), size[::-1], at[::-1])


def test_a_random_rectangle_is_uniform_over_all_places() -> None:
    crops = [SampleTransform((64, 128), "random").crop_box(400, 100, SampleRng(0, i)) for i in range(3000)]
    tops, lefts = ({crop.at[axis] for crop in crops} for axis in (0, 1))
    assert (tops, lefts) == (set(range(10)), set(range(73, 92))), "(292 - 146) / 2 = 73"


@pytest.mark.parametrize("extent", [(9000, 40), (20_000, 4), (60, 5000)])
def test_a_long_strip_is_resized_around_a_rectangle(extent: tuple[int, int]) -> None:
    for size in ((64, 128), (128, 64)):
        left, top, right, bottom = SampleTransform(size).crop_box(*extent, SampleRng(0)).box
        chosen = SampleTransform(size).crop_box(*extent, SampleRng(0))
        assert max(chosen.size) < 12 * 128
        assert all(0 <= at <= edge - part for at, edge, part in zip(chosen.at, chosen.size, size, strict=True))
        longer = extent[0] > extent[1]
        box = (right - left, bottom - top) if longer else (bottom - top, right - left)
        covered = size[0] / 0.875 if longer else size[1] / 0.875
        assert chosen.size[1 if longer else 0] / box[0] == pytest.approx(covered / min(extent), rel=0.03)


@pytest.mark.parametrize("extent", [(40, 9000), (9001, 30), (4, 20_000), (100, 2000)])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_only_the_surroundings_of_the_crop_are_resized_in_a_long_strip(extent: tuple[int, int], crop: str) -> None:
    for i in range(20):
        chosen = SampleTransform(224, crop).crop_box(*extent, SampleRng(1, i))
        left, top, right, bottom = chosen.box
        assert 0 <= left < right <= extent[0]
        assert 0 <= top < bottom <= extent[1]
        assert max(chosen.size) < 12 * 224, "not 4,000 times"
        assert all(0 <= at <= size - 224 for at, size in zip(chosen.at, chosen.size, strict=True))
        long = 0 if extent[1] > extent[0] else 1
        times = chosen.size[long] / ((bottom - top), (right - left))[long]
        assert times == pytest.approx(256 / min(extent), rel=0.02)
        middle = (top, left)[long] + (chosen.at[long] + 112) / times
        slack = 0 if crop == "center" else 16 / times
        assert abs(middle - max(extent) / 2) <= slack + 1 / times + 0.01 * 224 / times
