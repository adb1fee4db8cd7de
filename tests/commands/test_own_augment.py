"""`augment.transforms` and `augment.batch` in runs: resumed, on two ranks, evaluated, from a run, and mistakes."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command, composed, config_of, summary_of, tiny_train
from resuming import Harness, difference
from test_mistakes import assert_no_run, assert_refused
from torch import Tensor
from torchvision.transforms import v2

from alexlab.commands import build
from alexlab.commands.build_transforms import build_callable, build_transforms, try_batch
from alexlab.engine import validation
from alexlab.engine.devices import Devices
from alexlab.engine.errors import UserError
from alexlab.engine.schema import TrainConfig
from alexlab.tasks.augment import BatchAugment

PARTS = """
import numpy as np
import random
import torch

class Noise:
    def __init__(self, sigma):
        self.sigma = sigma
    def __call__(self, image):
        noise = np.random.normal(0, self.sigma, tuple(image.shape)) + random.random()
        return torch.from_numpy((image.numpy() + noise).clip(0, 255).astype(np.uint8))

class Dark(torch.nn.Module):
    def forward(self, images):
        return images * torch.rand(len(images), 1, 1, 1, device=images.device) * np.random.rand() * random.random()

class Float:
    def __call__(self, image):
        return image.float()

class Broken:
    def __call__(self, image):
        return image @ image[:, :3]

def invert(image):
    return 255 - image
