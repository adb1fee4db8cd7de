"""The batch-wise part of augmentation, on the device in one pass: float, colour noise, normalize, erase, mix."""

import torch
from torch import Tensor
from torchvision.transforms import v2

# Principal axes (columns) of ImageNet's RGB values on a 0-1 scale, with the numbers that most code since Facebook's
# fb.resnet.torch calls eigenvalues and multiplies the noise with, as the AlexNet paper does with eigenvalues. Whoever
# takes the noise for a share of the spread along an axis wants its standard deviation, the eigenvalue's square root.
PCA_EIGENVALUES = (0.2175, 0.0188, 0.0045)
PCA_EIGENVECTORS = (
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)


class BatchAugment:
    """uint8 images -> what the net sees.

    What is drawn for an image depends on (seed, epoch, batch, its place in the global batch), not on the rank, so that
    runs on one or more devices see the same pictures. Mixing alone pairs images within a device.

    Args:
        mean, std: of RGB on a 0-1 scale.
        pca: standard deviation of the colour noise along each principal axis, relative to its eigenvalue (the AlexNet
            paper: 0.1; 0 is off).
        pca_by: "eigenvalues", or "deviations" for noise relative to their square roots, which is 2 to 15 times as much.
        erase: probability that a rectangle of 2 to 33 % of an image becomes the mean colour.
        mixup, cutmix: parameter of the Beta distribution; 0 is off; with both on, one is drawn for each batch.
    """

    def __init__(
        self,
        mean: list[float],
        std: list[float],
        num_classes: int,
        pca: float = 0.0,
        erase: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        pca_by: str = "eigenvalues",
    ) -> None:
        self.scale = torch.tensor([1 / (255 * s) for s in std]).view(1, 3, 1, 1)
        self.shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(1, 3, 1, 1)
        self.std = torch.tensor(std).view(1, 3, 1, 1)
        self.pca, self.erase = pca, erase
        mixes: list[v2.Transform] = []
        if mixup > 0:
            mixes.append(v2.MixUp(alpha=float(mixup), num_classes=num_classes))
        if cutmix > 0:
            mixes.append(v2.CutMix(alpha=float(cutmix), num_classes=num_classes))
        self.mix = v2.RandomChoice(mixes) if mixes else None
        lengths = torch.tensor(PCA_EIGENVALUES)
        self.axes = torch.tensor(PCA_EIGENVECTORS) * (lengths if pca_by == "eigenvalues" else lengths.sqrt())
        self.generator = torch.Generator()

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) of 0..255 -> float32 of the same shape and memory format."""
        self._follow(images)
        return images.float().mul_(self.scale).add_(self.shift)

    def __call__(
        self, images: Tensor, targets: Tensor, seed: int, rank: int = 0, world_size: int = 1
    ) -> tuple[Tensor, Tensor]:
        """uint8 (B, 3, H, W), int64 (B,) -> float32 (B, 3, H, W), targets: int64 (B,), or float32 (B, num_classes)
        where images were mixed.

        Args:
            seed: of this batch, the same on all ranks.
        """
        images = self.normalize(images)
        count = len(images)
        mine = slice(rank * count, (rank + 1) * count)
        self.generator.manual_seed(seed)
        if self.pca > 0:
            alphas = torch.randn(world_size * count, 3, generator=self.generator)[mine] * self.pca
            noise = (alphas @ self.axes.T).view(count, 3, 1, 1).to(images.device, non_blocking=True)
            images.add_(noise / self.std)
        if self.erase > 0:
            draws = torch.rand(world_size * count, 5, generator=self.generator)[mine]
            images.masked_fill_(self._rectangles(draws, images), 0.0)
        if self.mix is not None and count > 1:
            images, targets = self.mix(images, targets)
        return images, targets

    def _rectangles(self, draws: Tensor, images: Tensor) -> Tensor:
        """bool (B, 1, H, W), from five uniform numbers an image: whether, area, aspect, top, left (Zhong et al. 2017:
        areas of 2 to 33 %, aspects of 0.3 to 3.3)."""
        height, width = images.shape[-2:]
        area = 0.02 + draws[:, 1] * (0.33 - 0.02)
        aspect = torch.exp((draws[:, 2] * 2 - 1) * torch.log(torch.tensor(3.3)))
        rows = (area * aspect).sqrt().clamp(max=1) * height
        columns = (area / aspect).sqrt().clamp(max=1) * width
        top, left = draws[:, 3] * (height - rows), draws[:, 4] * (width - columns)
        rows = torch.where(draws[:, 0] < self.erase, rows, 0.0)
        limits = torch.stack([top, top + rows, left, left + columns], 1).to(images.device, non_blocking=True)
        y = torch.arange(height, device=images.device).view(1, 1, -1, 1)
        x = torch.arange(width, device=images.device).view(1, 1, 1, -1)
        t, b, le, r = (limits[:, i].view(-1, 1, 1, 1) for i in range(4))
        return (y >= t) & (y < b) & (x >= le) & (x < r)

    def _follow(self, images: Tensor) -> None:
        if self.scale.device != images.device:
            self.scale, self.shift, self.std = (t.to(images.device) for t in (self.scale, self.shift, self.std))
