"""A training on a folder of images as in Lightning's tutorials; faults.py compares alexlab with it.

python benchmarks/stock.py FOLDER OUT [--epochs 2] [--devices 1] [--lr 0.01] [--wandb]

It uses ImageFolder, a DataLoader that shuffles, ModelCheckpoint with save_last, and CSVLogger or WandbLogger. If OUT
contains last.ckpt, it is passed as ckpt_path.
"""

import logging
import warnings

import pytorch_lightning as pl
import torch
from common import options
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, WandbLogger
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

STEPS = v2.Compose([v2.RandomResizedCrop(32), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])


class Stock(pl.LightningModule):
    def __init__(self, classes: int, lr: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(32, classes),
        )  # fmt: skip
        self.lr = lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val", cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


def main() -> None:
    args = options(__doc__, "root", "out", epochs=2, devices=1, lr=0.01, wandb=False)
    warnings.filterwarnings("ignore")
    for noisy in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    pl.seed_everything(0, verbose=False)
    images = ImageFolder(str(args.root / "train"), STEPS)
    train = DataLoader(images, 8, shuffle=True, num_workers=1)
    val = DataLoader(ImageFolder(str(args.root / "val"), STEPS), 8)
    trainer = pl.Trainer(
        accelerator="cpu", devices=args.devices, strategy="ddp" if args.devices > 1 else "auto",
        max_epochs=args.epochs, log_every_n_steps=1, enable_progress_bar=False, enable_model_summary=False,
        logger=WandbLogger(save_dir=str(args.out)) if args.wandb else CSVLogger(str(args.out)),
        callbacks=[ModelCheckpoint(args.out, save_last=True)], default_root_dir=str(args.out),
    )  # fmt: skip
    last = args.out / "last.ckpt"
    trainer.fit(Stock(len(images.classes), args.lr), train, val, ckpt_path=last if last.is_file() else None)


if __name__ == "__main__":
    main()
