"""The figures of a run: what they show, and where the numbers come from."""

import io
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torchvision
from conftest import command, summary_of, tiny_train
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from alexlab.analysis import drawing, gallery, plots
from alexlab.analysis.runs import steps_per_epoch
from alexlab.commands import train as run
from alexlab.data import folder as index
from alexlab.engine.devices import Devices
from alexlab.engine.errors import UserError
from alexlab.engine.text import printable
from alexlab.models.alexnet import AlexNet
from alexlab.models.introspection import first_convolution, head_of
from alexlab.tasks.load import EvalTransform, Trained

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
DRAWN = ["confusion_matrix", "per_class", "mistakes", "filters", "curves", "top5", "neighbours"]
DRAWN += ["precision_recall", "roc", "reliability"]


@pytest.mark.parametrize(
    "name", ["alexnet", "resnet18", "squeezenet1_1", "mobilenet_v3_small", "convnext_tiny", "vit_b_32", "swin_t"]
)
def test_the_head_gives_the_logits(name: str) -> None:
    head = head_of(torchvision.models.get_model(name, num_classes=7))
    assert (head.out_channels if isinstance(head, nn.Conv2d) else head.out_features) == 7


def test_the_head_of_timms_networks_and_of_networks_without_one() -> None:
    timm = pytest.importorskip("timm")
    net = timm.create_model("mobilenetv4_conv_small", num_classes=7)
    assert head_of(net) is net.get_classifier()
    deit = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=7)
    with pytest.raises(UserError, match=r"has no single last layer that gives the 7 logits, so the head is unknown"):
        head_of(deit, 7)
    with pytest.raises(UserError, match="gives the 7 logits"):
        head_of(AlexNet(5), 7)
    assert head_of(net, 7) is net.get_classifier()
    with pytest.raises(UserError, match="Identity has neither linear nor convolutional layers, so it has no kn"):
        head_of(nn.Identity())


def test_alexnets_filters_are_drawn_in_two_groups() -> None:
    """The second convolution of the paper has two groups, which see 48 of the 96 maps each."""
    models = torchvision.models
    for net, maps, groups in [(AlexNet(5), 96, 2), (models.alexnet(), 64, 1), (models.mobilenet_v2(), 32, 1)]:
        found = first_convolution(net)
        assert found is not None
        assert (found[0].out_channels, found[1]) == (maps, groups)
    assert first_convolution(nn.Linear(2, 2)) is None


def test_each_filter_is_scaled_by_its_largest_weight_and_zero_is_grey() -> None:
    weights = torch.zeros(96, 3, 11, 11)
    weights[48, 0, 0, 0], weights[48, 1, 0, 0] = 0.02, -0.01
    sheet = np.asarray(drawing.filters(weights, 2)).astype(int)
    size = 11 * 4
    height = 3 * (size + drawing.GAP) + 3 * drawing.GAP  # of a group: three rows of sixteen tiles
    assert sheet.shape[1] == 16 * (size + drawing.GAP) + drawing.GAP
    first = sheet[drawing.GAP + height, drawing.GAP]
    assert np.abs(first - [255, 127.5 - 63.75, 127.5]).max() <= 1
    assert np.abs(sheet[drawing.GAP, drawing.GAP] - 127.5).max() <= 1
    assert (sheet[height - 2 * drawing.GAP : height] == 255).all(), "a gap between the groups"
    grey = np.asarray(drawing.filters(torch.ones(4, 1, 3, 3)))
    assert (grey[drawing.GAP, drawing.GAP] == 255).all()
    rgb, alpha = torch.randn(2, 4, 3, 3, 3)
    of_four = drawing.filters(torch.cat([rgb, 9 * alpha[:, :1]], 1))
    assert np.array_equal(np.asarray(of_four), np.asarray(drawing.filters(rgb))), "the colours of RGBA"


def test_images_of_other_channels_are_drawn_in_colour_or_grey() -> None:
    pixels = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [10, 20, 30, 51]]], np.uint8)
    laid_over_white = [[10, 20, 30], [255, 255, 255], [206, 208, 210]]  # a fifth of the colour
    assert drawing.as_rgb(pixels).tolist() == [laid_over_white]
    assert drawing.as_rgb(pixels[..., :3]).tolist() == [[[10, 20, 30]] * 3]
    assert drawing.as_rgb(pixels[..., 3:]).tolist() == [[[255] * 3, [0] * 3, [51] * 3]]
    assert drawing.as_rgb(np.concatenate([pixels, pixels[..., :1]], 2)).tolist()[0][1] == [14] * 3
    for channels in (1, 4):
        sheet = np.asarray(drawing.tiles([np.full((144, 144, channels), 90, np.uint8)], "title"))
        assert set(sheet[-drawing.GAP - 9, drawing.GAP + 5]) == {90 if channels == 1 else 197}


