"""Transforms of one's own: random numbers by (seed, epoch, index), whatever they are drawn with, in any thread."""

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import photo
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import v2

from alexlab.data import decode
from alexlab.data.dataset import Batch, ImageDataset
from alexlab.data.folder import ImageIndex, scan
from alexlab.data.loader import Loader
from alexlab.data.sample_rng import SampleRng
from alexlab.data.sampler import TrainBatchSampler
from alexlab.data.transforms import SampleTransform
from alexlab.data.user_transforms import NAMES, SeededTorch, UserTransforms
from alexlab.engine.errors import UserError

COUNT, SIDE = 24, 32
IMAGE = torch.arange(3 * 48 * 32).remainder(251).to(torch.uint8).view(3, 48, 32)


class NumpyNoise:
    """Adds noise of NumPy's global generator, in pairs of which NumPy caches one."""

    def __call__(self, image: Tensor) -> Tensor:
        noise = np.random.normal(0, 20, (*image.shape[:2], 1))
        return torch.from_numpy((image.numpy() + noise + np.random.normal()).clip(0, 255).astype(np.uint8))


class PythonShift:
    def __call__(self, image: Tensor) -> Tensor:
        return image.roll(random.randrange(20), -1)


class OwnGenerator:
    """Has a generator of its own, as Albumentations has, which it seeds from NumPy's global one."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng()

    def __call__(self, image: Tensor) -> Tensor:
        self.rng = np.random.default_rng(np.random.randint(2**31))
        return image.roll(int(self.rng.integers(20)), -1)


class FloatSum:
    """Depends on the last bits of a sum, which depend on the number of torch's threads."""

    def __call__(self, image: Tensor) -> Tensor:
        return image ^ (torch.rand(3, 300, 400).sum().view(torch.int32).item() & 1)


def seldom_numpy(image: Tensor) -> Tensor:
    """Draw from NumPy's generator for one image of eight."""
    return image.roll(np.random.randint(20), -1) if torch.rand(()) < 0.125 else image


KINDS: dict[str, list[Any]] = {
    "torch": [v2.RandAugment(), v2.GaussianNoise(sigma=0.2)],
    "own generator": [OwnGenerator()],
    "seldom": [seldom_numpy],
    "all": [v2.RandomResizedCrop(SIDE), NumpyNoise(), v2.RandomOrder([v2.RandomInvert(), PythonShift()])],
    "sum": [FloatSum()],
}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ImageIndex:
    root = tmp_path_factory.mktemp("own")
    for i in range(COUNT):
        photo(root / f"{i % 3}" / f"{i:02d}.jpg", (70 + 9 * i, 50 + 5 * i), seed=i)
    return scan(root)


def loader(index: ImageIndex, transforms: list[Any], workers: int = 0, world_size: int = 1, rank: int = 0) -> Loader:
    crop = "none" if isinstance(transforms[0], v2.RandomResizedCrop) else "random_resized"
    transform = SampleTransform(SIDE, crop, flip=0.5, user=UserTransforms(transforms))
    return Loader(ImageDataset(index, transform, 3), TrainBatchSampler(COUNT, 8, 3, rank, world_size), workers)


def trained(made: Loader) -> list[tuple[Batch, Tensor]]:
    """Return the batches of two epochs, each with logits of a network with dropout, which this thread computes."""
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(3 * SIDE**2, 4, bias=False))
    torch.nn.init.constant_(net[2].weight, 0.01)
    torch.default_generator.manual_seed(5)
    batches = []
    for epoch in (0, 1):
        made.batch_sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for batch in made:
            for _ in range(4):  # draws while the threads draw
                logits = net(batch.images.float())
            batches.append((batch, logits))
    return batches


