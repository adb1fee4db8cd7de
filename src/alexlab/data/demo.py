"""The built-in data: ten classes of drawn shapes, as an ImageNet-style folder of JPEG files."""

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from alexlab.data.folder import new_folder
from alexlab.engine.errors import UserError

FORMAT = 2  # version of the drawings: another version draws different images
IMAGES_PER_CLASS = {"train": 350, "val": 50, "test": 50}
MAX_ROTATION = 0.4  # radians (23 degrees): rotated further, a square looks like another class
SIDE, QUALITY = 80, 88  # in pixels, and of the JPEG files
MARKER = ".demo.json"

Points = list[tuple[float, float]]


def _polygon(n: int, inner: float = 1.0) -> Points:
    """Return a regular polygon of n corners in the unit circle; with inner < 1 a star of n points."""
    corners = n if inner == 1.0 else 2 * n
    radii = [1.0 if i % 2 == 0 or inner == 1.0 else inner for i in range(corners)]
    angles = [2 * math.pi * i / corners for i in range(corners)]
    return [(math.sin(angle) * radius, -math.cos(angle) * radius) for angle, radius in zip(angles, radii, strict=True)]


def _heart() -> Points:
    turns = [2 * math.pi * i / 60 for i in range(60)]
    return [
        (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16)
        for t in turns
    ]


def _crescent() -> Points:
    outer = [(math.cos(t), math.sin(t)) for t in np.linspace(0.6, 2 * math.pi - 0.6, 40)]
    inner = [(0.42 + 0.7 * math.cos(t), 0.7 * math.sin(t)) for t in np.linspace(2 * math.pi - 0.93, 0.93, 40)]
    return outer + inner


_CROSS_X = (-0.3, 0.3, 0.3, 1, 1, 0.3, 0.3, -0.3, -0.3, -1, -1, -0.3)
_CROSS_Y = (-1, -1, -0.3, -0.3, 0.3, 0.3, 1, 1, 0.3, 0.3, -0.3, -0.3)

# outlines: the first is filled with the figure's colour, the second (of the ring) is cut out of it
SHAPES: dict[str, list[Points]] = {
    "arrow": [[(0, -1), (0.75, -0.15), (0.28, -0.15), (0.28, 1), (-0.28, 1), (-0.28, -0.15), (-0.75, -0.15)]],
    "bar": [[(-1, -0.22), (1, -0.22), (1, 0.22), (-1, 0.22)]],
    "circle": [_polygon(48)],
    "crescent": [_crescent()],
    "cross": [list(zip(_CROSS_X, _CROSS_Y, strict=True))],
    "heart": [_heart()],
    "ring": [_polygon(48), [(0.58 * x, 0.58 * y) for x, y in _polygon(48)]],
    "square": [_polygon(4)],
    "star": [_polygon(5, 0.42)],
    "triangle": [_polygon(3)],
}


def write_demo(root: Path, seed: int = 0, per_class: dict[str, int] | None = None) -> None:
    """Write `root/{train,val,test}/<class>/NNNN.jpg`, unless these files exist.

    Args:
        seed: the same seed gives the same bytes.
        per_class: images per class of each split.

    Raises:
        UserError: `root` contains files of the user, or demo images of different settings.
    """
    counts = per_class or IMAGES_PER_CLASS
    wanted = {"format": FORMAT, "seed": seed, "image_size": SIDE, "per_class": counts, "quality": QUALITY}
    if root.exists() and any(root.iterdir()):
        if not (root / MARKER).is_file():
            raise UserError(
                f"{root} contains files that are not the demo's, and data=demo would write shapes into it: use your "
                "own images with data=folder data.root=PATH, or choose another data.root for the shapes."
            )
        if (saved := json.loads((root / MARKER).read_text())) != wanted:
            raise UserError(
                f"{root} contains demo images of {saved} instead of {wanted}: remove it, or choose another data.root."
            )
        return
    with new_folder(root, MARKER) as folder:
        for split_number, (split, count) in enumerate(counts.items()):
            for target, label in enumerate(sorted(SHAPES)):
                (folder / split / label).mkdir(parents=True)
                for i in range(count):
                    rng = np.random.Generator(np.random.PCG64([seed, split_number, target, i]))
                    draw(label, SIDE, rng).save(folder / split / label / f"{i:04d}.jpg", quality=QUALITY)
        (folder / MARKER).write_text(json.dumps(wanted))


def draw(label: str, size: int, rng: np.random.Generator) -> Image.Image:
    """Draw an image of size x size pixels: background, figure, light noise."""
    pixels = _background(size, rng)
    while True:  # a colour that differs from the background
        colour = rng.uniform(0, 255, 3)
        if np.abs(colour - pixels.mean((0, 1))).sum() > 200:
            break
    mask = np.asarray(_mask(label, size, rng), dtype=np.float32)[..., None] / 255
    pixels = pixels * (1 - mask) + colour * mask
    pixels += rng.normal(0, rng.uniform(2, 14), pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _mask(label: str, size: int, rng: np.random.Generator) -> Image.Image:
    over = 4  # drawn larger and scaled down, for smooth edges
    radius = size * rng.uniform(0.28, 0.44)
    middle = size / 2 + rng.uniform(-1, 1, 2) * (size / 2 - radius) * 0.8
    angle = rng.uniform(-MAX_ROTATION, MAX_ROTATION)
    cos, sin = math.cos(angle), math.sin(angle)
    image = Image.new("L", (size * over, size * over))
    pen = ImageDraw.Draw(image)
    for i, outline in enumerate(SHAPES[label]):
        corners = [
            ((middle[0] + radius * (x * cos - y * sin)) * over, (middle[1] + radius * (x * sin + y * cos)) * over)
            for x, y in outline
        ]
        pen.polygon(corners, fill=0 if i else 255)
    return image.resize((size, size), Image.Resampling.BOX)


def _background(size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw float32 (size, size, 3): plain, a gradient, stripes or blotches of two related colours."""
    first = rng.uniform(20, 235, 3)
    second = (first + rng.normal(0, 28, 3)).clip(0, 255)
    y, x = np.mgrid[0:size, 0:size] / size
    kind, angle = rng.integers(4), rng.uniform(0, math.pi)
    along = x * math.cos(angle) + y * math.sin(angle)
    if kind == 0:
        weight = np.zeros((size, size))
    elif kind == 1:
        weight = (along - along.min()) / (np.ptp(along) + 1e-9)
    elif kind == 2:
        weight = (np.sin(along * rng.uniform(12, 40)) > 0).astype(float)
    else:
        coarse = Image.fromarray((rng.random((6, 6)) * 255).astype(np.uint8))
        weight = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)) / 255
    return (first * (1 - weight[..., None]) + second * weight[..., None]).astype(np.float32)
