"""One image of the index -> its uint8 pixels, cropped by (seed, epoch, index)."""

import torch
from torch.utils.data import Dataset

from alexlab.data import decode
from alexlab.data.index import ImageIndex
from alexlab.data.transforms import SampleTransform

Sample = tuple[torch.Tensor, int]

_MASK = (1 << 63) - 1


def mix(*numbers: int) -> int:
    """A 63-bit seed from several numbers (splitmix64's steps; https://prng.di.unimi.it/splitmix64.c)."""
    state = 0
    for number in numbers:
        state = (state ^ number) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state & _MASK


class ImageDataset(Dataset[Sample | str]):
    """Items are (uint8 (3, H, W), class); keys are (index, epoch) pairs, as the samplers yield them.

    Args:
        on_error: "raise", or "skip": a broken image gives its path in place of a sample.
    """

    def __init__(self, index: ImageIndex, transform: SampleTransform, seed: int, on_error: str = "raise") -> None:
        self.index, self.transform, self.seed, self.on_error = index, transform, seed, on_error

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: tuple[int, int]) -> Sample | str:
        i, epoch = key
        # 1 microsecond, where torch.manual_seed takes 131
        torch.default_generator.manual_seed(mix(self.seed, epoch, i))
        path = self.index.path(i)
        try:
            return decode.read(path, self.transform.at(epoch)), int(self.index.targets[i])
        except decode.BrokenImageError:
            if self.on_error == "raise":
                raise
            return path


def collate(samples: list[Sample | str]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """A batch: images uint8 (B, 3, H, W) in channels-last memory, targets int64 (B,), paths of skipped images."""
    whole = [sample for sample in samples if not isinstance(sample, str)]
    skipped = [sample for sample in samples if isinstance(sample, str)]
    if not whole:
        return torch.empty(0, 3, 1, 1, dtype=torch.uint8), torch.empty(0, dtype=torch.int64), skipped
    images = torch.stack([image.permute(1, 2, 0) for image, _ in whole]).permute(0, 3, 1, 2)
    return images, torch.tensor([target for _, target in whole]), skipped
