"""Figures that are drawn pixel by pixel, tiles of images with captions and filters, and how all figures are written.

Unlike `plots.py` this does not import Matplotlib, which takes half a second.
"""

import contextlib
import functools
import importlib.util
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from alexlab.engine.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = 7  # inches: the width of a page's text, with room to spare
DPI = 160  # of figures in PNG
GAP = 4  # pixels between tiles
TEXT = 12  # font size in pixels
TITLE = TEXT + 2 * GAP  # height of the title in pixels
INK, PAPER = (20, 20, 20), (255, 255, 255)
# usual fonts with many letters that DejaVu Sans lacks, such as those of Chinese, Japanese and Korean
WIDE = re.compile("CJK|Han Sans|WenQuanYi|Fallback|UMing|YaHei|SimHei|SimSun|PingFang|Hiragino|Gothic|Malgun|Nanum")

log = logging.getLogger("alexlab")


@contextlib.contextmanager
def optional(what: str) -> Iterator[None]:
    """Turn any error in this block, which draws or logs `what`, into a warning: the run and its numbers are fine."""
    try:
        yield
    except Exception as error:  # whatever libraries raise
        log.warning("%s could not be drawn or logged (%s: %s).", what, type(error).__name__, str(error)[:200])


def tiles(
    images: Sequence[np.ndarray], title: str, captions: Sequence[Sequence[str]] = (), columns: int = 4
) -> Image.Image:
    """Draw images side by side, each above the lines of a caption.

    Args:
        images: uint8 (H, W, C), all of one size; small ones are enlarged by a whole factor.
        title: a line above all images.
        captions: the lines of each image, equally many for all; empty for no captions.
    """
    height, width = images[0].shape[:2]
    times = max(1, 144 // max(height, width))
    height, width = height * times, width * times
    lines = len(captions[0]) if captions else 0
    step = height + GAP + lines * (TEXT + 3)
    rows = -(-len(images) // columns)

    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, TITLE + rows * (step + GAP) + GAP), PAPER)
    ImageDraw.Draw(sheet).text((GAP, GAP), title, INK, ImageFont.truetype(_dejavu(), TEXT))
    for i, image in enumerate(images):
        x, y = GAP + i % columns * (width + GAP), TITLE + GAP + i // columns * (step + GAP)
        sheet.paste(Image.fromarray(as_rgb(image)).resize((width, height), Image.Resampling.NEAREST), (x, y))
        for n, line in enumerate(captions[i] if captions else ()):
            strip = Image.new("RGB", (width, TEXT + 3), PAPER)  # cuts a long line
            font = ImageFont.truetype(fonts_for(line)[0][-1][1], TEXT)
            ImageDraw.Draw(strip).text((0, TEXT), line, INK, font, "ls")
            sheet.paste(strip, (x, y + height + 2 + n * (TEXT + 3)))
    return sheet


def as_rgb(image: np.ndarray) -> np.ndarray:
    """Return uint8 (H, W, 3) of an image (H, W, C): RGBA is laid over white; 1, 2, 5, ... channels become grey."""
    if image.shape[2] == 4:
        alpha = image[..., 3:] / 255
        return (image[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
    return image if image.shape[2] == 3 else image.mean(2, keepdims=True).astype(np.uint8).repeat(3, 2)


def filters(weights: Tensor, groups: int = 1) -> Image.Image:
    """Draw the filters of a first convolution as tiles: zero is grey, and each is scaled by the largest weight in it.

    Args:
        weights: float (maps, channels, H, W); the first three of three or four channels are drawn as red, green and
            blue, another number as the mean.
        groups: number of groups of maps, which are drawn below each other with a gap.
    """
    weights = weights[:, :3] if weights.shape[1] in (3, 4) else weights.mean(1, keepdim=True)
    largest = weights.abs().amax((1, 2, 3), keepdim=True)
    pixels = 0.5 + 0.5 * weights / torch.where(largest > 0, largest, 1)
    times = max(2, 48 // weights.shape[-1])
    parts = pixels.repeat_interleave(times, 2).repeat_interleave(times, 3).chunk(groups)
    grids = [make_grid(part, nrow=16 if len(part) >= 32 else 8, padding=GAP, pad_value=1) for part in parts]
    gap = torch.ones(3, 2 * GAP, grids[0].shape[2])
    return to_pil_image(torch.cat([part for grid in grids for part in (grid, gap)][:-1], 1))


# -- files


def save(picture: "Image.Image | Figure", path: Path) -> Path:
    """Write a figure to X.png, or, for a paper, to X.svg or X.pdf, at most PAGE inches wide, and return the path."""
    kind = path.suffix[1:]
    with atomic_write(path) as file:
        if isinstance(picture, Image.Image) and kind == "png":
            picture.save(file, "PNG")
            return path
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        if isinstance(picture, Image.Image):
            dpi = max(DPI, picture.width / PAGE)
            figure = Figure((picture.width / dpi, picture.height / dpi), dpi=dpi)
            figure.figimage(np.asarray(picture))
        else:
            figure, dpi = picture, DPI
        with rc_context({"pdf.fonttype": 42}):  # publishers refuse fonts of type 3
            figure.savefig(file, format=kind, dpi=dpi)
    return path


# -- fonts


def fonts_for(text: str) -> tuple[list[tuple[str, str]], str]:
    """Return the (family, file) of fonts that together have the letters of a text, and the letters that none has.

    DejaVu Sans, which comes with Matplotlib, is the first, and usually the only one.
    """
    fonts = [("DejaVu Sans", _dejavu())]
    missing = {letter for letter in text if letter > "\u02af" and ord(letter) not in _letters_of(fonts[0][1])}
    if missing:
        from matplotlib.font_manager import fontManager  # takes half a second

        usual = {font.name: font.fname for font in fontManager.ttflist if font.weight == 400 and font.style == "normal"}
        for family, file in sorted(usual.items()):
            known = {letter for letter in missing if ord(letter) in _letters_of(file)} if WIDE.search(family) else ()
            if known:
                missing -= known
                fonts.append((family, file))
    return fonts, "".join(sorted(missing))


@functools.cache
def _letters_of(file: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(file).get_charmap())


@functools.cache
def _dejavu() -> str:
    spec = importlib.util.find_spec("matplotlib")  # does not import it
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).with_name("mpl-data") / "fonts/ttf/DejaVuSans.ttf")
