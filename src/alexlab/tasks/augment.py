"""Augmentation of whole batches on the device: your own, colour noise, normalization, erasing, mixup and cutmix."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from alexlab.data.sample_rng import mix
from alexlab.data.user_transforms import GENERATORS, described, failure, name_of
from alexlab.engine.errors import UserError

# Principal axes (columns) of ImageNet's RGB values on a 0-1 scale, and the lengths of these axes. Most code since
# Facebook's fb.resnet.torch calls the lengths eigenvalues and multiplies the noise with them, as the AlexNet paper does
# with eigenvalues. Take their square roots to scale the noise by the standard deviation along an axis.
PCA_EIGENVALUES = (0.2175, 0.0188, 0.0045)
PCA_EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
ERASED_AREA = (0.02, 0.33)  # fraction of the image (Zhong et al. 2017)
ERASED_ASPECT = 3.3  # height / width is between 1 / 3.3 and 3.3


@dataclass(eq=False)
class BatchAugment:
    """Turn uint8 images into the network's input.

    The random numbers of an image depend on (seed, epoch, batch, position in the global batch), not on the rank: runs
    on one or more devices see the same images. Mixup and cutmix are an exception, because they pair images of one
    device; so is `batch`.
    """

    mean: list[float]  # of each of the C channels on a 0-1 scale
    std: list[float]  # the same
    num_classes: int  # length of the class probabilities of mixed images
    # standard deviation of the colour noise along each principal axis, relative to `pca_by` (AlexNet paper: 0.1)
    pca: float = 0.0
    erase: float = 0.0  # probability that a rectangle of 2 to 33 % of an image is replaced by the mean colour
    mixup: float = 0.0  # parameter of the Beta distribution; 0 is off
    cutmix: float = 0.0  # the same; if both are on, each batch uses one of them
    pca_by: str = "eigenvalues"  # or "deviations", the square roots, which make the noise 2 to 15 times as strong
    # gets and returns images, float32 (B, C, H, W) from 0 to 1, before all else. May draw from torch's generators,
    # which the task has seeded, and from NumPy's and Python's, which are seeded here.
    batch: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        self.scale = torch.tensor([1 / (255 * s) for s in self.std]).view(1, -1, 1, 1)
        self.shift = torch.tensor([-m / s for m, s in zip(self.mean, self.std, strict=True)]).view(1, -1, 1, 1)
        self.deviations = torch.tensor(self.std).view(1, -1, 1, 1)
        chosen = [(mix, float(alpha)) for mix, alpha in ((v2.MixUp, self.mixup), (v2.CutMix, self.cutmix)) if alpha > 0]
        mixes = [mix(alpha=alpha, num_classes=self.num_classes) for mix, alpha in chosen]
        self.mix = v2.RandomChoice(mixes) if mixes else None
        lengths = torch.tensor(PCA_EIGENVALUES)
        self.axes = torch.tensor(PCA_EIGENVECTORS) * (lengths if self.pca_by == "eigenvalues" else lengths.sqrt())
        self.generator = torch.Generator()

    def normalize(self, images: Tensor) -> Tensor:
        """Normalize uint8 images (B, C, H, W) to float32 of the same shape and memory format.

        Images of another loader that are float already are copied as they are.
        """
        return images.clone() if images.is_floating_point() else self._normalized(images.float())

    def _normalized(self, images: Tensor) -> Tensor:
        if self.scale.device != images.device:
            self.scale, self.shift = self.scale.to(images.device), self.shift.to(images.device)
            self.deviations = self.deviations.to(images.device)
        return images.mul_(self.scale).add_(self.shift)

    def __call__(
        self, images: Tensor, targets: Tensor, seed: int, rank: int = 0, first: int = 0, total: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Augment and normalize this rank's part of a batch: uint8 images (B, C, H, W), int64 targets (B,).

        Args:
            seed: of the batch, the same on all ranks.
            first: position of the first of these images in the global batch.
            total: images of the global batch; None: these alone.

        Returns:
            Images float32 (B, C, H, W), and targets int64 (B,), or float32 (B, num_classes) if images were mixed.
        """
        count = len(images)
        if self.batch is not None and count:
            images = self._normalized(self.by_batch(images, mix(seed, rank)))
        else:
            images = self.normalize(images)
        own, total = slice(first, first + count), max(total or 0, first + count)
        self.generator.manual_seed(seed)
        if self.pca > 0:
            alphas = torch.randn(total, 3, generator=self.generator)[own] * self.pca
            noise = (alphas @ self.axes.T).view(count, 3, 1, 1).to(images.device, non_blocking=True)
            images.add_(noise / self.deviations)
        if self.erase > 0:
            uniform = torch.rand(total, 5, generator=self.generator)[own]
            images.masked_fill_(self._rectangles(uniform, images), 0.0)
        if self.mix is not None and count > 1:
            images, targets = self.mix(images, targets)
        return images, targets

    @torch.no_grad()
    def by_batch(self, images: Tensor, seed: int) -> Tensor:
        """Apply `batch` to uint8 images (B, C, H, W); return float32 from 0 to 255 of the same shape."""
        assert self.batch is not None
        if images.is_floating_point():
            raise UserError("augment.batch needs uint8 images, and the data are float images: set augment.batch=null.")
        if isinstance(self.batch, nn.Module):
            self.batch.to(images.device)
        name = f"augment.batch ({name_of(self.batch)})"
        try:
            with GENERATORS.seeded(seed), torch.autocast(images.device.type, enabled=False):
                result = self.batch(images.float().div_(255))
        except Exception as error:
            raise failure(name, error) from error
        is_float = isinstance(result, Tensor) and result.is_floating_point()
        if not is_float or (result.shape, result.device) != (images.shape, images.device):
            raise UserError(
                f"{name} returned {described(result)}, and must return a float tensor {tuple(images.shape)} from 0 to "
                "1, on the device of the images."
            )
        return result.float() * 255

    def _rectangles(self, uniform: Tensor, images: Tensor) -> Tensor:
        """Draw the pixels to erase, bool (B, 1, H, W), from five uniform numbers per image: whether to erase, area,
        aspect, top, left."""
        height, width = images.shape[-2:]
        smallest, largest = ERASED_AREA
        area = smallest + uniform[:, 1] * (largest - smallest)
        aspect = torch.exp((uniform[:, 2] * 2 - 1) * torch.log(torch.tensor(ERASED_ASPECT)))
        rows = (area * aspect).sqrt().clamp(max=1) * height
        columns = (area / aspect).sqrt().clamp(max=1) * width
        top, left = uniform[:, 3] * (height - rows), uniform[:, 4] * (width - columns)
        rows = torch.where(uniform[:, 0] < self.erase, rows, 0.0)
        limits = torch.stack([top, top + rows, left, left + columns], 1).to(images.device, non_blocking=True)
        y = torch.arange(height, device=images.device).view(1, 1, -1, 1)
        x = torch.arange(width, device=images.device).view(1, 1, 1, -1)
        first_row, end_row, first_column, end_column = (limits[:, i].view(-1, 1, 1, 1) for i in range(4))
        return (y >= first_row) & (y < end_row) & (x >= first_column) & (x < end_column)
