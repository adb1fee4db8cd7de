"""export.py: one file that says what the run's network says, without this package."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import ROOT, TINY, command, photo, run_example
from omegaconf import OmegaConf
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional as tv

import alexlab
from alexlab.commands import export as exporting
from alexlab.commands.export import FromPixels, capture, export, write_onnx
from alexlab.engine.errors import RunFailedError, UserError
from alexlab.engine.schema import PathsConfig, TrainConfig
from alexlab.engine.targets import build

FORMATS = {"onnx": "model.onnx", "torch_export": "model.pt2"}
NETS = {
    "alexnet": ["net.hidden=[64,48]"],  # two groups, LRN, three pixels right and below
    "alexnet_krizhevsky2012": ["net.hidden=[64,48]"],  # LRN within each half, inputs of 0-255
    "alexnet_bn": ["net.hidden=[64,48]"],
    "alexnet_half": [],
    "torchvision": ["name=resnet18", "net.name=resnet18"],
}


@pytest.fixture(scope="module")
def composed(shapes: Path) -> Any:
    """The config of a training on the shapes."""
    done = command("train.py", *TINY, "data=folder", f"data.root={shapes}", "--cfg", "job", "--resolve")
    assert done.returncode == 0, done.stderr
    return OmegaConf.create(done.stdout)


@pytest.fixture(scope="module")
def run_dir(composed: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained("alexnet_bn", composed, tmp_path_factory.mktemp("logs") / "train/runs/one")


def exported(run_dir: Path, *words: str) -> subprocess.CompletedProcess:
    return command("export", "run=one", f"paths.logs={run_dir.parents[2]}", *words)


def config_of(run_dir: Path, **more: object) -> Any:
    """As `export.py` composes it."""
    config: Any = OmegaConf.load(ROOT / "conf/export.yaml")
    paths = {"logs": str(run_dir.parent), "data": str(ROOT / "data")}
    given = OmegaConf.to_container(OmegaConf.merge(config, {"run": str(run_dir), "allow": [], **more}))
    return SimpleNamespace(**given | {"paths": PathsConfig(**paths)})


def untrained(model: str, composed: Any, folder: Path) -> Path:
    """A run of a network that nobody has trained, with statistics and logits like those of a trained one."""
    torch.manual_seed(0)
    config = composed.copy()
    own = OmegaConf.load(ROOT / f"conf/model/{model}.yaml")
    config.model = OmegaConf.merge(own, OmegaConf.from_dotlist(NETS[model]))
    if config.model.mean == "auto":
        config.model.mean, config.model.std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    classes = sorted(path.name for path in Path(config.data.root, "train").iterdir())
    net = build(OmegaConf.to_container(config.model.net, resolve=True), num_classes=len(classes))
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_(0, 0.3)
        norm.running_var.uniform_(0.5, 2)
    (folder / "checkpoints").mkdir(parents=True)
    OmegaConf.save(config, folder / "config.yaml", resolve=True)
    state = {f"net.{key}": value for key, value in net.state_dict().items()}
    size = float(net.eval()(torch.randn(4, 3, 64, 64)).detach().abs().max())
    for key in list(state)[-2:]:  # the last layer's
        state[key] = state[key] * 5 / size
    torch.save({"state_dict": state, "alexlab": {"classes": classes}}, folder / "checkpoints/best.ckpt")
    return folder


def cropped(path: Path, size: int = 64) -> np.ndarray:
    """uint8 (3, S, S): the middle 7/8 of the short side, by Pillow alone."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    side = 0.875 * min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return np.array(image.resize((size, size), Image.Resampling.BILINEAR, box=box)).transpose(2, 0, 1)


def logits_of(run_dir: Path, pixels: np.ndarray) -> np.ndarray:
    """The run's own net on uint8 (B, 3, S, S), normalized by torchvision."""
    model = OmegaConf.load(run_dir / "config.yaml").model
    images = torch.from_numpy(pixels).float() / 255
    with torch.no_grad():
        return alexlab.load(run_dir).net(tv.normalize(images, list(model.mean), list(model.std))).numpy()


