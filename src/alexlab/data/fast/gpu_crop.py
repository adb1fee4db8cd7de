"""Crops, resizes and mirrors a batch of whole images on their device, with what `decode.crop_resize` does to one."""

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 256  # images at once: a GPU holds some 1.4 megabytes an image of 256 x 256 meanwhile


class Cuts(NamedTuple):
    """What is kept of each image of a batch.

    Attributes:
        boxes: int32 (B, 9), see `SampleTransform.cuts`.
        side: of the results, in pixels.
    """

    boxes: Tensor
    side: int


def crop(images: Tensor, cuts: Cuts) -> Tensor:
    """uint8 (B, 3, H, W), on any device -> uint8 (B, 3, side, side), both in channels-last memory.

    Bilinear with a triangle as wide as the scale (Pillow's and torch's antialias=True), as two products with matrices
    of weights. Floats between and one rounding at the end, where the CPU's own pass rounds twice: results differ by 1
    of 255 at most, 2 in rare pixels. On a GPU with 16 bits: of the weights' eleven none is wider than 1 / 2048.
    """
    parts = [
        _crop(some, boxes, cuts.side) for some, boxes in zip(images.split(CHUNK), cuts.boxes.split(CHUNK), strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _crop(images: Tensor, boxes: Tensor, side: int) -> Tensor:
    dtype = torch.float16 if images.device.type == "cuda" else torch.float32
    count, channels, height, width = images.shape
    left, top, right, bottom, rows, columns, at_top, at_left, mirrored = boxes.float().unbind(1)
    down = _weights(top, bottom, rows, at_top, height, side).to(dtype)
    across = _weights(left, right, columns, at_left, width, side).to(dtype)
    across = torch.where(mirrored.bool()[:, None, None], across.flip(1), across)
    pixels = images.permute(0, 2, 3, 1).to(dtype)  # B, H, W, C: as they lie
    lines = torch.bmm(down, pixels.reshape(count, height, width * channels))
    found = torch.einsum("bxw,bywc->byxc", across, lines.view(count, side, width, channels))
    found = found.round_().clamp_(0, 255).to(torch.uint8, memory_format=torch.contiguous_format)
    return found.permute(0, 3, 1, 2)


def _weights(low: Tensor, high: Tensor, size: Tensor, at: Tensor, extent: int, side: int) -> Tensor:
    """float32 (B, side, extent): the share of each of an axis's pixels in each of the result's.

    Args:
        low, high: (B,), the box's ends in pixels.
        size: (B,), the pixels that the box is resized to, of which `side` from `at` on are kept.
        extent: pixels of the axis.
    """
    scale = ((high - low) / size)[:, None, None]
    reach = scale.clamp(min=1)
    place = torch.arange(side, device=low.device, dtype=torch.float32)[None, :, None]
    centre = low[:, None, None] + (place + at[:, None, None] + 0.5) * scale
    # a box is no larger than the image and its result no smaller than `side`, so that no triangle covers more pixels
    taps = min(extent, int(2 * max(1.0, extent / side)) + 2)
    first = (centre - reach + 0.5).floor().clamp(0, extent - taps)
    pixel = first + torch.arange(taps, device=low.device)
    shares = (1 - (pixel + 0.5 - centre).abs() / reach).clamp_(min=0)
    shares *= (pixel >= low[:, None, None]) & (pixel < high[:, None, None])  # as if the box had been cut out before
    shares /= shares.sum(2, keepdim=True)
    return shares.new_zeros(len(low), side, extent).scatter_(2, pixel.long(), shares)
