"""The built-in data: ten classes of drawn shapes as an ImageNet-style folder of JPEG files. A test piece."""

import json
import math
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from alexlab.engine.errors import UserError

FORMAT = 2
SPLITS = {"train": 350, "val": 50, "test": 50}  # images a class
TURN = 0.4  # radians (23 degrees) that a figure is rotated at most; a turned square is another class's look-alike
MARKER = ".demo.json"

Points = list[tuple[float, float]]


def _polygon(n: int, inner: float = 1.0) -> Points:
    """A regular polygon of n corners in the unit circle; with inner < 1 a star of n points."""
    step = n if inner == 1.0 else 2 * n
    return [
        (math.sin(2 * math.pi * i / step) * (1.0 if i % 2 == 0 or inner == 1.0 else inner),
         -math.cos(2 * math.pi * i / step) * (1.0 if i % 2 == 0 or inner == 1.0 else inner))
        for i in range(step)
    ]  # fmt: skip


def _circle(n: int = 48) -> Points:
    return _polygon(n)


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


_CROSS: Points = [
    (-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3),
    (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3),
]  # fmt: skip
_ARROW: Points = [(0, -1), (0.75, -0.15), (0.28, -0.15), (0.28, 1), (-0.28, 1), (-0.28, -0.15), (-0.75, -0.15)]

# outlines, each filled with the figure's colour or (second, for the ring) cut out again
SHAPES: dict[str, list[Points]] = {
    "arrow": [_ARROW],
    "bar": [[(-1, -0.22), (1, -0.22), (1, 0.22), (-1, 0.22)]],
    "circle": [_circle()],
    "crescent": [_crescent()],
    "cross": [_CROSS],
    "heart": [_heart()],
    "ring": [_circle(), [(0.58 * x, 0.58 * y) for x, y in _circle()]],
    "square": [_polygon(4)],
    "star": [_polygon(5, 0.42)],
    "triangle": [_polygon(3)],
}


def write_demo(
    root: Path, seed: int = 0, image_size: int = 80, per_class: dict[str, int] | None = None, quality: int = 88
) -> None:
    """Write `root/{train,val,test}/<class>/NNNN.jpg`, unless they are there already.

    Args:
        seed: the same seed gives the same bytes.
        image_size: side in pixels.
        per_class: images a class in each split.

    Raises:
        UserError: `root` holds something else.
    """
    counts = per_class or SPLITS
    wanted = {"format": FORMAT, "seed": seed, "image_size": image_size, "per_class": counts, "quality": quality}
    if root.exists() and any(root.iterdir()):
        found = json.loads((root / MARKER).read_text()) if (root / MARKER).is_file() else None
        if found == wanted:
            return
        if found is None:
            raise UserError(
                f"{root} holds files that are not the demo's, and data=demo would write its shapes there: "
                "take your own images with data=folder data.root=PATH, or choose another data.root for the shapes."
            )
        other = ", ".join(
            f"{key}={found.get(key)} instead of {wanted[key]}" for key in wanted if found.get(key) != wanted[key]
        )
        raise UserError(
            f"{root} holds demo images of other settings ({other}): remove that folder, or choose another data.root."
        )
    root.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))  # so that a kill leaves nothing half done
    try:
        beside.chmod(0o755)
        for split_number, (split, count) in enumerate(counts.items()):
            for target, label in enumerate(sorted(SHAPES)):
                folder = beside / split / label
                folder.mkdir(parents=True)
                for i in range(count):
                    rng = np.random.Generator(np.random.PCG64([seed, split_number, target, i]))
                    draw(label, image_size, rng).save(folder / f"{i:04d}.jpg", quality=quality)
        (beside / MARKER).write_text(json.dumps(wanted))
        try:
            if root.is_dir():
                root.rmdir()
            os.rename(beside, root)  # noqa: PTH104
        except OSError:
            if not (root / MARKER).is_file():  # else another process was faster, and its bytes are the same
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def draw(label: str, size: int, rng: np.random.Generator) -> Image.Image:
    """One picture of size x size pixels: background, figure, light noise."""
    pixels = _background(size, rng)
    colour = _far_colour(pixels.mean((0, 1)), rng)
    mask = np.asarray(_mask(label, size, rng), dtype=np.float32)[..., None] / 255
    pixels = pixels * (1 - mask) + colour * mask
    pixels += rng.normal(0, rng.uniform(2, 14), pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _mask(label: str, size: int, rng: np.random.Generator) -> Image.Image:
    over = 4  # drawn larger and scaled down, for smooth edges
    radius = size * rng.uniform(0.28, 0.44)
    middle = size / 2 + rng.uniform(-1, 1, 2) * (size / 2 - radius) * 0.8
    angle = rng.uniform(-TURN, TURN)
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
    """float32 (size, size, 3): plain, a gradient, stripes or blotches of two related colours."""
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


def _far_colour(from_colour: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    while True:
        colour = rng.uniform(0, 255, 3)
        if np.abs(colour - from_colour).sum() > 200:
            return colour
