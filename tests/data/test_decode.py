"""Decoding, cropping and resizing, compared with Pillow and torchvision."""

import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import photo
from PIL import Image, ImageOps
from torchvision.transforms import v2

from alexlab.data import decode
from alexlab.data.sample_rng import SampleRng
from alexlab.data.transforms import SampleTransform


def crop(picture: decode.Picture, box: decode.Box, size: tuple[int, int]) -> np.ndarray:
    """Crop and resize as training does: uint8 (H, W, 3)."""
    out = torch.empty(1, *size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    decode.crop_resize(picture, box, size, (0, 0), out)
    return out[0].permute(1, 2, 0).numpy()


def whole(path: Path) -> np.ndarray:
    """Return all pixels, uint8 (H, W, 3), as training reads them."""
    picture = decode.open_picture(str(path))
    width, height = picture.size
    return crop(picture, (0, 0, width, height), (height, width))


def rotated(path: Path, size: tuple[int, int], orientation: int, **save: object) -> Path:
    exif = Image.Exif()
    exif[decode.ORIENTATION] = orientation
    return photo(path, size, exif=exif, **save)


def difference(one: object, other: object) -> float:
    """Return the mean absolute difference, of 255."""
    return float(np.abs(np.asarray(one).astype(float) - np.asarray(other)).mean())


def reference(path: Path, size: int, short: int) -> np.ndarray:
    """Apply torchvision's evaluation transform."""
    return np.asarray(v2.Compose([v2.Resize(short), v2.CenterCrop(size)])(Image.open(path).convert("RGB")))


@pytest.mark.parametrize("extent", [(500, 375), (375, 500), (257, 300), (160, 128), (60, 300), (40, 50)])
def test_the_center_crop_equals_torchvisions(tmp_path: Path, extent: tuple[int, int]) -> None:
    path = photo(tmp_path / "a.png", extent)
    ours = decode.read(str(path), SampleTransform(112))
    assert difference(ours.permute(1, 2, 0), reference(path, 112, 128)) < 0.05


@pytest.mark.parametrize(("extent", "times"), [((1200, 900), 4), ((1203, 901), 4), ((640, 511), 2), ((2051, 1539), 8)])
def test_decoding_at_a_smaller_scale_gives_nearly_the_same_image(
    tmp_path: Path, extent: tuple[int, int], times: int
) -> None:
    path = photo(tmp_path / "big.jpg", extent, quality=95)
    assert decode.Picture(path.read_bytes()).pixels(times)[1] == times
    ours = decode.read(str(path), SampleTransform(112))
    assert difference(ours.permute(1, 2, 0), reference(path, 112, 128)) < 4


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_a_crop_equals_torchvisions(tmp_path: Path, factor: int) -> None:
    """Of whole pixels of the scaled image; with factor 1 it is the same crop."""
    path = photo(tmp_path / "a.jpg", (800, 600), quality=95)
    left, top, width, height = 96, 40, 104 * factor, 96 * factor
    ours = crop(decode.open_picture(str(path)), (left, top, left + width, top + height), (80, 80))
    image = v2.functional.resized_crop(Image.open(path).convert("RGB"), top, left, height, width, [80, 80])
    assert difference(ours, image) < (1.5 if factor == 1 else 4)


@pytest.mark.parametrize("ending", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_rotation_is_applied(tmp_path: Path, orientation: int, ending: str) -> None:
    path = rotated(tmp_path / f"r.{ending}", (160, 96), orientation, **({"quality": 95} if ending == "jpg" else {}))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    assert decode.Picture(path.read_bytes()).size == expected.shape[1::-1]
    assert np.array_equal(whole(path), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("target", [16, 30, 60])
def test_a_rotated_image_is_scaled_and_cropped_like_an_upright_one(
    tmp_path: Path, orientation: int, target: int
) -> None:
    """With sides that no scale divides: libjpeg rounds them up at the end, which the rotation makes the start."""
    path = rotated(tmp_path / "r.jpg", (505, 387), orientation, quality=95)
    upright = ImageOps.exif_transpose(Image.open(path))
    width, height = upright.size
    ours = decode.read(str(path), SampleTransform(target, crop_ratio=1.0)).permute(1, 2, 0)
    expected = v2.Compose([v2.Resize(target), v2.CenterCrop(target)])(upright)
    assert difference(ours, expected) < 1.2, "a shift by a pixel would make 2"
    left, top = 8, 16  # whole pixels of all scales, and a side of the stored image
    right, bottom = width if orientation in (1, 4, 5, 8) else width - 9, height - 8
    box = (left, top, right, bottom)
    expected = upright.resize((target, target), Image.Resampling.BILINEAR, box=box)
    assert difference(crop(decode.open_picture(str(path)), box, (target, target)), expected) < 2.5


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extent", [(1, 40), (40, 1), (1, 1)])
def test_images_one_pixel_wide_are_rotated(tmp_path: Path, orientation: int, extent: tuple[int, int]) -> None:
    path = rotated(tmp_path / "r.jpg", extent, orientation, quality=95)
    assert np.array_equal(whole(path), np.asarray(ImageOps.exif_transpose(Image.open(path))))
    assert decode.read(str(path), SampleTransform(8)).shape == (3, 8, 8)


def test_exif_after_the_frame_header_is_applied(tmp_path: Path) -> None:
    path = rotated(tmp_path / "x.jpg", (64, 48), 6)
    raw = path.read_bytes()
    start = raw.index(b"\xff\xe1")
    end = start + 2 + int.from_bytes(raw[start + 2 : start + 4], "big")
    segment, without = raw[start:end], raw[:start] + raw[end:]
    frame = without.index(b"\xff\xc0")
    after = frame + 2 + int.from_bytes(without[frame + 2 : frame + 4], "big")
    path.write_bytes(without[:after] + segment + without[after:])
    assert np.array_equal(whole(path), np.asarray(ImageOps.exif_transpose(Image.open(path))))


def test_an_invalid_orientation_is_ignored(tmp_path: Path) -> None:
    """As text, which some cameras write, and out of range."""
    entries = [struct.pack("<HHI4s", 0x112, 2, 2, b"1\0\0\0"), struct.pack("<HHIHH", 0x112, 3, 1, 9, 0)]
    for entry in entries:
        exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + struct.pack("<I", 0)
        path = photo(tmp_path / "x.jpg", (64, 48), exif=exif)
        assert np.array_equal(whole(path), np.asarray(Image.open(path)))


def test_the_rotation_of_xmp_is_applied(tmp_path: Path) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    path = photo(tmp_path / "x.jpg", (64, 48), xmp=xmp)
    assert np.array_equal(whole(path), np.asarray(ImageOps.exif_transpose(Image.open(path))))
    assert whole(path).shape == (64, 48, 3)


def test_jpegs_of_other_kinds_are_decoded_by_simplejpeg(tmp_path: Path) -> None:
    source = Image.open(photo(tmp_path / "source.png", (323, 241)))
    source.convert("L").save(tmp_path / "grey.jpg", quality=95)
    source.save(tmp_path / "progressive.jpg", progressive=True, quality=95)
    source.save(tmp_path / "full.jpg", subsampling=0, quality=95)
    source.save(tmp_path / "half.jpg", subsampling=1, quality=95)
    source.save(tmp_path / "rgb.jpg", keep_rgb=True, quality=95)
    for name in ("grey", "progressive", "full", "half", "rgb"):
        path = tmp_path / f"{name}.jpg"
        header = decode.parse_jpeg(path.read_bytes())
        assert header is not None, "simplejpeg decodes it"
        assert header[:2] == ((323, 241), 1)
        assert np.array_equal(whole(path), np.asarray(Image.open(path).convert("RGB"))), name


def test_a_jpeg_with_blemishes_is_read_as_pillow_reads_it(tmp_path: Path) -> None:
    """Bytes before a marker, of which libjpeg warns; some files of ImageNet have them."""
    path = photo(tmp_path / "x.jpg", (64, 48))
    raw = path.read_bytes()
    path.write_bytes(raw[:-2] + b"\0\0\0" + raw[-2:])
    assert np.array_equal(whole(path), np.asarray(Image.open(path)))


def read_as(path: Path, channels: int) -> np.ndarray:
    """Return all pixels, uint8 (H, W, C)."""
    return decode.open_picture(str(path)).pixels(channels=channels)[0]


def test_grey_is_the_luma_of_each_kind_of_file(tmp_path: Path) -> None:
    source = Image.open(photo(tmp_path / "source.png", (61, 50)))
    rgb = np.asarray(source).astype(float)
    luma = rgb @ [0.299, 0.587, 0.114]
    assert read_as(tmp_path / "source.png", 1).shape == (50, 61, 1)
    assert np.abs(read_as(tmp_path / "source.png", 1)[..., 0] - luma).max() <= 1
    for name, mode, save in (
        ("a.jpg", "RGB", {"quality": 95}), ("b.jpg", "L", {}), ("c.jpg", "CMYK", {"quality": 95}),
        ("a.png", "L", {}), ("b.png", "P", {}), ("c.png", "LA", {}), ("d.png", "RGBA", {}), ("e.webp", "RGB", {}),
    ):  # fmt: skip
        source.convert(mode).save(tmp_path / name, **save)
        with Image.open(tmp_path / name) as opened:
            opened.draft("L", None)  # a JPEG's own luma
            expected = np.asarray(opened if opened.mode == "L" else opened.convert("L"))
        assert np.array_equal(read_as(tmp_path / name, 1)[..., 0], expected), name
        assert difference(expected, luma) < (12 if mode == "P" else 6), name
    Image.fromarray((luma * 257).astype(np.uint16)).save(tmp_path / "16.png")
    assert np.abs(read_as(tmp_path / "16.png", 1)[..., 0] - luma).max() <= 1


def test_alpha_is_that_of_the_file_or_255(tmp_path: Path) -> None:
    source = Image.open(photo(tmp_path / "source.png", (61, 50)))
    ramp = np.tile(np.arange(61, dtype=np.uint8) * 4, (50, 1))
    for name, mode in (
        ("rgb.png", "RGB"),
        ("grey.png", "L"),
        ("a.jpg", "RGB"),
        ("grey.jpg", "L"),
        ("cmyk.jpg", "CMYK"),
    ):
        source.convert(mode).save(tmp_path / name)
        pixels = read_as(tmp_path / name, 4)
        assert pixels.shape == (50, 61, 4)
        assert (pixels[..., 3] == 255).all(), name
        assert np.array_equal(pixels[..., :3], read_as(tmp_path / name, 3)), name
    for name, mode, save in (
        ("a.png", "RGBA", {}),
        ("la.png", "LA", {}),
        ("a.webp", "RGBA", {"lossless": True, "exact": True}),
    ):
        image = source.convert(mode)
        image.putalpha(Image.fromarray(ramp))
        image.save(tmp_path / name, **save)
        pixels = read_as(tmp_path / name, 4)
        assert np.array_equal(pixels[..., 3], ramp), name
        assert np.array_equal(pixels[..., :3], np.asarray(source.convert(mode[:-1]).convert("RGB"))), name
    palette = source.quantize(16)
    palette.save(tmp_path / "p.png", transparency=3)
    assert np.array_equal(read_as(tmp_path / "p.png", 4)[..., 3] == 0, np.asarray(palette) == 3)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA")])
def test_grey_and_rgba_are_cropped_and_resized_as_pillow_does_it(tmp_path: Path, channels: int, mode: str) -> None:
    """Each channel by itself: Pillow would weigh the colours with alpha."""
    image = Image.open(photo(tmp_path / "source.png", (200, 150)))
    image.putalpha(Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (150, 1))))
    image.save(tmp_path / "x.png")
    transform = SampleTransform((32, 48), channels=channels)  # 37 x 55 pixels of 41 x 55
    ours = decode.read(str(tmp_path / "x.png"), transform)
    assert ours.shape == (channels, 32, 48)
    bands = [np.asarray(band.resize((55, 41), Image.Resampling.BILINEAR)) for band in image.convert(mode).split()]
    assert np.abs(ours.numpy().astype(int) - np.stack(bands)[:, 4:36, 4:52]).max() <= 1
    turned = rotated(tmp_path / "turned.jpg", (200, 150), 6)
    upright = ImageOps.exif_transpose(Image.open(turned)).convert(mode)
    bands = [np.asarray(band.resize((55, 73), Image.Resampling.BILINEAR)) for band in upright.split()]
    expected = np.stack(bands)[:, 20:52, 4:52]
    assert difference(decode.read(str(turned), transform), expected) < 1


def test_decoded_pixels_may_have_any_number_of_channels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 60, 7), np.uint8)
    image = SampleTransform(32, crop_ratio=1.0, channels=7)(decode.Pixels(pixels))
    expected = F.interpolate(torch.from_numpy(pixels).permute(2, 0, 1)[None], (32, 38), mode="bilinear", antialias=True)
    assert (image.int() - expected[0, :, :, 3:35].int()).abs().max() <= 1
    with pytest.raises(OSError, match=r"it has 7 channels, but model.in_channels is 3"):
        SampleTransform(32)(decode.Pixels(pixels))


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of_16_bits(path: Path, pixels: np.ndarray) -> Path:
    """Write uint16 (height, width, C) as a PNG, which Pillow does for grey only."""
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels.astype(">u2"))
    body = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_are_scaled_or_refused_if_most_are_unused(channels: int, tmp_path: Path) -> None:
    eight = np.random.default_rng(0).integers(1, 256, (20, 30, channels), dtype=np.uint16)
    pixels = read_as(png_of_16_bits(tmp_path / "full.png", eight * 257), channels)
    assert np.array_equal(pixels, eight)
    for bits in (8, 12):
        path = png_of_16_bits(tmp_path / f"{bits}.png", eight * 2 ** (bits - 8))
        with pytest.raises(
            decode.BrokenImageError, match=r"its 16-bit pixels are all below 4096, so it would be almost"
        ):
            decode.read(str(path), lambda picture: picture.pixels(channels=channels))
    if channels == 1:
        black = png_of_16_bits(tmp_path / "black.png", eight * 0)
        assert not read_as(black, 1).any()