"""
JITTER = "{_target_: torchvision.transforms.v2.ColorJitter, brightness: 0.4, hue: 0.1}"
NOISE = "{_target_: ownparts.Noise, sigma: 9.0}"
DARK = "{_target_: ownparts.Dark}"


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of a user's; the script puts it on the path of a command."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package/ownparts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(str(tmp_path / "package"))
    script = tmp_path / "before.py"
    script.write_text(f"import sys\nsys.path.append({str(tmp_path / 'package')!r})\n")
    return script


def test_a_resumed_run_equals_one_that_was_not_stopped(harness: Harness, parts: Path) -> None:
    """Stopped within both epochs, with other numbers of threads, and dropout and BatchNorm in the network."""
    words = [f"augment.transforms=[{JITTER},{NOISE}]", f"augment.batch={DARK}"]
    straight = harness.train("straight", *words)
    resumed = harness.train_with_stops("stopped", [(2, "after"), (3, "before"), (7, "after")], *words)
    assert difference(straight, resumed) is None
    assert difference(straight, harness.train("other", *words[1:])) is not None, "the transforms have an effect"


def test_evaluation_needs_no_transforms_and_another_training_needs_consent(
    shapes: Path, tmp_path: Path, parts: Path
) -> None:
    words = ["augment=basic", f"augment.transforms=[{JITTER},{NOISE}]", f"augment.batch={DARK}"]
    done = tiny_train(shapes, tmp_path / "run", *words, before=parts)
    assert done.returncode == 0, done.stderr
    logs = f"paths.logs={tmp_path}"
    for words in (
        ["eval.py", f"run={tmp_path / 'run'}"],
        ["predict", f"run={tmp_path / 'run'}", f"images={shapes / 'val'}"],
    ):
        assert command(*words, logs).returncode == 0, "ownparts is not on the path"
    tested, result = summary_of(tmp_path / "run")["test"], json.loads((tmp_path / "run/eval.json").read_text())
    assert result["loss"] == tested["test/loss"]
    again = ["train.py", f"from_run={tmp_path / 'run'}", f"hydra.run.dir={tmp_path / 'again'}", logs]
    assert_refused(command(*again, before=parts), "_target_=ownparts.Noise is not allowed", "add allow=[ownparts]")
    assert not (tmp_path / "again/checkpoints").exists()
    allowed = command(*again, "allow=[ownparts]", before=parts)
    assert allowed.returncode == 0, allowed.stderr
    assert summary_of(tmp_path / "again")["last"] == summary_of(tmp_path / "run")["last"]


V2 = "_target_: torchvision.transforms.v2"
MISTAKES = {
    "augment.transforms=[{p: 1}]": "`augment.transforms=[{p: 1}]` must be a list of mappings, each with a _target_",
    "augment.batch=[1]": "`augment.batch=[1]` must be a mapping with a _target_, which names a class.",
    "augment.crop=none": "`augment.crop=none` needs augment.transforms that return data.image_size pixels",
    f"augment.crop=none augment.transforms=[{{{V2}.Identity}}]": "[0] (Identity) returned torch.uint8 (3, 128, 1",
    "augment.transforms=[{_target_: ownparts.Float}]": "(Float) returned torch.float32 (3, 64, 64), and must ret",
    "augment.transforms=[{_target_: ownparts.Broken}]": "augment.transforms[0] (Broken) failed: RuntimeError: ",
    "augment.transforms=[{_target_: ownparts.Nois}]": "_target_=ownparts.Nois: ownparts contains no Nois",
    "augment.transforms=[{_target_: ownparts.Noise, sgima: 1}]": "cannot be built from its settings: Noise.__ini",
    "augment.transforms=[{_target_: ownparts.invert}]": "ownparts.invert cannot be built from its settings: inve",
    "augment.transforms=[{_target_: builtins.dict, a: 1}]": "augment.transforms[0]._target_=builtins.dict builds",
    f"augment.transforms=[{{{V2}.Normalize, mean: [0.5], std: [1.0]}}]": "TypeError: Input tensor should be a fl",
    f"augment.batch={{{V2}.CenterCrop, size: 8}}": "augment.batch (CenterCrop) returned torch.float32 (2, 3, 8, ",
    f"augment.transforms=[{JITTER}] trainer.precision=bf16-true": "do not work with trainer.precision=bf16-true,",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_are_errors(words: str, shapes: Path, parts: Path) -> None:
    def build_all(*more: str) -> None:
        base = ["data=folder", f"data.root={shapes}", "augment=basic", "data.image_size=64"]
        config = validation.validate(TrainConfig, composed(*base, *more))
        build.build_data(config, Devices("cpu", 1, 1), build_transforms(config, None))
        batch = build_callable(config.augment.batch or {}, "augment.batch", None)
        try_batch(BatchAugment([0.5] * 3, [0.5] * 3, 5, batch=batch), (3, 64, 64))

    with pytest.raises(UserError) as error:
        build_all(*re.split(" (?=augment|trainer)", words))
    assert MISTAKES[words] in str(error.value)
    assert "\n" not in str(error.value)


def test_a_mistake_is_found_before_the_run(shapes: Path, tmp_path: Path, parts: Path) -> None:
    words = [f"augment.transforms=[{JITTER},{{_target_: ownparts.Broken}}]"]
    line = PARTS[: PARTS.index("image @")].count("\n") + 1
    done = tiny_train(shapes, tmp_path / "runs/run", *words, before=parts)
    assert_refused(done, "augment.transforms[1] (Broken) failed: RuntimeError: ", f"(ownparts.py, line {line})")
    assert_no_run(tmp_path / "runs")


def test_a_function_is_a_transform_if_it_is_partial(shapes: Path, parts: Path) -> None:
    """And only training images are transformed."""
    words = ["data=folder", f"data.root={shapes}", "data.num_workers=0", "augment=none", "data.image_size=32"]
    plain = build.build_data(config_of(*words), Devices("cpu", 1, 1)).read()
    config = config_of(*words, "augment.transforms=[{_target_: ownparts.invert, _partial_: true}]")
    inverted = build.build_data(config, Devices("cpu", 1, 1), build_transforms(config, None)).read()
    for loader in ("train_dataloader", "val_dataloader"):
        one, two = (next(iter(getattr(data, loader)())).images for data in (plain, inverted))
        assert torch.equal(two, 255 - one if loader == "train_dataloader" else one)


# -- augment.batch


def test_batches_get_floats_and_are_normalized_afterwards() -> None:
    images, targets = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    got = []

    def half(batch: Tensor) -> Tensor:
        got.append(batch.clone())
        return batch.div_(2)

    augment = BatchAugment([0.5, 0.4, 0.3], [0.2, 0.3, 0.4], 5, batch=half)
    result, _ = augment(images.clone(), targets, seed=0)
    torch.testing.assert_close(got[0], v2.ToDtype(torch.float32, scale=True)(images))
    torch.testing.assert_close(result, v2.Normalize([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])(got[0] / 2), rtol=0, atol=2e-6)


def test_a_batch_without_images_is_not_passed_on() -> None:
    augment = BatchAugment([0.5] * 3, [0.5] * 3, 5, batch=lambda images: images[[0]])
    images, _ = augment(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), seed=0)
    assert images.shape == (0, 3, 8, 8)


def test_numpy_and_python_are_seeded_by_the_batch_and_restored() -> None:
    def draw(images: Tensor) -> Tensor:
        return images * 0 + float(np.random.rand()) + random.random()

    augment = BatchAugment([0.0] * 3, [1.0] * 3, 5, batch=draw)
    images, targets = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index,union-attr]
    one, again, other, rank = (augment(images, targets, *at)[0] for at in ((1,), (1,), (2,), (1, 1)))
    assert before == (random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index,union-attr]
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert not torch.equal(one, rank)


@pytest.mark.parametrize(
    ("batch", "returned"),
    [
        (lambda images: images[:, :1], r"torch.float32 \(2, 1, 4, 4\)"),
        (lambda images: images.mul(255).byte(), r"torch.uint8 \(2, 3, 4, 4\)"),
        (lambda images: images.numpy(), "a ndarray"),
    ],
)
def test_a_wrong_batch_is_an_error(batch: object, returned: str) -> None:
    augment = BatchAugment([0.5] * 3, [0.5] * 3, 5, batch=batch)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"augment.batch \(<lambda>\) returned {returned}, and must return a float"):
        augment(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), seed=0)


def test_kornia_transforms_batches() -> None:
    kornia = pytest.importorskip("kornia.augmentation")
    batch = kornia.AugmentationSequential(kornia.ColorJiggle(0.4, 0.4, p=1.0), kornia.RandomHorizontalFlip(p=0.5))
    augment = BatchAugment([0.5] * 3, [0.5] * 3, 5, batch=batch)
    images, targets = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8), torch.zeros(8, dtype=torch.int64)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(augment(images, targets, seed)[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
