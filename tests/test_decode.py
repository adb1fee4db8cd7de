"""Decoding, cropping and resizing, against Pillow and torchvision."""

from pathlib import Path

import numpy as np
import pytest
from conftest import photo
from PIL import Image
from torchvision.transforms import v2

from alexlab.data import decode
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


def test_a_name_of_another_format_progressive_and_the_first_of_moving_pictures(tmp_path: Path) -> None:
    source = Image.open(photo(tmp_path / "source.png", (320, 240)))
    other = source.transpose(Image.Transpose.ROTATE_180)
    with (tmp_path / "png.JPEG").open("wb") as opened:  # as one file of ImageNet
        source.save(opened, "PNG")
    source.save(tmp_path / "progressive.jpg", progressive=True, quality=95)
    source.save(tmp_path / "moving.gif", save_all=True, append_images=[other])
    source.save(tmp_path / "moving.webp", save_all=True, append_images=[other], lossless=True)
    for name in ("png.JPEG", "progressive.jpg", "moving.gif", "moving.webp"):
        with decode.open_image(str(tmp_path / name)) as image:
            ours = decode.crop_resize(image, (0, 0, 320, 240), (240, 320)).permute(1, 2, 0).numpy().astype(float)
        assert np.array_equal(ours, np.asarray(Image.open(tmp_path / name).convert("RGB"))), name
        assert np.abs(ours - np.asarray(source)).mean() < 10, f"{name}: a GIF has 256 colours"
        assert np.abs(ours - np.asarray(other)).mean() > 20, name


def test_a_picture_of_too_many_pixels_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = photo(tmp_path / "bomb.png", (80, 70))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(decode.BrokenImageError, match=r"bomb.png cannot be read as an image .*exceeds limit"):
        decode.open_image(str(path))