def test_other_kinds_of_numbers_are_right_or_refused(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint16)
    Image.fromarray(grey * 257).save(tmp_path / "white.tif", tiffinfo={262: 0})  # 0 is white
    assert np.array_equal(read_as(tmp_path / "white.tif", 1)[..., 0], 255 - grey)
    body = (grey * 16).astype(">u2").tobytes()
    (tmp_path / "12.pgm").write_bytes(b"P5 30 20 4095\n" + body)  # the file says that 4095 is white
    assert np.abs(read_as(tmp_path / "12.pgm", 1)[..., 0].astype(int) - grey).max() <= 1
    for name, values in (("integers", grey.astype(np.int32)), ("floating-point numbers", grey.astype(np.float32))):
        Image.fromarray(values).save(tmp_path / "a.tif")
        with pytest.raises(
            decode.BrokenImageError, match=f"{name}: save it with eight bits per channel, from 0 to 255"
        ):
            decode.read(str(tmp_path / "a.tif"), lambda picture: picture.pixels())


def test_what_stands_behind_a_picture_is_not_read(tmp_path: Path) -> None:
    """Phones append videos, depth maps and further pictures; limits count the first picture alone."""
    path = photo(tmp_path / "a.jpg", (64, 48))
    encoded = path.read_bytes()
    plain = whole(path)
    for rest in (encoded * 200, b"\0\0\0\x18ftypmp42" + bytes(5000)):
        path.write_bytes(encoded + rest)
        assert np.array_equal(whole(path), plain)
    Image.open(io.BytesIO(encoded)).save(path, "JPEG", progressive=True, quality=95)
    assert decode.scans_of(path.read_bytes()) == path.read_bytes().count(b"\xff\xda") > 5


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no image of a known format"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "Git LFS: run `git lfs pull`"),
        (b"\n<!DOCTYPE html><html>404</html>", "a page of a website"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "an HEIC image"),
        (b"P6\n12x 10\n255\nxxxx", "invalid literal"),
        (b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", b"\0\0\0\1"), "Truncated IHDR chunk"),
        (b"\xff\xd8\xff\xe0\0", "no image of a known format"),
        (b"\xff\xd8\xff\xc0\0\x11\x08\0\0\0\0\x03", "Truncated File Read"),
    ],
)
def test_damaged_files_are_reported_with_their_path(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "bad.jpg"
    path.write_bytes(content)
    with pytest.raises(decode.BrokenImageError, match=rf"bad.jpg cannot be read as an image \(.*{reason}"):
        decode.read(str(path), SampleTransform(32))


@pytest.mark.parametrize("bottom", [8, 48])
def test_a_file_that_was_cut_anywhere_is_reported(tmp_path: Path, bottom: int) -> None:
    """Even if the remaining part would be enough for the crop."""
    path = photo(tmp_path / "x.jpg", (64, 96))
    raw = path.read_bytes()
    top = lambda picture: crop(picture, (0, 0, 60, bottom), (8, 8))  # noqa: E731
    decode.read(str(path), top)
    for end in [*range(0, len(raw) - 2, 7), len(raw) - 2, len(raw) - 1]:
        path.write_bytes(raw[:end])
        with pytest.raises(decode.BrokenImageError, match=r"x.jpg cannot be read as an image"):
            decode.read(str(path), top)


@pytest.mark.parametrize(
    "kind",
    [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"restart_marker_blocks": 3}, {"mode": "L"}],
    ids=str,
)
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_rows_below_the_crop_are_not_decoded_and_the_other_rows_stay_the_same(
    tmp_path: Path, kind: dict, factor: int
) -> None:
    source = Image.open(photo(tmp_path / "source.png", (203, 157))).convert(kind.pop("mode", "RGB"))
    source.save(tmp_path / "x.jpg", **kind)
    encoded = (tmp_path / "x.jpg").read_bytes()
    whole, _ = decode.Picture(encoded).pixels(factor)
    assert whole.shape == (-(-157 // factor), -(-203 // factor), 3)
    for bottom in (1, 16, 33, 64, 100, 140, 157):
        part, used = decode.Picture(encoded).pixels(factor, bottom)
        assert used == factor
        assert len(part) == min(len(whole), -(-(-(-bottom // 16) * 16 + 16) // factor))
        needed = -(-bottom // factor)
        assert np.array_equal(part[:needed], whole[:needed])


def test_a_jpeg_is_decoded_without_further_copies(tmp_path: Path) -> None:
    """Memory is used for the file and its decoded pixels once, and for nothing else of their size."""
    path = photo(tmp_path / "x.jpg", (1024, 1024), quality=90)
    out = torch.empty(1, 600, 600, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    transform = SampleTransform(600, crop_ratio=1.0)
    decode.read(str(path), lambda picture: transform.write(picture, SampleRng(0), out))
    tracemalloc.start()
    try:
        decode.read(str(path), lambda picture: transform.write(picture, SampleRng(0), out))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    decoded = 1024 * 1024 * 3
    assert decoded <= peak < decoded + 2 * path.stat().st_size + 100_000


@pytest.mark.parametrize("size", [(48, 48), (20, 70), (150, 130)])
@pytest.mark.parametrize("channels", [3, 1, 4, 7])
def test_the_private_resize_of_torch_equals_the_public_one(channels: int, size: tuple[int, int]) -> None:
    """The installed torch still has it, with the same arguments."""
    pixels = np.random.default_rng(0).integers(0, 256, (1, 90, 100, channels), np.uint8)
    image = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    expected = F.interpolate(image, size, mode="bilinear", antialias=True)
    out = torch.empty(1, *size, channels, dtype=torch.uint8).permute(0, 3, 1, 2)
    decode._resize(image, size, False, None, None, out=out)
    assert torch.equal(out, expected)
    assert torch.equal(decode._resize(image, size, False, size[0] / 90, size[1] / 100), expected)
