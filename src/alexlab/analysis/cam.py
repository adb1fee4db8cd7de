"""Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391): which regions of an image raise the logit of a class."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from alexlab.analysis import drawing
from alexlab.engine.errors import UserError
from alexlab.models.introspection import last_maps


def grad_cam(net: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Return how much each pixel contributes to the logit of a class, float (N, H, W) from 0 to 1.

    Args:
        net: in eval mode.
        images: float (N, C, H, W), as the network gets them.
        classes: int64 (N,).

    Raises:
        UserError: the extra `explain` is not installed, or `last_maps` refuses the network.
    """
    try:
        from captum.attr import LayerGradCam
    except ImportError:
        raise UserError("Grad-CAM needs the extra: pip install 'alexlab[explain]'.") from None
    layer = last_maps(net, images[:1])
    cam = LayerGradCam(net, layer).attribute(images, target=classes, relu_attributions=True)
    cam = F.interpolate(cam.detach().float(), images.shape[2:], mode="bilinear", align_corners=False)[:, 0].cpu()
    return cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-12)


def overlay(image: np.ndarray, cam: Tensor) -> np.ndarray:
    """Lay a map of `grad_cam`, float (H, W), over an image, uint8 (H, W, 3); the largest values are yellow."""
    from matplotlib import colormaps  # takes half a second

    heat = colormaps["inferno"](cam.numpy())[..., :3] * 255
    return (0.45 * image + 0.55 * heat).round().astype(np.uint8)


def picture(
    net: nn.Module,
    normalize: Callable[[Tensor], Tensor],
    pixels: Sequence[Tensor],
    classes: Sequence[int],
    captions: Sequence[tuple[str, str]],
    title: str,
) -> Image.Image:
    """Draw each image, and right of it the map of a class over the image.

    Args:
        net: in eval mode.
        normalize: uint8 (N, C, H, W) -> the network's input.
        pixels: uint8 (C, H, W) each, all of one size.
        classes: the class of each image whose map is drawn.
        captions: two lines for each image.
        title: a line above all images.
    """
    device = next(net.parameters()).device
    drawn: list[np.ndarray] = []
    for image, wanted in zip(pixels, classes, strict=True):  # one at a time: the gradients of many need much memory
        with torch.enable_grad():
            [cam] = grad_cam(net, normalize(image[None].to(device)), torch.tensor([wanted], device=device))
        rgb = drawing.as_rgb(image.permute(1, 2, 0).numpy())
        drawn += [rgb, overlay(rgb, cam)]
    lines = [line for caption in captions for line in (caption, ("", ""))]
    return drawing.tiles(drawn, title, lines, columns=4)
