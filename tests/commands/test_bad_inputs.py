"""Each row of the two tables in docs/data.md, and files that were damaged at random."""

import contextlib
import io
import os
import random
import re
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, photo, summary_of, tiny_train
from PIL import Image, ImageOps
from test_decode import whole as pixels_of

from alexlab.data import decode
from alexlab.data.datamodule import ImageFolders
from alexlab.data.transforms import SampleTransform
from alexlab.engine.errors import UserError

# -- files


def encoded(image: Image.Image, kind: str, **save: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **save)  # type: ignore[arg-type]
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour: int, packed: bytes, more: bytes = b"") -> bytes:
    """Write a PNG (third edition, sections 5 and 11); `packed` are the filtered rows."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header), more, chunk(b"IDAT", packed), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def black(width: int, height: int) -> bytes:
    """Write a PNG of one bit per pixel, packed row by row."""
    packer = zlib.compressobj(1)
    row = bytes(1 + width // 8)
    return png(width, height, 1, 0, b"".join(packer.compress(row) for _ in range(height)) + packer.flush())


def damaged(raw: bytes, at: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 0xFF]) + raw[at + 1 :]


def source() -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((96, 72), Image.Resampling.BICUBIC)


def rotated(kind: str = "JPEG", **save: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(source(), kind, exif=exif, **({"quality": 95} if kind == "JPEG" else save))


def upright(raw: bytes) -> np.ndarray:
    """Return the pixels rotated by 90 degrees clockwise, which is orientation 6 of EXIF 2.32."""
    if raw[:2] == b"\xff\xd8":
        return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(raw))))
    return np.asarray(source().transpose(Image.Transpose.ROTATE_270))


def many_scans() -> bytes:
    """Repeat the last scan of a progressive JPEG, each of which decodes all pixels again."""
    raw = encoded(source(), "JPEG", progressive=True)
    last = raw[raw.rindex(b"\xff\xda") : -2]
    return raw[:-2] + last * 300 + raw[-2:]


def grey16() -> bytes:
    return png(4, 1, 16, 0, zlib.compress(b"\0" + struct.pack(">4H", 0, 0x1234, 0x8000, 0xFFFF)))


def rgb16() -> bytes:
    return png(2, 1, 16, 2, zlib.compress(b"\0" + struct.pack(">6H", 0, 0x1234, 0x8000, 0xFFFF, 0x0100, 0x00FF)))


def floats() -> bytes:
    return encoded(Image.fromarray(np.linspace(0, 1, 48, dtype=np.float32).reshape(6, 8)), "TIFF")


ZTXT = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000)))
PAGES = {"save_all": True, "append_images": [source().rotate(180)]}

FILES: dict[str, Callable[[], bytes]] = {
    "truncated JPEG": lambda: encoded(source(), "JPEG")[:1000],
    "truncated PNG": lambda: encoded(source(), "PNG")[:2000],
    "PNG with a damaged byte": lambda: damaged(encoded(source(), "PNG"), 2000),
    "JPEG with a damaged byte": lambda: damaged(encoded(source(), "JPEG"), 1000),
    "empty file": lambda: b"",
    "text": lambda: b"a cat\n" * 20,
    "HTML page instead of the image": lambda: b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "pointer of Git LFS": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "HEIC image called .jpg": lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "archive or other data": lambda: b"PK\x03\x04" + bytes(range(256)) * 4,
    "EPS, for which Pillow would start Ghostscript": lambda: (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(%pipe%touch /tmp/no) (w) file\n"
    ),
    "floating-point TIFF": floats,
    "PNG of 400 megapixels": lambda: black(20_000, 20_000),
    "JPEG of 400 megapixels": lambda: encoded(Image.new("L", (20_000, 20_000)), "JPEG"),
    "JPEG of 120 megapixels": lambda: encoded(Image.new("L", (12_000, 10_000)), "JPEG"),
    "PNG of 120 megapixels": lambda: black(12_000, 10_000),
    "PNG with a text that unpacks to 100 MB": lambda: png(1, 1, 8, 2, zlib.compress(bytes(4)), ZTXT),
    "grey JPEG": lambda: encoded(source().convert("L"), "JPEG"),
    "CMYK JPEG": lambda: encoded(source().convert("CMYK"), "JPEG"),
    "1-bit PNG": lambda: encoded(source().convert("1"), "PNG"),
    "grey PNG with alpha": lambda: encoded(source().convert("LA"), "PNG"),
    "RGB PNG with alpha": lambda: encoded(source().convert("RGBA"), "PNG"),
    "PNG with a palette": lambda: encoded(source().convert("P"), "PNG"),
    "PNG with a palette and a transparent colour": lambda: encoded(source().convert("P"), "PNG", transparency=3),
    "16-bit grey PNG": grey16,
    "16-bit RGB PNG": rgb16,
    "rotated by EXIF": rotated,
    "animated GIF": lambda: encoded(source(), "GIF", **PAGES),
    "animated WebP": lambda: encoded(source(), "WEBP", lossless=True, **PAGES),
    "TIFF of several pages": lambda: encoded(source(), "TIFF", **PAGES),
    "PNG called .jpg": lambda: encoded(source(), "PNG"),
    "rotated by EXIF, as TIFF": lambda: rotated("TIFF"),
    "rotated by EXIF, as WebP": lambda: rotated("WEBP", lossless=True),
    "rotated by EXIF, as PNG": lambda: rotated("PNG"),
    "16-bit grey PNG that uses 12 bits": lambda: encoded(Image.fromarray(np.uint16([[0, 7, 0xFFF]])), "PNG"),
    "16-bit grey TIFF of which 0 is white": lambda: encoded(
        Image.fromarray(np.uint16([[0xFFFF, 0xEDFF, 0x7FFF, 0]])), "TIFF", tiffinfo={262: 0}
    ),
    "TIFF of 32-bit integers": lambda: encoded(Image.fromarray(np.array([[-5, 0, 0x1234, 0x7FFF]], np.int32)), "TIFF"),
    "JPEG of 300 scans": many_scans,
    "bytes after the end of the JPEG": lambda: encoded(source(), "JPEG") + b"more" * 99,
    "one pixel": lambda: encoded(source().crop((0, 0, 1, 1)), "PNG"),
    "3,000 pixels by one": lambda: encoded(source().resize((3000, 1)), "JPEG"),
}
# the right pixels if Pillow's are not: the upper byte of 16 bits; what a viewer shows; the first image only
RIGHT: dict[str, Callable[[bytes], np.ndarray]] = {
    "16-bit grey PNG": lambda _: np.repeat(np.uint8([[[0], [0x12], [0x80], [0xFF]]]), 3, 2),
    "16-bit RGB PNG": lambda _: np.uint8([[[0, 0x12, 0x80], [0xFF, 1, 0]]]),
    **{kind: upright for kind in FILES if kind.startswith("rotated by EXIF")},
    "16-bit grey TIFF of which 0 is white": lambda _: np.repeat(np.uint8([[[0], [0x12], [0x80], [0xFF]]]), 3, 2),
    "animated WebP": lambda _: np.asarray(source()),
    "TIFF of several pages": lambda _: np.asarray(source()),
    "PNG called .jpg": lambda _: np.asarray(source()),
    "RGB PNG with alpha": lambda _: np.asarray(source()),
    "JPEG of 120 megapixels": lambda _: np.zeros((10_000, 12_000, 3), np.uint8),
    "PNG of 120 megapixels": lambda _: np.zeros((10_000, 12_000, 3), np.uint8),
}


def table(first: str) -> dict[str, str]:
    """Return the rows of the table in docs/data.md whose header begins with `first`."""
    text = (ROOT / "docs/data.md").read_text()
    _, _, below = text.partition(f"| {first} |")
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", below.partition("\n\n")[0], re.MULTILINE)
    return {kind: outcome for kind, outcome in rows if not kind.startswith("-")}


def test_the_tables_list_the_kinds_that_are_tested() -> None:
    assert set(table("file")) == set(FILES)
    assert len(FILES) >= 27
    assert set(table("in the folder")) == set(FOLDERS)
    assert len(FOLDERS) >= 14


@pytest.mark.parametrize("kind", FILES)
def test_each_kind_of_file_gives_the_documented_result(kind: str, tmp_path: Path) -> None:
    outcome = table("file")[kind]
    path = tmp_path / "x.jpg"
    path.write_bytes(FILES[kind]())
    if outcome.startswith("error: "):
        with pytest.raises(decode.BrokenImageError) as raised:
            decode.read(str(path), SampleTransform(32))
        assert f"{path} cannot be read as an image ({outcome.removeprefix('error: ')}" in str(raised.value)
        return
    assert outcome.startswith("read")
    assert decode.read(str(path), SampleTransform(32)).shape == (3, 32, 32)
    if "megapixels" in kind and "PNG" in kind:
        return  # its pixels would take another gigabyte
    right = RIGHT.get(kind, lambda raw: np.asarray(Image.open(io.BytesIO(raw)).convert("RGB")))
    assert np.array_equal(pixels_of(path), right(path.read_bytes()))


# -- folders


def images(root: Path, *names: str) -> None:
    for n, name in enumerate(names):
        photo(root / name, (48, 40), seed=n)


def broken_name(root: Path) -> None:
    raw = os.fsencode(root / "train/cat") + b"/\xff\xfe.jpg"
    with open(raw, "wb") as file:
        file.write((root / "train/cat/1.jpg").read_bytes())


def link_elsewhere(root: Path) -> None:
    images(root / ".elsewhere", "1.jpg", "2.jpg")
    (root / "train/cat/more").symlink_to(root / ".elsewhere")


def deeper(root: Path) -> None:
    for split in ("train", "val"):
        (root / split).rename(root / ".gone")
        (root / split).mkdir()
        (root / ".gone").rename(root / split / "images")


def link_called_jpg(root: Path) -> None:
    link_elsewhere(root)
    (root / "train/cat/more").rename(root / "train/cat/x.jpg")


def others(root: Path) -> None:
    for name in ("a.txt", "b.TXT", "c.heic"):
        (root / "train/cat" / name).touch()


# a change to a folder with two images of two classes in train and val, and how many images it has afterwards
FOLDERS: dict[str, tuple[Callable[[Path], object], int]] = {
    "a link in a circle": (lambda root: (root / "train/cat/round").symlink_to(root / "train/cat"), 0),
    "a class of val that train lacks": (lambda root: images(root, "val/zebra/1.jpg"), 0),
    "a class of train that val lacks": (lambda root: (root / "val/dog").rename(root / ".gone"), 6),
    "an empty class in train": (lambda root: (root / "train/empty").mkdir(), 0),
    "a class that may not be read": (lambda root: (root / "train/dog").chmod(0), 0),
    "no val": (lambda root: (root / "val").rename(root / ".gone"), 0),
    "hidden folders, and those of archives and network disks": (
        lambda root: images(root, "train/.git/1.jpg", "train/__MACOSX/1.jpg", "train/cat/@eaDir/1.jpg"), 8),
    "hidden files": (lambda root: images(root, "train/cat/._1.jpg"), 8),
    "val called Valid": (lambda root: (root / "val").rename(root / "Valid"), 8),
    "train and val called seg_train and seg_val": (
        lambda root: [(root / name).rename(root / f"seg_{name}") for name in ("train", "val")], 0),
    "another folder beside train and val": (lambda root: images(root, "extra/1.jpg"), 8),
    "train and val within each class": (lambda root: images(root, "train/cat/train/1.jpg", "train/cat/val/1.jpg"), 0),
    "a class that is a link to another class": (lambda root: (root / "train/wolf").symlink_to(root / "train/dog"), 0),
    "files with other suffixes": (others, 8),
    "images outside of the class folders": (lambda root: images(root, "train/1.jpg"), 8),
    "a suffix in capitals": (lambda root: (root / "train/cat/1.jpg").rename(root / "train/cat/1.JPG"), 8),
    "folders within a class": (lambda root: images(root, "train/cat/deep/deeper/1.jpg"), 9),
    "a link to a folder elsewhere": (link_elsewhere, 10),
    "names in no encoding": (broken_name, 9),
    "a class or split that is a link to a folder that is gone": (
        lambda root: (root / "train/fox").symlink_to(root / "gone"), 0),
    "a broken link": (lambda root: (root / "train/cat/x.jpg").symlink_to(root / "nowhere.jpg"), 9),
    "a pipe (FIFO) called .jpg": (lambda root: os.mkfifo(root / "train/cat/x.jpg"), 9),
    "a folder called .jpg": (lambda root: images(root, "train/cat/x.jpg/1.jpg"), 9),
    "a link called .jpg to a folder": (link_called_jpg, 10),
    "a link to a device called .jpg": (lambda root: (root / "train/cat/x.jpg").symlink_to("/dev/zero"), 9),
    "classes one level deeper": (deeper, 0),
}  # fmt: skip


@contextmanager
def as_nobody() -> Iterator[None]:
    """Give up root's permissions, with which everything can be read."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def data_of(root: Path, **more: object) -> ImageFolders:
    return ImageFolders(
        str(root), 2, 0, SampleTransform(32, "random_resized"), SampleTransform(32), num_workers=1, **more  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize("kind", FOLDERS)
def test_each_kind_of_folder_gives_the_documented_result(kind: str) -> None:
    outcome, (change, count) = table("in the folder")[kind], FOLDERS[kind]
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # pytest's own may be entered by its user alone
        root = Path(folder)
        root.chmod(0o755)
        images(
            root,
            *(f"{split}/{label}/{n}.jpg" for split in ("train", "val") for label in ("cat", "dog") for n in (1, 2)),
        )
        change(root)
        if "error before the run: " in outcome:
            with as_nobody(), pytest.raises(UserError, match=re.escape(outcome.partition("run: ")[2])):
                data_of(root).read()
            return
        data = data_of(root).read()
        assert sum(data.images.values()) == count
        assert {split.targets.max() for split in data.splits.values()} <= {0, 1}
        warning = outcome.partition("warning: ")[2]
        assert len(data.notes()) == bool(warning)
        assert not warning or data.notes()[0].endswith(warning)
        error = outcome.partition("error with its path: ")[2]
        with pytest.raises(UserError) if error else contextlib.nullcontext() as raised:
            seen = sum(len(batch.targets) for batch in data.train_dataloader())
            assert seen == data.images["train"] // 2 * 2
        assert not error or f"{root}/train/cat/x.jpg cannot be read as an image ({error}" in str(raised.value)


# -- skipped, counted, and too many


@pytest.fixture
def with_broken(tmp_path: Path) -> Path:
    """Sixteen good images of two classes, and each kind of file that is an error."""
    root = tmp_path / "data"
    for split in ("train", "val"):
        images(
            root, *(f"{split}/{label}/{n}.jpg" for label in ("cat", "dog") for n in range(8 if split == "train" else 2))
        )
    kinds = [kind for kind, outcome in table("file").items() if outcome.startswith("error") and "mega" not in kind]
    for n, kind in enumerate(kinds):
        (root / f"train/cat/bad{n}.jpg").write_bytes(FILES[kind]())
    return root


def test_broken_images_are_counted_and_listed(with_broken: Path, tmp_path: Path) -> None:
    words = ["data.on_error=skip", "data.batch_size=1", "trainer.limit_train_batches=null", "test=false"]
    done = tiny_train(with_broken, tmp_path / "run", *words, "model.name=squeezenet1_1")
    assert done.returncode == 0, done.stderr
    bad = sorted(str(path) for path in with_broken.glob("train/cat/bad*.jpg"))
    assert len(bad) == 15
    assert sorted(summary_of(tmp_path / "run")["skipped_images"]) == bad
    assert "skipped 15 broken images: " in done.stdout + done.stderr
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert sorted(saved["callbacks"]["Checkpointing"]["skipped"]) == bad, "a resumed run has them"


def test_too_many_broken_images_end_the_run(with_broken: Path, tmp_path: Path) -> None:
    words = ["data.on_error=skip", "data.batch_size=1", "trainer.limit_train_batches=null", "data.max_bad=9"]
    done = tiny_train(with_broken, tmp_path / "run", *words, "model.name=squeezenet1_1")
    assert done.returncode == 2
    assert "10 images are broken, more than data.max_bad=9: " in done.stderr
    assert done.stderr.count("cannot be read as an image (") == 5, "some of them, with what is wrong"
    assert "Traceback" not in done.stderr


# -- damaged at random


def mutate(raw: bytes, draw: random.Random) -> bytes:
    """Change, remove or repeat bytes, or cut the end."""
    changed = bytearray(raw)
    for _ in range(draw.choice([1, 1, 2, 8, 64])):
        at = draw.randrange(len(changed))
        match draw.randrange(6):
            case 0:
                changed[at] ^= 1 << draw.randrange(8)
            case 1:
                changed[at] = draw.choice([0, 0xFF, 0x7F, 0x80])
            case 2:
                del changed[at : at + draw.randrange(1, 32)]
            case 3:
                changed[at:at] = changed[at : at + draw.randrange(1, 32)]
            case 4:
                changed[at : at + 4] = struct.pack(
                    ">I", draw.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, draw.getrandbits(16)])
                )
            case 5:
                del changed[max(64, at) :]
        if not changed:
            changed = bytearray(b"\xff")
    return bytes(changed)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_each_of_5000_damaged_files_is_an_image_or_an_error(kind: str, tmp_path: Path) -> None:
    """No other exception, no crash (the process would be gone), no leak, and no image of absurd size."""
    draw = random.Random(kind)
    small = source().resize((40, 30))
    seeds = [encoded(small, kind), encoded(small.convert("L"), kind), encoded(source(), kind)]
    seeds += [encoded(small, kind, **({"progressive": True} if kind == "JPEG" else {"compress_level": 0}))]
    path = tmp_path / f"x.{kind.lower()}"
    process, transform = psutil.Process(), SampleTransform(24, "random_resized")
    counts = {"image": 0, "error": 0}
    before = 0
    for n in range(5_000):
        path.write_bytes(mutate(draw.choice(seeds), draw))
        try:
            assert decode.read(str(path), transform).shape == (3, 24, 24)
            counts["image"] += 1
        except decode.BrokenImageError as error:
            counts["error"] += str(path) in str(error)
        if n == 1_000:
            before = process.memory_info().rss
    assert sum(counts.values()) == 5_000
    assert min(counts.values()) > 50, "both happen"
    assert process.memory_info().rss - before < 50e6
