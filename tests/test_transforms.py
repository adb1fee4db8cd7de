"""Crops, decoding and the on-device augmentation, against Pillow and torchvision."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import photo
from PIL import Image
from torchvision.transforms import v2

from alexlab.augment import PCA_EIGENVALUES, PCA_EIGENVECTORS, BatchAugment
from alexlab.data import decode
from alexlab.data.dataset import ImageDataset, collate, mix
from alexlab.data.index import scan
from alexlab.data.transforms import SampleTransform

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def test_center_crop_agrees_with_torchvision(tmp_path: Path) -> None:
    path = photo(tmp_path / "a.png", (160, 128))  # halved without a rest, so both crop the same pixels
    with decode.open_image(str(path)) as image:
        ours = SampleTransform(64, crop_ratio=1.0)(image).float()
    reference = v2.Compose([v2.Resize(64), v2.CenterCrop(64), v2.PILToTensor()])(Image.open(path)).float()
    assert ours.shape == (3, 64, 64)
    assert (ours - reference).abs().mean() < 1.5


def test_scaled_decoding_gives_nearly_the_same_picture(tmp_path: Path) -> None:
    path = photo(tmp_path / "big.jpg", (1200, 900), quality=95)
    with decode.open_image(str(path)) as image:
        ours = SampleTransform(64, crop_ratio=1.0)(image).float()
    reference = v2.Compose([v2.Resize(64), v2.CenterCrop(64), v2.PILToTensor()])(Image.open(path)).float()
    assert (ours - reference).abs().mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path: Path, orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    path = photo(tmp_path / "r.jpg", (160, 96), exif=exif, quality=95)
    with decode.open_image(str(path)) as image:
        width, height = decode.size_of(image)
        ours = decode.crop_resize(image, (0, 0, width, height), (height, width)).permute(1, 2, 0).numpy()
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    assert ours.shape == expected.shape
    assert np.abs(ours.astype(float) - expected).mean() < 1


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "LA", "I;16"])
def test_other_colour_modes(tmp_path: Path, mode: str) -> None:
    source = Image.open(photo(tmp_path / "source.png"))
    suffix = ".jpg" if mode == "CMYK" else ".png"
    if mode == "I;16":
        grey = (np.asarray(source.convert("L")).astype(np.uint16) << 8).astype(np.uint16)
        Image.fromarray(grey).save(tmp_path / "x.png")
        expected = np.asarray(source.convert("L").convert("RGB"))
    else:
        source.convert(mode).save(tmp_path / f"x{suffix}")
        expected = np.asarray(Image.open(tmp_path / f"x{suffix}").convert("RGB"))
    with decode.open_image(str(tmp_path / f"x{suffix}")) as image:
        ours = decode.crop_resize(image, (0, 0, *image.size), (image.size[1], image.size[0]))
    assert np.abs(ours.permute(1, 2, 0).numpy().astype(float) - expected).mean() < 1


@pytest.mark.parametrize("damage", ["empty", "cut", "text"])
def test_broken_images_are_named(tmp_path: Path, damage: str) -> None:
    path = photo(tmp_path / "c" / "bad.jpg", (300, 300))
    raw = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": raw[: len(raw) // 3], "text": b"not an image"}[damage])
    photo(tmp_path / "c" / "good.jpg")
    index = scan(tmp_path)
    with pytest.raises(decode.BrokenImageError, match=r"bad.jpg cannot be read as an image .*data.on_error=skip"):
        ImageDataset(index, SampleTransform(32), 0)[0, 0]
    skipping = ImageDataset(index, SampleTransform(32), 0, "skip")
    images, targets, skipped = collate([skipping[0, 0], skipping[1, 0]])
    assert (len(images), len(targets), skipped) == (1, 1, [str(path)])
    assert len(collate([skipping[0, 0]])[1]) == 0


def test_augmentation_is_a_function_of_seed_epoch_and_index(tmp_path: Path) -> None:
    for i in range(2):
        photo(tmp_path / "c" / f"{i}.jpg", (200, 150), seed=i)
    data = ImageDataset(scan(tmp_path), SampleTransform(32, "random_resized", flip=0.5, policy="trivial"), seed=1)

    def pixels(i: int, epoch: int) -> torch.Tensor:
        sample = data[i, epoch]
        assert not isinstance(sample, str)
        return sample[0]

    first = pixels(0, 3)
    pixels(1, 3)
    torch.rand(5)
    assert torch.equal(first, pixels(0, 3))
    assert not torch.equal(first, pixels(0, 4))


def test_random_resized_crop_has_torchvisions_distribution() -> None:
    ours, theirs = SampleTransform(64, "random_resized"), v2.RandomResizedCrop(64)
    torch.manual_seed(0)
    boxes = np.array([ours.box(500, 375) for _ in range(1500)])
    drawn = [theirs.make_params([torch.empty(3, 375, 500, device="meta")]) for _ in range(1500)]
    reference = np.array([(d["left"], d["top"], d["left"] + d["width"], d["top"] + d["height"]) for d in drawn])
    for edge in range(4):  # two-sample Kolmogorov-Smirnov; 1.95 * sqrt(2 / n) is the bound for p = 0.001
        a, b = np.sort(boxes[:, edge]), np.sort(reference[:, edge])
        grid = np.concatenate([a, b])
        distance = np.abs(np.searchsorted(a, grid, "right") - np.searchsorted(b, grid, "right")).max() / 1500
        assert distance < 1.95 * (2 / 1500) ** 0.5


def test_paper_crop_is_a_224_of_256() -> None:
    left, top, right, bottom = SampleTransform(224, "random").box(400, 256)
    assert (right - left, bottom - top) == (224, 224)
    assert 0 <= left <= 400 - 224
    assert 0 <= top <= 32
    assert SampleTransform(224).box(256, 256) == (16, 16, 240, 240)


def test_normalize_is_torchvisions() -> None:
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    expected = v2.Normalize(MEAN, STD)(v2.ToDtype(torch.float32, scale=True)(images))
    torch.testing.assert_close(BatchAugment(MEAN, STD, 5).normalize(images), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("settings", [{"pca": 0.1}, {"erase": 0.7}])
def test_an_image_is_drawn_alike_on_any_number_of_ranks(settings: dict[str, float]) -> None:
    augment = BatchAugment(MEAN, STD, 5, **settings)  # type: ignore[arg-type]
    images, targets = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8), torch.zeros(8, dtype=torch.int64)
    whole, _ = augment(images, targets, seed=7)
    halves = [augment(images[r * 4 : r * 4 + 4], targets[:4], seed=7, rank=r, world_size=2)[0] for r in range(2)]
    assert torch.equal(whole, torch.cat(halves))
    assert not torch.equal(whole, augment(images, targets, seed=8)[0])


def test_pca_noise_has_the_stated_covariance() -> None:
    count = 20_000
    gray = torch.full((count, 3, 1, 1), 128, dtype=torch.uint8)
    augment = BatchAugment([0.0] * 3, [1.0] * 3, 5, pca=0.1)
    noise = (augment(gray, torch.zeros(count, dtype=torch.int64), seed=0)[0] - 128 / 255).view(count, 3).numpy()
    axes = np.array(PCA_EIGENVECTORS) * np.array(PCA_EIGENVALUES) * 0.1
    np.testing.assert_allclose(np.cov(noise.T), axes @ axes.T, rtol=0.06)


def test_erasing_covers_what_it_says() -> None:
    images = torch.full((2000, 3, 32, 32), 255, dtype=torch.uint8)
    erased, _ = BatchAugment([0.0] * 3, [1.0] * 3, 5, erase=0.5)(images, torch.zeros(2000, dtype=torch.int64), seed=0)
    share = (erased[:, 0] == 0).float().mean((1, 2))
    assert 0.46 < (share > 0).float().mean() < 0.54
    assert 0.13 < share[share > 0].mean() < 0.22  # the middle of 0.02 and 0.33
    assert share.max() < 0.4


def test_mixing_gives_shares_of_classes() -> None:
    augment = BatchAugment(MEAN, STD, 5, mixup=0.2, cutmix=1.0)
    _, targets = augment(torch.zeros(6, 3, 8, 8, dtype=torch.uint8), torch.arange(6) % 5, seed=1)
    assert targets.shape == (6, 5)
    torch.testing.assert_close(targets.sum(1), torch.ones(6))


def test_mix_spreads() -> None:
    seeds = {mix(s, e, i) for s in range(5) for e in range(20) for i in range(100)}
    assert len(seeds) == 10_000
    assert all(0 <= seed < 2**63 for seed in seeds)