@pytest.mark.parametrize("kind", KINDS)
def test_batches_and_dropout_do_not_depend_on_threads(index: ImageIndex, kind: str) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        alone = trained(loader(index, KINDS[kind]))
        for workers in (1, 8):
            together = trained(loader(index, KINDS[kind], workers))
            assert len(alone) == len(together) == 2 * (COUNT // 8)
            for (a, logits), (b, others) in zip(alone, together, strict=True):
                assert torch.equal(a.images, b.images)
                assert torch.equal(logits, others)
    finally:
        torch.set_num_threads(threads)
    if kind not in ("seldom", "sum"):
        first, second = (batches[0].images for batches in (alone[0], alone[COUNT // 8]))
        assert not torch.equal(first, second)


def test_an_image_does_not_depend_on_the_rank_or_on_images_before_it(index: ImageIndex) -> None:
    whole = [batch.images for batch in loader(index, KINDS["all"])]
    ranks = [[batch.images for batch in loader(index, KINDS["all"], 2, 2, rank)] for rank in (0, 1)]
    assert all(torch.equal(a, torch.cat(parts)) for a, *parts in zip(whole, *ranks, strict=True))
    late = loader(index, KINDS["all"], 2)
    late.batch_sampler.resume_at = (0, 2)  # type: ignore[attr-defined]
    assert all(torch.equal(a, batch.images) for a, batch in zip(whole[2:], late, strict=True))


def test_an_image_depends_on_seed_epoch_and_index(index: ImageIndex) -> None:
    transform = SampleTransform(SIDE, user=UserTransforms([lambda image: torch.randint_like(image, 256)]))
    seen = [transform(index.picture(0), SampleRng(*seeds)) for seeds in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert torch.equal(seen[0], transform(index.picture(0), SampleRng(0, 0, 0)))
    assert not any(torch.equal(seen[0], other) for other in seen[1:])


@pytest.mark.parametrize(
    "transform",
    [v2.ColorJitter(0.4), v2.ElasticTransform(), NumpyNoise(), PythonShift(), v2.RandomApply([NumpyNoise()])],
    ids=lambda transform: type(transform).__name__,
)
def test_the_numbers_are_those_of_generators_with_the_seed_of_the_image(transform: Callable[[Tensor], Tensor]) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        expected = transform(IMAGE)
        assert torch.equal(UserTransforms([transform])(IMAGE, (48, 32), seed), expected)


def test_states_of_the_global_generators_are_restored() -> None:
    transforms = UserTransforms([NumpyNoise(), PythonShift(), v2.ColorJitter(0.5)])
    transforms(IMAGE, (48, 32), 0)
    assert transforms.alone
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index,union-attr]
    transforms(IMAGE, (48, 32), 1)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # type: ignore[index,union-attr]


def test_transforms_run_in_parallel_unless_they_draw_from_numpy() -> None:
    """Also after another thread has drawn from NumPy's generator, for which one image is done again."""
    meet = threading.Barrier(2)

    def both(image: Tensor) -> Tensor:
        meet.wait(20)  # BrokenBarrierError if the other thread is not within a transform at the same time
        return image

    transforms = UserTransforms([v2.ColorJitter(0.5)])
    np.random.rand()
    transforms(IMAGE, (48, 32), 0)
    assert not transforms.alone
    transforms.transforms = (both,)
    threads = [threading.Thread(target=transforms, args=(IMAGE, (48, 32), 0)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not meet.broken


CALLS: dict[str, Callable[[], Tensor]] = {
    "rand": lambda: torch.rand(3),
    "randn": lambda: torch.randn((3,)),
    "randint": lambda: torch.randint(0, 99, (9,)),
    "randperm": lambda: torch.randperm(9),
    "rand_like": lambda: torch.rand_like(torch.ones(3)),
    "randn_like": lambda: torch.randn_like(torch.ones(3)),
    "randint_like": lambda: torch.randint_like(torch.ones(9), 99),
    "normal": lambda: torch.normal(torch.ones(3), 1.0),
    "bernoulli": lambda: torch.full((99,), 0.5).bernoulli(),
    "multinomial": lambda: torch.ones(9).multinomial(5),
    "poisson": lambda: torch.poisson(torch.full((9,), 20.0)),
    "binomial": lambda: torch.binomial(torch.full((9,), 99.0), torch.full((9,), 0.5)),
    "_standard_gamma": lambda: torch.distributions.Gamma(2.0, 1.0).sample((3,)),
    "_sample_dirichlet": lambda: torch.distributions.Beta(2.0, 1.0).sample((3,)),
    "uniform_": lambda: torch.empty(3).uniform_(1, 2),
    "normal_": lambda: torch.empty(3).normal_(0, 1),
    "random_": lambda: torch.empty(3).random_(),
    "bernoulli_": lambda: torch.empty(99).bernoulli_(0.5, generator=None),
    "exponential_": lambda: torch.empty(3).exponential_(),
    "geometric_": lambda: torch.empty(9).geometric_(0.1),
    "cauchy_": lambda: torch.empty(3).cauchy_(),
    "log_normal_": lambda: torch.empty(3).log_normal_(),
}


# functions that are written in Python and draw numbers within
WITHIN: dict[str, Callable[[], Tensor]] = {
    "init": lambda: torch.nn.init.uniform_(torch.empty(3)),
    "dropout": lambda: torch.nn.functional.dropout(torch.ones(99)),
    "dropout2d": lambda: torch.nn.functional.dropout2d(torch.ones(1, 99, 2, 2)),
    "gumbel": lambda: torch.nn.functional.gumbel_softmax(torch.ones(9)),
}


def test_every_random_function_of_torch_is_seeded_and_leaves_the_default_generator() -> None:
    assert sorted(CALLS) == sorted(NAMES.split())
    for name, draw in {**CALLS, **WITHIN}.items():
        state = torch.get_rng_state()
        with SeededTorch(7):
            one = draw()
        assert torch.equal(torch.get_rng_state(), state), name
        torch.manual_seed(7)
        assert torch.equal(draw(), one), name


def test_a_draw_that_cannot_be_seeded_is_an_error() -> None:
    with SeededTorch(7), pytest.raises(RuntimeError, match="Unknown keyword argument 'generator'"):
        torch.nn.functional.fractional_max_pool2d(torch.ones(1, 1, 9, 9), 2, 3)


def test_a_generator_that_the_transform_passes_is_used() -> None:
    own = torch.Generator().manual_seed(1)
    with SeededTorch(7):
        drawn = torch.rand(3, generator=own)
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(1)))


# -- what transforms get and return


def test_transforms_come_after_the_crop_and_before_the_flip(index: ImageIndex) -> None:
    got = []
    plain = SampleTransform(SIDE, "random_resized", flip=1.0)
    mark = UserTransforms(
        [lambda image: (got.append(image.clone()), image.fill_(0).index_fill(2, torch.tensor(0), 9))[1]]
    )
    user = SampleTransform(SIDE, "random_resized", flip=1.0, user=mark)
    expected, marked = plain(index.picture(0), SampleRng(1)), user(index.picture(0), SampleRng(1))
    assert torch.equal(got[0].flip(-1), expected)
    assert (marked[..., -1] == 9).all()
    assert not marked[..., :-1].any()


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_without_a_crop_they_get_the_whole_image_as_a_viewer_shows_it(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = photo(tmp_path / "a.png", (50, 30), exif=exif)
    got = []
    transform = SampleTransform(
        SIDE, "none", user=UserTransforms([lambda x: (got.append(x), v2.Resize((SIDE, SIDE))(x))[1]])
    )
    result = decode.read(str(path), transform)
    with Image.open(path) as image:
        expected = np.array(ImageOps.exif_transpose(image))
    assert np.array_equal(got[0].permute(1, 2, 0).numpy(), expected)
    assert torch.equal(result, v2.Resize((SIDE, SIDE))(torch.from_numpy(expected).permute(2, 0, 1)))


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        (
            [lambda x: x.float()],
            r"augment.transforms\[0\] \(<lambda>\) returned torch.float32 \(3, 48, 32\), and must ",
        ),
        (
            [v2.Identity(), v2.CenterCrop(9)],
            r"\[1\] \(CenterCrop\) returned torch.uint8 \(3, 9, 9\), and .* \(3, 48, 32\)",
        ),
        ([lambda x: None, v2.Identity()], r"\[0\] \(<lambda>\) returned a NoneType, and must return a uint8 tensor"),
    ],
)
def test_a_wrong_return_is_an_error_that_names_the_transform(transforms: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        UserTransforms(transforms)(IMAGE, (48, 32), 0)


def test_a_missing_file_of_a_transform_is_not_a_broken_image(index: ImageIndex) -> None:
    def read(image: Tensor) -> Tensor:
        raise FileNotFoundError("no texture.png")

    transform = SampleTransform(SIDE, user=UserTransforms([read]))
    made = Loader(ImageDataset(index, transform, 0, "skip"), TrainBatchSampler(COUNT, 8, 0), 1)
    with pytest.raises(RuntimeError, match=r"transforms\[0\] \(read\) failed: FileNotFoundError: no texture.png"):
        list(made)