def opened(path: Path, format: str) -> tuple[Any, dict]:
    """uint8 (B, 3, S, S) -> logits, and the description in the file."""
    if format == "onnx":
        session = onnxruntime.InferenceSession(str(path))
        about = json.loads(session.get_modelmeta().custom_metadata_map["alexlab"])
        return lambda pixels: session.run(None, {"images": pixels})[0], about
    files = {"alexlab.json": ""}
    net = torch.export.load(path, extra_files=files).module()
    return lambda pixels: net(torch.from_numpy(pixels)).numpy(), json.loads(files["alexlab.json"])


@pytest.mark.parametrize("model", sorted({*NETS} - {"alexnet_bn"}))
def test_the_file_is_the_net_at_any_batch_size(
    model: str, composed: Any, shapes: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    folder = untrained(model, composed, tmp_path / "run")
    pixels = np.stack([cropped(path) for path in sorted((shapes / "val").rglob("*.jpg"))[::3]])
    expected = logits_of(folder, pixels)
    assert np.ptp(expected, axis=0).max() > 0.1, "the images must differ"
    for format in FORMATS:
        export(config_of(folder, format=format))
        assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "config.yaml", FORMATS[format]]
        net, _ = opened(folder / FORMATS[format], format)
        for count in (1, 3, 7):
            logits = net(pixels[:count])
            assert logits.shape == (count, 10)
            np.testing.assert_allclose(logits, expected[:count], rtol=0, atol=1e-4)
        printed = capfd.readouterr()
        assert "on 10 images, the logits differ from the run's by " in printed.out
        assert "10 of 10 top-1 classes are the same" in printed.out
        assert printed.err == ""
        assert os.fsencode(ROOT) not in (folder / FORMATS[format]).read_bytes(), "paths of this machine"
        (folder / FORMATS[format]).unlink()


@pytest.mark.parametrize("format", FORMATS)
def test_the_documents_example_runs_without_this_package(
    format: str, run_dir: Path, shapes: Path, tmp_path: Path
) -> None:
    out = tmp_path / FORMATS[format]
    done = exported(run_dir, f"format={format}", f"out={out}")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    size = out.stat().st_size / 1e6
    assert f"{out}: {size:.1f} MB, alexnet_bn, 10 classes, any batch size" in done.stdout
    assert done.stdout.endswith("docs/export.md shows how to use the file without this package\n")

    upright = photo(tmp_path / "upright.jpg", (90, 70), seed=3, quality=95)
    with Image.open(upright) as image:  # a photograph of a telephone held upright, and a wide one
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
        image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "wanted.png")
    pictures = [upright.name, "turned.jpg"]
    net, transform, classes = alexlab.load(run_dir)
    printed = run_example(format, pictures, tmp_path)
    for name, (name_of_class, _, logits) in zip(pictures, printed, strict=True):
        with torch.no_grad():
            expected = net(transform(tmp_path / name)[None]).numpy()
        # turned before or after it is scaled, a few pixels are rounded otherwise by one of 255
        np.testing.assert_allclose(logits, expected, rtol=0, atol=0.05 if name == "turned.jpg" else 1e-4)
        assert name_of_class == classes[int(expected.argmax())]


