"""A trained network as a folder for the Hugging Face hub."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import command, tiny_train
from PIL import Image

import alexlab
from alexlab.analysis.intervals import accuracy_interval
from alexlab.engine.errors import UserError
from alexlab.tasks import hub

pytest.importorskip("safetensors")
pytest.importorskip("huggingface_hub")


@pytest.fixture(scope="module", params=["torchvision", "timm"])
def shared(request: pytest.FixtureRequest, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run, and the folder that was made of it."""
    folder = tmp_path_factory.mktemp(request.param)
    run_dir, out = folder / "train/runs/one", folder / "out"
    words = []
    if request.param == "timm":
        pytest.importorskip("timm")
        words = ["model=timm", "model.name=resnet18"]
    done = tiny_train(shapes, run_dir, "trainer.precision=32-true", *words)
    assert done.returncode == 0, done.stderr
    if request.param == "timm":  # its numbers of each class are then in the card
        done = command("eval.py", f"run={run_dir}")
        assert done.returncode == 0, done.stderr
    done = command("export", f"run={run_dir}", "format=hub", f"out={out}")
    assert done.returncode == 0, done.stderr
    assert f"  hf upload USER/out {out}\n" in done.stdout
    return run_dir, out


def test_the_folder_has_the_network_of_the_run(shared: tuple[Path, Path], shapes: Path) -> None:
    run_dir, out = shared
    assert {path.name for path in out.iterdir()} == {hub.WEIGHTS, hub.CONFIG, hub.PREPROCESSOR, "README.md"}
    image = next((shapes / "val").rglob("*.jpg"))
    ours, theirs = alexlab.load(run_dir), alexlab.load(out)
    assert theirs.classes == ours.classes
    with torch.no_grad():
        pixels = theirs.transform(image)[None]
        assert torch.equal(pixels, ours.transform(image)[None])
        assert torch.equal(theirs.net(pixels), ours.net(pixels))
    preprocessor = json.loads((out / hub.PREPROCESSOR).read_text())
    assert preprocessor["crop_size"] == {"height": pixels.shape[2], "width": pixels.shape[3]}
    summary = json.loads((run_dir / "summary.json").read_text())
    card = (out / "README.md").read_text()
    accuracy, count = summary["test"]["test/acc1"], summary["dataset"]["images"]["test"]
    low, high = accuracy_interval(round(accuracy * count), count)
    assert f"| test/acc1 | {accuracy:.4f} | {count} | {low:.4f} to {high:.4f} |" in card
    assert f"**Weights.** best, epoch {summary['best_epoch']} of {summary['epochs']}, which val/acc1 chose.\n" in card
    assert f"**Training.** From scratch: {summary['epochs']} epochs, seed 0, learning rate " in card
    covered = " x ".join(map(str, ours.transform.crop.covered))
    assert f"**Input.** RGB images, resized (bilinear) to cover {covered} pixels; of these the central 64 x 64 " in card
    assert ("timm.create_model(" in card) == (run_dir / "eval.json").is_file()
    if (run_dir / "eval.json").is_file():
        for name, each in json.loads((run_dir / "eval.json").read_text())["classes"].items():
            assert f"| {name} | {each['recall']:.4f} | " in card
            assert re.search(rf"^\| {name} .* \| {each['support']} \|$", card, re.MULTILINE)
    assert (out / hub.WEIGHTS).stat().st_mode == (out / hub.CONFIG).stat().st_mode
    assert str(shapes) not in card, "a path of this machine"


def test_timm_loads_the_folder_of_a_timm_network(shared: tuple[Path, Path], shapes: Path) -> None:
    run_dir, out = shared
    if not json.loads((out / hub.CONFIG).read_text())[hub.KEY]["is_timm"]:
        pytest.skip("not a network of timm")
    import timm
    from timm.data import create_transform, resolve_data_config

    net = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    ours = alexlab.load(run_dir)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(net(pixels), ours.net(pixels))
    settings = resolve_data_config({}, model=net)
    assert settings["input_size"] == (3, *ours.transform.crop.size)
    image, transform = next((shapes / "val").rglob("*.jpg")), create_transform(**settings)
    assert transform.transforms[0].size == ours.transform.crop.covered[0]
    with Image.open(image) as opened:
        assert (transform(opened.convert("RGB")) - ours.transform(image)).abs().mean() < 0.05
    config = json.loads((out / hub.CONFIG).read_text())["pretrained_cfg"]
    assert not config.keys() & {"tag", "license", "origin_url", "paper_ids"}, "of weights that these are not"


