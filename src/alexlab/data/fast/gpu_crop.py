"""Crop, resize and mirror a batch of images on their device, as `decode.crop_resize` does to one image."""

import torch
from torch import Tensor

CHUNK = 256  # images at once: cropping an image of 256 x 256 takes about 1.4 MB of a GPU's memory


def crop(images: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop uint8 (B, C, H, W), on any device, to uint8 (B, C, `size`), both in channels-last memory.

    The resizing is bilinear with a triangle as wide as the scale (antialias=True of Pillow and torch), as two products
    with matrices of weights. Floats are rounded once, at the end, while the CPU rounds twice: results
    differ by at most 1 of 255, in rare pixels by 2. A GPU computes in float16, whose 11 bits make steps of the weights
    no larger than 1 / 2048.

    Args:
        boxes: int32 (B, 9), see `SampleTransform.crop_boxes`.
    """
    chunks = zip(images.split(CHUNK), boxes.split(CHUNK), strict=True)
    parts = [_crop(part, part_boxes, *size) for part, part_boxes in chunks]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _crop(images: Tensor, boxes: Tensor, high: int, wide: int) -> Tensor:
    dtype = torch.float16 if images.device.type == "cuda" else torch.float32
    count, channels, height, width = images.shape
    left, top, right, bottom, rows, columns, at_top, at_left, mirrored = boxes.float().unbind(1)
    down = _weights(top, bottom, rows, at_top, height, high).to(dtype)
    across = _weights(left, right, columns, at_left, width, wide).to(dtype)
    across = torch.where(mirrored.bool()[:, None, None], across.flip(1), across)
    pixels = images.permute(0, 2, 3, 1).to(dtype)  # B, H, W, C: as in memory
    lines = torch.bmm(down, pixels.reshape(count, height, width * channels))
    result = torch.einsum("bxw,bywc->byxc", across, lines.view(count, high, width, channels))
    result = result.round_().clamp_(0, 255).to(torch.uint8, memory_format=torch.contiguous_format)
    return result.permute(0, 3, 1, 2)


def _weights(low: Tensor, high: Tensor, size: Tensor, at: Tensor, extent: int, side: int) -> Tensor:
    """Return float32 (B, side, extent): the weight of each pixel of an axis in each pixel of the result.

    Args:
        low, high: (B,), the ends of the box in pixels.
        size: (B,), the number of pixels that the box is resized to.
        at: (B,), the first of these pixels that is in the result.
        extent: pixels of the axis.
        side: pixels of the result.
    """
    scale = ((high - low) / size)[:, None, None]
    reach = scale.clamp(min=1)
    place = torch.arange(side, device=low.device, dtype=torch.float32)[None, :, None]
    centre = low[:, None, None] + (place + at[:, None, None] + 0.5) * scale
    # high - low <= extent and size >= side, so no triangle covers more pixels
    taps = min(extent, int(2 * max(1.0, extent / side)) + 2)
    first = (centre - reach + 0.5).floor().clamp(0, extent - taps)
    pixel = first + torch.arange(taps, device=low.device)
    weights = (1 - (pixel + 0.5 - centre).abs() / reach).clamp_(min=0)
    weights *= (pixel >= low[:, None, None]) & (pixel < high[:, None, None])  # as if the box were an image by itself
    weights /= weights.sum(2, keepdim=True)
    return weights.new_zeros(len(low), side, extent).scatter_(2, pixel.long(), weights)