def test_neighbours_are_the_nearest_in_the_last_hidden_layer() -> None:
    rng = np.random.default_rng(0)
    queries, among = rng.normal(size=(3, 8)), rng.normal(size=(50, 8))
    far = np.sqrt(((queries[:, None] - among[None]) ** 2).sum(2))
    distances, places = gallery.nearest(torch.tensor(queries), torch.tensor(among), 4)
    assert places.tolist() == np.argsort(far, 1)[:, :4].tolist()
    assert distances.numpy() == pytest.approx(np.sort(far, 1)[:, :4], rel=1e-9)
    assert gallery.nearest(torch.tensor(queries), torch.tensor(among[:2]), 4)[1].shape == (3, 2)


def test_probabilities_and_features_are_those_of_the_network(shapes: Path) -> None:
    net = AlexNet(10).eval()
    transform = EvalTransform(64, 0.875, MEAN, STD)
    extractor = gallery.FeatureExtractor(Trained(net, transform, list("abcdefghij")), torch.device("cpu"))
    val = index.scan(shapes / "val")
    pixels = extractor.read(val, [0, 3])
    assert list(pixels) == [0, 3]
    probabilities, hidden = extractor.predict(torch.stack(list(pixels.values())))
    with torch.no_grad():
        images = torch.stack([transform(val.path(i)) for i in pixels])
        assert probabilities == pytest.approx(net(images).softmax(1), abs=1e-6)
        before_last: list[torch.Tensor] = []
        net.classifier[-2].register_forward_hook(lambda _, inputs, out: before_last.append(out))
        net(images)
        assert hidden == pytest.approx(before_last[-1], abs=1e-5)
    assert hidden.shape == (2, 4096)