@pytest.mark.parametrize("format", FORMATS)
def test_the_file_describes_itself(format: str, run_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    config: Any = OmegaConf.load(folder / "config.yaml")
    file = tmp_path / "names.tsv"
    file.write_text("ring\ta ring\nbar\tBär\n")
    config.data.class_names, config.augment.crop_ratio, config.model.mean = str(file), 0.8, [0.1, 0.2, 0.3]
    OmegaConf.save(config, folder / "config.yaml")
    export(config_of(folder, format=format))
    net, about = opened(folder / FORMATS[format], format)
    assert about["class_folders"][:2] == ["arrow", "bar"]
    assert (about["classes"][:2], "a ring" in about["classes"]) == (["arrow", "Bär"], True)
    assert (about["mean"], about["std"]) == ([0.1, 0.2, 0.3], [0.229, 0.224, 0.225])
    assert (about["image_size"], about["crop_ratio"], about["short_side"]) == (64, 0.8, 80)
    assert about["interpolation"] == "bilinear, antialiased"
    assert (about["model"], about["run"], about["checkpoint"]) == ("alexnet_bn", "run", "best.ckpt")
    assert "uint8 (B, 3, 64, 64)" in about["input"]
    assert "float32 (B, 10)" in about["output"]
    assert {"alexlab", "torch"} <= set(about)
    assert sorted(path.name for path in folder.iterdir() if "model" in path.name) == [FORMATS[format]], "one file"
    if format == "onnx":
        session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
        names = [(node.name, node.type, node.shape) for node in (*session.get_inputs(), *session.get_outputs())]
        wanted = [("images", "tensor(uint8)", ["batch", 3, 64, 64]), ("logits", "tensor(float)", ["batch", 10])]
        assert names == wanted
    path = photo(tmp_path / "x.png", (100, 100))
    with Image.open(path) as image:  # 80 of 100 pixels, from the tenth on
        pixels = np.array(image.resize((64, 64), Image.Resampling.BILINEAR, box=(10, 10, 90, 90)))[None]
    pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    np.testing.assert_allclose(net(pixels), logits_of(folder, pixels), rtol=0, atol=1e-4)


def test_a_file_of_another_network_is_removed(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "deep/model.onnx"
    out.parent.mkdir()
    out.write_text("before")
    with pytest.raises(
        RunFailedError, match=r"run's by \S+ at most, and tolerance=1e-30 \(the largest logit is \d+\.\d\)"
    ):
        export(config_of(run_dir, format="onnx", out=str(out), tolerance=1e-30))
    for format, wrong in (
        ("torch_export", lambda self, images: self.net(images.float() / 255)),
        ("torch_export", lambda self, images: images[:, 0, 0, :10] * torch.nan),
    ):
        monkeypatch.setattr(FromPixels, "forward", wrong)
        with pytest.raises(RunFailedError, match=r"was removed, because it is not the run's network"):
            export(config_of(run_dir, format=format, out=str(out.with_name(FORMATS[format]))))
    assert [path.name for path in out.parent.iterdir()] == ["model.onnx"]
    assert out.read_text() == "before"
    monkeypatch.undo()
    export(config_of(run_dir, format="onnx", out=str(out)))
    assert out.stat().st_size > 1e6  # and no longer "before"


def test_images_to_check_on(run_dir: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """They are the run's own, spread over its classes; if those are gone, images=PATH is needed."""
    run_config = OmegaConf.load(run_dir / "config.yaml")

    def chosen() -> list[str]:
        config = TrainConfig.model_validate(OmegaConf.to_container(run_config))
        images, numbers = exporting.choose_images(config_of(run_dir), config)
        return [images.path(i) for i in numbers]

    assert chosen() == [str(path) for path in sorted((shapes / "test").rglob("*.jpg"))]
    run_config.data.root = str(shapes / "train")  # class folders alone
    run_config.data.val_fraction = 0.5
    assert (len(chosen()), len({Path(path).parent for path in chosen()})) == (16, 10)
    run_config.data.val_fraction = None

    shutil.copytree(run_dir, tmp_path / "run")
    run_config.data.root = str(tmp_path / "gone")
    OmegaConf.save(run_config, tmp_path / "run/config.yaml")
    out = tmp_path / "run/model.pt2"
    with pytest.raises(UserError, match=r"gone.* The file is checked on real images: give some with images=PATH"):
        export(config_of(tmp_path / "run", format="torch_export"))
    with pytest.raises(UserError, match="names no image"):
        export(config_of(tmp_path / "run", format="torch_export", images=str(tmp_path / "none")))
    (tmp_path / "images").mkdir()
    (tmp_path / "images/broken.jpg").write_bytes(b"x")
    images = str(tmp_path / "images")
    with pytest.raises(
        UserError, match=r"broken.jpg cannot be read as an image .* Give images to check the file on with"
    ):
        export(config_of(tmp_path / "run", format="torch_export", images=images))
    assert not out.exists()
    photo(tmp_path / "images/broken.jpg")
    capsys.readouterr()
    export(config_of(tmp_path / "run", format="torch_export", images=images))
    printed = capsys.readouterr().out
    assert "on 1 image, the logits differ" in printed
    assert out.exists()


def test_wrong_settings_are_refused(run_dir: Path, composed: Any, tmp_path: Path) -> None:
    other = untrained("torchvision", composed, tmp_path / "other")
    file = tmp_path / "file"
    file.touch()
    for settings, message in (
        ({"run": "two"}, "`run=two` is not a run's directory"),
        ({"out": "x.pt2"}, "`out=x.pt2` must end in .onnx with format=onnx."),
        ({"ckpt": f"{other}/checkpoints/best.ckpt"}, "holds the weights of another network"),
        (
            {"format": "torch_export", "out": f"{file}/a/x.pt2"},
            r"a/x.pt2 cannot be written \(Not a directory\): choose",
        ),
    ):
        with pytest.raises(UserError, match=message):
            export(config_of(run_dir, **{"format": "onnx", **settings}))
    done = exported(run_dir, "format=tflite", "tolerance=0")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "`format=tflite` must be onnx, torch_export or hub" in done.stderr
    assert "`tolerance=0` must be above 0" in done.stderr
    assert not list(run_dir.glob("*model*"))
    assert [path.name for path in run_dir.parents[2].iterdir()] == ["train"], "it leaves no directory of its own"


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_is_an_error_and_leaves_no_file(
    format: str, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, new = tmp_path / FORMATS[format], tempfile.TemporaryDirectory

    def full(**settings: Any) -> Any:
        made = new(**settings)
        Path(made.name, out.name).symlink_to("/dev/full")
        return made

    monkeypatch.setattr(tempfile, "TemporaryDirectory", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\): choose another path with ou"):
        export(config_of(run_dir, format=format, out=str(out)))
    assert not list(tmp_path.iterdir())


def test_the_file_is_not_written_through_links(run_dir: Path, tmp_path: Path) -> None:
    precious, out = tmp_path / "precious", tmp_path / "model.pt2"
    precious.write_text("mine")
    (tmp_path / ".model.pt2.tmp").symlink_to(precious)
    out.symlink_to(precious)
    export(config_of(run_dir, format="torch_export", out=str(out)))
    assert precious.read_text() == "mine"
    assert not out.is_symlink()


def test_a_missing_extra_is_an_error_with_the_command_that_installs_it(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"format=onnx needs the extra: pip install 'alexlab\[export\]' \(.*onnxscript"):
        export(config_of(run_dir, format="onnx"))
    exporting.need_extra("torch_export")


class Fixed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, -1)[:, :10]


class Decides(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


class Strange(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(x[:, 0]).real


@pytest.mark.parametrize("net", [Fixed(), Decides()], ids=lambda net: type(net).__name__)
def test_a_network_that_torch_cannot_export(net: nn.Module, capfd: pytest.CaptureFixture) -> None:
    why = "Constraints violated" if isinstance(net, Fixed) else "Could not guard on data-dependent"
    with pytest.raises(UserError, match=rf"{type(net).__name__} cannot be exported \(.*{why}.*\): `forward` must"):
        capture(FromPixels(net, [0.5] * 3, [0.5] * 3), (16, 16))
    printed = capfd.readouterr()
    assert printed.out + printed.err == "", "torch prints the whole graph"


def test_a_network_that_onnx_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = capture(FromPixels(Strange(), [0.5] * 3, [0.5] * 3), (16, 16))
    with pytest.raises(UserError, match=r"ONNX cannot represent the network \(.*linalg_eig.*use format=torch_export"):
        write_onnx(program, "{}", tmp_path / "x.onnx")
    monkeypatch.setattr(exporting, "ONNX_BYTES", 10)
    with pytest.raises(UserError, match=r"The weights take 0.0 GB, and an ONNX file holds at most 0.0 GB: use form"):
        write_onnx(program, "{}", tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())
