"""Build and try transforms of your own: `augment.transforms` and `augment.batch`."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from alexlab.data import decode
from alexlab.data.sample_rng import SampleRng
from alexlab.data.transforms import SampleTransform
from alexlab.data.user_transforms import UserTransforms
from alexlab.engine import targets
from alexlab.engine.errors import UserError
from alexlab.engine.schema import TrainConfig
from alexlab.tasks.augment import BatchAugment

TRIES = 3  # images; a transform may draw which of several things it does


def build_transforms(config: TrainConfig, trusted: targets.Trusted = ()) -> UserTransforms | None:
    """Build `augment.transforms`; None if the list is empty."""
    nodes = enumerate(config.augment.transforms)
    transforms = [build_callable(node, f"augment.transforms[{i}]", trusted) for i, node in nodes]
    return UserTransforms(transforms) if transforms else None


def build_callable(node: dict[str, Any], key: str, trusted: targets.Trusted) -> Callable[..., Any]:
    """Build the transform that the setting `key` names."""
    words = "function of images: give a class with __call__, or a function with `_partial_: true`"
    node = node if trusted is None else targets.without_weights(node, trusted)
    return targets.build_part(key, node, Callable, words, trusted)


def try_transforms(train: SampleTransform) -> None:
    """Transform images of noise by the transform of training images. Raises UserError if that does not work."""
    height, width = train.size
    shape = 2 * height, 3 * width, train.channels
    noise = decode.Pixels(np.random.Generator(np.random.PCG64(0)).integers(0, 256, shape, np.uint8))
    with _as_mistakes():
        for transform in [train.at(first - 1) for first, _ in train.sizes] or [train]:
            for seed in range(TRIES):
                transform(noise, SampleRng(seed))


def try_batch(augment: BatchAugment, shape: tuple[int, ...]) -> None:
    """Transform black images (C, H, W) by `augment.batch`, if it is set. Raises UserError if that does not work."""
    if augment.batch is not None:
        with _as_mistakes():
            augment.by_batch(torch.zeros(2, *shape, dtype=torch.uint8), seed=0)


@contextlib.contextmanager
def _as_mistakes() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise UserError(str(error)) from error