def test_images_are_evenly_spaced_and_broken_ones_are_skipped(shapes: Path, tmp_path: Path) -> None:
    val = index.scan(shapes / "val")
    assert len({int(val.targets[i]) for i in gallery.spread(val, 8)}) == 8
    assert gallery.spread(val, 1000) == list(range(len(val)))
    whole = Path(val.path(0)).read_bytes()
    for name, content in {"a/broken.jpg": whole[:300], "a/whole.jpg": whole, "b/broken.jpg": b"no"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    trained = Trained(AlexNet(2), EvalTransform(64, 1.0, MEAN, STD), ["a", "b"])
    extractor = gallery.FeatureExtractor(trained, torch.device("cpu"))
    assert list(extractor.read(index.scan(tmp_path), [0, 1, 2])) == [1]


def test_curves_are_drawn_over_epochs() -> None:
    rows = [{"step": s, "lr/decay": 0.1 / (s + 1)} for s in range(0, 40, 5)]
    for epoch in range(4):
        end = {"epoch": epoch, "step": 10 * epoch + 9}
        rows.append({**end, "val/loss": 2 - epoch / 4, "val/acc1": [0.2, 0.5, 0.4, 0.3][epoch]})
        rows.append({**end, "train/loss": 2.5 - epoch / 4, "train/acc1": 0.1 * epoch})
    assert steps_per_epoch({"steps_per_epoch": 20}, rows) == 20
    assert steps_per_epoch({}, rows) == steps_per_epoch({"steps_per_epoch": "x"}, rows) == 10
    assert steps_per_epoch({}, rows[:8]) is None
    sheet, unmarked, lowest = (drawn(plots.curves(rows, *of, 10, mode)) for *of, mode in (
        ("val/acc1", None), (None, None), ("val/acc1", "min"),
    ))  # fmt: skip
    assert coloured(sheet, "#000000") > coloured(unmarked, "#000000") + 50, "a star marks the best epoch"
    assert lowest.tobytes() != sheet.tobytes()
    assert sheet.width == drawing.PAGE * drawing.DPI, "three panels"
    assert plots.curves(rows[:3], None, None).get_axes()[0].get_yscale() == "linear"
    diverged = plots.curves([*rows, {"step": 50, "val/loss": 900.0}], None, None)
    assert [axes.get_yscale() for axes in diverged.get_axes()] == ["log", "linear", "linear"]
    own = plots.curves([*rows, {"step": 9, "val/kappa": 0.5}], "val/kappa", 10)
    assert [axes.get_title() for axes in own.get_axes()] == ["loss", "accuracy", "learning rate", "kappa"]
    assert plots.curves([{"step": 1, "epoch": 0}], None, None) is None


def drawn(figure: Figure) -> Image.Image:
    file = io.BytesIO()
    figure.savefig(file, dpi=drawing.DPI)
    return Image.open(file).convert("RGB")


def coloured(sheet: Image.Image, colour: str, over: float = 1.0) -> int:
    """Count the pixels of a colour that was drawn over white with this opacity."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(np.asarray(sheet).astype(float) - (255 - over * (255 - rgb))).max(2) < 3).sum())


def test_the_bar_of_the_true_class_is_green() -> None:
    white = np.full((32, 32, 3), 255, dtype=np.uint8)
    names = ["cat", "dog", "a very long name of a class with $", "cow", "owl"]
    probabilities = [0.6, 0.2, 0.1, 0.05, 0.05]
    sheet = drawn(plots.top5([white], ["dog"], [list(zip(names, probabilities, strict=True))], "val"))
    right, other = coloured(sheet, plots.TRUE, 0.65), coloured(sheet, plots.OTHER, 0.65)
    assert other / right == pytest.approx(0.8 / 0.2, rel=0.5), "bars as long as their probabilities, below their text"
    wrong = drawn(plots.top5([white], ["fox"], [list(zip(names, probabilities, strict=True))], "val"))
    assert coloured(wrong, plots.TRUE, 0.65) == 0


def test_accuracy_per_class_of_few_and_of_many_classes() -> None:
    two = drawn(plots.per_class([1.0, 0.5, None], ["cat", "dog", "none"], "test"))
    many = drawn(plots.per_class(np.linspace(0, 1, 1000).tolist(), [f"class {i}" for i in range(1000)], "test"))
    assert two.width == many.width
    assert two.height < 300
    assert many.height < 1600
    assert coloured(two, plots.OTHER) > 1000


def test_a_page_of_a_paper_takes_each_figure(tmp_path: Path) -> None:
    names = [f"a long name of class {number}" for number in range(50)]
    matrix = plots.confusion(np.eye(50, dtype=int), names, np.ones(50, dtype=int), 1000, "test")
    wide = drawing.tiles([np.zeros((400, 400, 3), np.uint8)] * 4, "title")
    for picture in (matrix, wide):
        text = drawing.save(picture, tmp_path / "figure.pdf").read_bytes()
        assert text.startswith(b"%PDF")
        assert b"/Type3" not in text, "which publishers refuse"
        width = float(re.findall(rb"/MediaBox \[ ?0 0 ([\d.]+)", text)[0]) / 72  # points
        assert 6 < width <= drawing.PAGE


def test_the_command_draws_all_figures_of_a_run(shapes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert tiny_train(shapes, folder, "trainer.precision=32-true").returncode == 0
    assert not (folder / "figures").exists()
    done = command("figures", f"run={folder}", "among=12", timeout=120)
    assert done.returncode == 0, done.stderr
    assert [Path(line).stem for line in done.stdout.splitlines() if line.endswith(".png")] == DRAWN
    assert {path.stem for path in (folder / "figures").iterdir()} == set(DRAWN)
    done = command("figures", f"run={folder}", "among=12", "format=svg", timeout=120)
    assert done.returncode == 0, done.stderr
    for name in DRAWN:
        root = ElementTree.parse(folder / f"figures/{name}.svg").getroot()
        assert float(root.get("width", "").removesuffix("pt")) / 72 <= drawing.PAGE, "a page of a paper"
    cam = command("figures", f"run={folder}", f"cam={shapes}/test/ring")
    assert cam.stdout == f"{folder}/figures/cam.png\n", cam.stderr
    height, width = np.asarray(Image.open(folder / "figures/cam.png")).shape[:2]
    assert width > 2 * height > 100, "one image beside the map over it"
    (tmp_path / "broken.jpg").write_bytes(b"broken")
    for word, sentence in (
        (f"cam={tmp_path}/*.jpg", "no image can be read"),
        ("cam=/none", "`cam=/none` names no image"),
        (f"cam={shapes}/test/ring data.on_error=skip", "`cam` draws the images that it names, on the CPU: remove"),
    ):
        refused = command("figures", f"run={folder}", *word.split())
        assert (refused.returncode, sentence in refused.stderr) == (2, True), refused.stderr
    wrong = command("figures", f"run={folder}", "crops=10")
    assert wrong.returncode == 2
    assert "`crops=10`: there is no such key" in wrong.stderr
    assert summary_of(folder)["status"] == "finished"


def test_figures_that_cannot_be_drawn_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/best.ckpt").touch()
    config: Any = SimpleNamespace(run_dir=str(tmp_path), monitor="val/acc1")
    experiment: Any = SimpleNamespace(data=None, devices=Devices("cpu", 1, 1), wandb=None)
    with caplog.at_level(logging.WARNING, logger="alexlab"):
        run.save_figures(config, experiment)
    assert "some figures could not be drawn (" in caplog.text


def test_letters_that_dejavu_lacks_come_from_an_installed_font(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.font_manager import fontManager

    entries = [SimpleNamespace(name=name, fname=name, weight=400, style="normal") for name in ("Any", "X CJK", "Y CJK")]
    monkeypatch.setattr(fontManager, "ttflist", entries)
    known = {"Any": "犬猫", "X CJK": "犬", "Y CJK": "犬"}
    monkeypatch.setattr(drawing, "_letters_of", lambda file: {ord(letter) for letter in known.get(file, "ח")})
    fonts, missing = drawing.fonts_for("dog é חתול 犬猫")
    assert ([family for family, _ in fonts], missing) == (["DejaVu Sans", "X CJK"], "ולת猫")
    assert len(drawing.fonts_for("dog é")[0]) == 1


@pytest.mark.parametrize("name", ["cat\nfish", "caf\udce9", "חתול", "犬", "$a_"])
def test_any_class_name_can_be_drawn(name: str) -> None:
    shown = printable(name)
    assert drawn(plots.per_class([0.5, 1.0], [shown, "dog"], "test")).width > 0
    pixels = [np.zeros((8, 8, 3), np.uint8)] * 2
    assert np.asarray(drawing.tiles(pixels, "", [(shown,), ("",)])).min() < 100