@pytest.mark.parametrize("lacks", ["everything", "what only a finished run has"])
def test_the_card_of_a_run_that_failed_says_less(lacks: str, shared: tuple[Path, Path], tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(shared[0], tmp_path / "run"))
    (run_dir / "summary.json").unlink()
    if lacks != "everything":
        (run_dir / "summary.json").write_text('{"status": "failed"}')
    done = command("export", f"run={run_dir}", "format=hub", f"out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "out/README.md").read_text()
    assert "**Input.** RGB images" in card
    assert "**Weights.**" not in card
    assert "test/acc1" not in card


def test_init_from_the_folder(shared: tuple[Path, Path], shapes: Path, tmp_path: Path) -> None:
    run_dir, out = shared
    words = [f"from_run={run_dir}", f"init_from={out}", "optimizer.lr=1e-30", "paths.logs=" + str(tmp_path)]
    done = command("train.py", *words, f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    before, after = (alexlab.load(each).net.state_dict() for each in (run_dir, tmp_path / "run"))
    done = command("export", f"run={tmp_path / 'run'}", "format=hub", f"out={tmp_path / 'tuned'}")
    assert done.returncode == 0, done.stderr
    assert "**Training.** From the weights of another training: " in (tmp_path / "tuned/README.md").read_text()
    for name, value in before.items():
        if name.rpartition(".")[2] in ("weight", "bias"):
            assert torch.equal(value, after[name]), name

    # other classes, and another normalization
    fewer = tmp_path / "fewer"
    for split in ("train", "val"):
        for folder in sorted((shapes / split).iterdir())[:4]:
            shutil.copytree(folder, fewer / split / folder.name)
    done = command("train.py", *words, f"data.root={fewer}", "dry_run=true")
    assert "the last layer" in done.stdout, done.stdout + done.stderr
    done = command("train.py", *words, "model.mean=[0.5,0.5,0.5]", "dry_run=true")
    assert done.returncode == 2
    assert "was trained with another normalization of the inputs: add model.mean=[0.485,0.456,0.406]" in done.stderr


def test_a_repository_in_the_cache_of_the_hub_is_loaded_by_name(
    shared: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out = shared
    cache = tmp_path / "hub/models--me--net"
    shutil.copytree(out, cache / "snapshots" / ("0" * 40))
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert alexlab.load("hub:me/net").classes == alexlab.load(out).classes
    with pytest.raises(UserError, match=r"^hub:me/other cannot be downloaded \("):
        alexlab.load("hub:me/other")


def test_what_is_no_such_folder_is_refused(shared: tuple[Path, Path], tmp_path: Path) -> None:
    run_dir, out = shared
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    about = json.loads((copy / hub.CONFIG).read_text())
    about[hub.KEY]["net"]["_target_"] = "os.system"
    (copy / hub.CONFIG).write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"os\.system"):
        alexlab.load(copy)
    del about[hub.KEY]["net"]
    (copy / hub.CONFIG).write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"is a folder of format=hub, not a run\. .* if its config.json is complete"):
        alexlab.load(copy)
    shutil.copy(out / hub.CONFIG, copy)
    (copy / hub.WEIGHTS).write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"model.safetensors cannot be read as a checkpoint"):
        alexlab.load(copy)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").touch()
    done = command("export", f"run={run_dir}", "format=hub", f"out={tmp_path / 'other'}")
    assert done.returncode == 2
    images = command("export", f"run={run_dir}", "format=hub", f"images={run_dir}", f"out={tmp_path / 'new'}")
    assert (images.returncode, "`images` is for onnx and torch_export" in images.stderr) == (2, True), images.stderr
    no_run = command("predict", f"run={out}", f"images={run_dir}")
    assert f"`run={out}` is a folder of format=hub, not a run" in no_run.stderr
    nowhere = command("export", f"run={run_dir}", "format=hub", f"out={tmp_path / 'other/notes.txt/x'}")
    assert (nowhere.returncode, "choose another path with out=DIR" in nowhere.stderr) == (2, True), nowhere.stderr
    assert f"`out={tmp_path / 'other'}` exists: remove it, or give a new folder." in done.stderr
