"""`alexlab export`: write a run's network to one file that needs no alexlab, and check the file's logits."""

import contextlib
import importlib
import io
import json
import logging
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from alexlab.analysis.intervals import accuracy_interval
from alexlab.commands.build import build_data
from alexlab.commands.evaluate import hash_of, only_read
from alexlab.commands.predict import Listed, find_images
from alexlab.data import decode
from alexlab.data.index import Index
from alexlab.data.sources import need_index
from alexlab.data.transforms import SampleTransform
from alexlab.engine import checkpoint_io as checkpoint
from alexlab.engine import mirror, naming
from alexlab.engine import run_dir as rundir
from alexlab.engine.devices import Devices
from alexlab.engine.errors import RunFailedError, UserError, counted
from alexlab.engine.metrics import is_always_one
from alexlab.engine.overrides import by_key, command_line
from alexlab.engine.schema import DataConfig, ExportConfig, TrainConfig
from alexlab.engine.settings import is_own_checkpoint
from alexlab.models.introspection import normalization
from alexlab.tasks import hub
from alexlab.tasks import load as loading

NAMES = {"onnx": "model.onnx", "torch_export": "model.pt2", "hub": "hub"}
# overrides that a model card does not show: they may hold addresses or secrets
PRIVATE = re.compile(r"[+~]*(logger|callbacks|paths|hydra|resume|allow)\b")
CHECKED = 16  # images at most to check the file on
ONNX_BYTES = 1_500_000_000  # of weights; torch puts larger ones into a second file, because protobuf ends at 2 GiB


class FromPixels(nn.Module):
    """Normalization (mean and std of each channel on a 0-1 scale) and network in one: pixels in, logits out."""

    scale: Tensor
    shift: Tensor

    def __init__(self, net: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("scale", torch.tensor([1 / (255 * s) for s in std]).view(1, -1, 1, 1))
        self.register_buffer("shift", torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Compute float32 logits (B, num_classes) of images, uint8 (B, C, H, W) of 0 to 255."""
        return self.net(images.float() * self.scale + self.shift)


def export(config: ExportConfig) -> None:
    """Write the file to a temporary path, load it, compare the logits with the run's, and move it.

    They are compared on real images, and for format=hub on random pixels.

    Raises:
        UserError: the run or an image does not exist, the extra `export` is not installed, the file cannot be written,
            or the network cannot be exported.
        RunFailedError: the file's logits are not the run's. The file is removed.
    """
    logs, format, ckpt = config.paths.local, config.format, config.ckpt
    need_extra(format)
    mirror.download_named(config.paths, config.run, ckpt)
    run_dir = rundir.find_run(config.run, logs, ckpt)
    out = Path(config.out).expanduser() if config.out else run_dir / NAMES[format]
    if format != "hub" and out.suffix != Path(NAMES[format]).suffix:
        raise UserError(f"`out={config.out}` must end in {Path(NAMES[format]).suffix} with format={format}.")
    net, transform, classes = loading.load(run_dir, ckpt, logs, allow=config.allow)
    if format == "hub":
        export_folder(config, run_dir, out, net, transform, classes)
        return
    run_config = loading.config_of(run_dir)
    pixels = read_pixels(*choose_images(config, run_config), transform)
    mean, std = normalization(net, run_config.model.mean, run_config.model.std, run_config.model.in_channels)
    about = {**describe(run_dir, ckpt, run_config, transform.crop, classes), "mean": mean, "std": std}
    program = capture(FromPixels(net.requires_grad_(False), mean, std), transform.crop.size)
    with torch.no_grad():
        expected = net(transform.normalize(pixels))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write, load = (write_onnx, load_onnx) if format == "onnx" else (write_torch, load_torch)
        # in a new folder, so that nothing is written through an existing link
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent) as folder:
            tmp_path = Path(folder, out.name)
            write(program, json.dumps(about), tmp_path)
            agreed = compare(load(tmp_path), pixels, expected, config.tolerance)
            tmp_path.replace(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): choose another path with out=FILE.") from error
    size = f"{out.stat().st_size / 1e6:.1f} MB"
    print(f"{rundir.shown(out)}: {size}, {about['model']}, {len(classes)} classes, any batch size")
    print(f"{agreed}\ndocs/export.md shows how to use the file without this package", flush=True)
    mirror.upload(config.paths, run_dir, [out])


def export_folder(
    config: ExportConfig, run_dir: Path, out: Path, net: nn.Module, transform: loading.EvalTransform, classes: list[str]
) -> None:
    """Write a folder for the Hugging Face hub, load it again, and compare the logits on random pixels."""
    if config.images is not None:
        raise UserError("`images` is for onnx and torch_export: format=hub is checked on random pixels. Remove it.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"`out={out}` exists: remove it, or give a new folder.")
    run_config, summary = loading.config_of(run_dir), rundir.read_summary(run_dir)
    mean, std = loading.statistics_of(run_config, net)
    crop = transform.crop
    about = {
        "name": run_config.model.name,
        "is_timm": type(net).__module__.startswith("timm."),
        "net": run_config.model.net,
        "classes": classes,
        "class_folders": list(checkpoint.load(rundir.ckpt_of(run_dir, config.ckpt))["alexlab"]["classes"]),
        "height": crop.size[0], "width": crop.size[1], "covered": list(crop.covered), "crop_ratio": crop.crop_ratio,
        "mean": mean, "std": std, "multilabel": run_config.data.multilabel,
        "run": rundir.name_of(run_dir), "checkpoint": Path(config.ckpt).name, "version": version("alexlab"),
    }  # fmt: skip
    given = [text for text in by_key(run_config.overrides).values() if not PRIVATE.match(text)]
    command = command_line("train", *naming.without_paths(given))
    tested = classes_of(run_dir, config.ckpt, summary.get("dataset", {}).get("root"))
    is_tuned = about["is_timm"] and run_config.model.pretrained
    base = getattr(net, "pretrained_cfg", {}).get("hf_hub_id") if is_tuned else None
    results = results_of(run_config, summary, config.ckpt, len(classes))
    card = hub.card(about, results, *tested, facts_of(run_config, summary, about, config.ckpt), command, base)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent) as folder:
            tmp_path = Path(folder, out.name)
            hub.save(net, about, tmp_path)
            (tmp_path / "README.md").write_text(card, encoding="utf-8")
            pixels = torch.randint(0, 256, (2, crop.channels, *crop.size), dtype=torch.uint8)
            loaded = loading.load_folder(tmp_path, config.allow)
            with torch.no_grad():
                expected = net(transform.normalize(pixels))
            agreed = compare(
                lambda images: loaded.net(loaded.transform.normalize(images)), pixels, expected, config.tolerance
            )
            tmp_path.rename(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): choose another path with out=DIR.") from error
    size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    print(f"{rundir.shown(out)}: {size:.1f} MB, {about['name']}, {len(classes)} classes\n{agreed}")
    print("Read and complete the card in README.md; then upload the folder with:")
    print(f"  hf upload USER/{out.name} {shlex.quote(rundir.shown(out))}", flush=True)


def results_of(
    run_config: TrainConfig, summary: dict[str, Any], ckpt: str, num_classes: int
) -> list[tuple[str, float, int | None, Any]]:
    """Return the metrics of a run's checkpoint, with the number of images and, of acc1, the 95 % interval."""
    images = summary.get("dataset", {}).get("images", {})
    metrics = dict(summary.get(ckpt, {})) if ckpt in ("best", "last") else {}
    if ckpt == "best" and "test" in images:
        metrics |= summary.get("test", {})
    results = []
    for key, value in metrics.items():
        split = key.partition("/")[0]  # with trainer.limit_val_batches, the number of images is not known
        count = images.get(split) if getattr(run_config.trainer, f"limit_{split}_batches", None) is None else None
        interval = accuracy_interval(round(value * count), count) if key.endswith("/acc1") and count else None
        if not is_always_one(key, [value], num_classes):
            results.append((key, value, count, interval))
    return results


def classes_of(run_dir: Path, ckpt: str, root: str | None) -> tuple[str, dict[str, dict[str, float | None]]]:
    """Return the split and the results of `alexlab eval` for each class of the run's own images; "" and {} without."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        result = json.loads((run_dir / "eval.json").read_text())
        is_of_ckpt = result["sha256"] == hash_of(rundir.ckpt_of(run_dir, ckpt))
        if is_of_ckpt and (result["root"], result["crops"]) == (root, 1):
            return result["split"], result["classes"]
    return "", {}


def facts_of(run_config: TrainConfig, summary: dict[str, Any], about: dict[str, Any], ckpt: str) -> dict[str, str]:
    """Return the paragraphs of a model card about weights, images and training."""
    if "epochs" not in summary:  # the run has not ended, or has failed
        return {}
    epochs = summary["epochs"]
    best = f", epoch {summary['best_epoch']} of {epochs}, which {run_config.monitor} chose" if ckpt == "best" else ""
    counts = ", ".join(f"{count:,} {split}" for split, count in summary["dataset"]["images"].items())
    name = Path(str(run_config.data.root)).name if run_config.data.name == "folder" else run_config.data.name
    versions = summary["versions"] | ({"timm": version("timm")} if about["is_timm"] else {})
    start = "published weights" if run_config.model.pretrained else "scratch"
    if run_config.init_from or (run_config.ckpt_path and not is_own_checkpoint(run_config.model_dump())):
        start = "the weights of another training"
    numbers = f"{epochs} epochs, seed {run_config.seed}, learning rate {summary.get('effective_lr')}"
    libraries = ", ".join(f"{key} {number}" for key, number in versions.items())
    if commit := (summary.get("git") or {}).get("commit"):
        libraries += f", commit {commit[:10]}"
    return {
        "Weights": f"{Path(ckpt).name}{best}.",
        "Data": f"{name}: {counts} images.",
        "Training": f"From {start}: {numbers}. {libraries}.",
    }


def need_extra(format: str) -> None:
    """Raise UserError if the packages that the format needs are not installed."""
    if format == "hub":
        hub.need_extra("format=hub")
    try:
        for name in ("onnx", "onnxscript", "onnxruntime") if format == "onnx" else ():
            importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"format=onnx needs the extra: pip install 'alexlab[export]' ({error}).") from None


def choose_images(config: ExportConfig, run_config: TrainConfig) -> tuple[Index, list[int]]:
    """Choose at most `CHECKED` images, evenly spaced, of `config.images` or of the run's own test images."""
    images: Index
    if config.images:
        images = Listed(find_images(config.images))
    else:
        settings = only_read(run_config.data.model_dump(exclude_unset=True), config.paths.data)
        settings |= {"cache": None, "crop_on": "auto"}
        run_config = run_config.model_copy(update={"data": DataConfig.model_validate(settings)})
        try:
            data = need_index(build_data(run_config, Devices("cpu", 1, 1), trusted=config.allow), "export").read()
        except UserError as error:
            raise UserError(f"{error} The file is checked on real images: give some with images=PATH.") from None
        images = data.splits[data.test_split]
    available = len(images.targets)
    count = min(CHECKED, available)
    return images, [i * available // count for i in range(count)]


def read_pixels(images: Index, numbers: list[int], transform: loading.EvalTransform) -> Tensor:
    """Return uint8 (B, C, H, W), cropped as in the run's evaluation; UserError if an image cannot be read."""
    pixels = []
    for i in numbers:
        try:
            pixels.append(transform.crop(images.picture(i)))
        except OSError as error:
            reason = decode.BrokenImageError(images.path(i), error).reason
            raise UserError(f"{reason}. Give images to check the file on with images=PATH.") from None
    return torch.stack(pixels).contiguous()


def describe(
    run_dir: Path, ckpt: str, run_config: TrainConfig, crop: SampleTransform, classes: list[str]
) -> dict[str, Any]:
    """Return the metadata that is stored in the file: classes, input, output, preprocessing, versions."""
    path, (height, width) = rundir.ckpt_of(run_dir, ckpt), crop.size
    mode = decode.MODES.get(crop.channels, "as in training")
    function = "sigmoid" if run_config.data.multilabel else "softmax"
    shape = f"(B, {crop.channels}, {height}, {width})"
    return {
        "classes": classes,
        "class_folders": list(checkpoint.load(path)["alexlab"]["classes"]),
        "input": f"images: uint8 {shape} of 0 to 255, {mode}, any B; mean and std are applied inside",
        "output": f"logits: float32 (B, {len(classes)}), in the order of classes; their {function} is probabilities",
        "mode": mode,
        "preprocessing": "turned as EXIF says; converted to Pillow's mode; scaled to the smallest size that covers "
        "covered (width, height), the longer side rounded down; the middle width x height of that (of a square, "
        "torchvision's Resize of short_side and CenterCrop)",
        "image_size": run_config.data.image_size,
        "height": height,
        "width": width,
        "crop_ratio": crop.crop_ratio,
        "covered": list(crop.covered[::-1]),
        "short_side": min(crop.covered),
        "interpolation": "bilinear, antialiased",
        "model": run_config.model.name,
        "run": rundir.name_of(run_dir),
        "checkpoint": path.name,
        "alexlab": version("alexlab"),
        "torch": torch.__version__,
    }


def capture(net: FromPixels, size: tuple[int, int]) -> ExportedProgram:
    """Return the network's graph, for any number of images of `size` (height, width); UserError if torch cannot."""
    images = torch.zeros(2, net.scale.shape[1], *size, dtype=torch.uint8)  # torch takes a batch of 1 for a constant
    fix = "`forward` must consist of tensor operations, and must not depend on values or on the number of images."
    with torch.no_grad(), refused(f"{type(net.net).__name__} cannot be exported", fix):
        program = torch.export.export(net, (images,), dynamic_shapes=({0: Dim("batch")},))
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # contains paths of this machine
    return program


@contextlib.contextmanager
def refused(what: str, fix: str) -> Iterator[None]:
    """Turn any error of torch into a UserError with the first line. Messages of torch are pages long."""
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    except Exception as error:
        why = error.__cause__ or error
        line = (str(why).strip().splitlines() or [""])[0][:200]
        raise UserError(f"{what} ({type(why).__name__}: {line}): {fix}") from error
    finally:
        logging.disable(logging.NOTSET)


def write_onnx(program: ExportedProgram, about: str, path: Path) -> None:
    """Write the ONNX file. Raises UserError if ONNX lacks an operation, or if one file cannot hold the weights."""
    size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    if size > ONNX_BYTES:
        raise UserError(
            f"The weights take {size / 1e9:.1f} GB, and an ONNX file holds at most {ONNX_BYTES / 1e9:.1f} GB: use "
            "format=torch_export, which has no such limit."
        )
    with refused("ONNX cannot represent the network", "use format=torch_export."):
        names: Any = {"input_names": ["images"], "output_names": ["logits"]}
        model = torch.onnx.export(program, **names, dynamic_shapes=({0: "batch"},), dynamo=True, verbose=False)
    assert model is not None
    model.model.metadata_props["alexlab"] = about
    model.save(path)


def load_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def write_torch(program: ExportedProgram, about: str, path: Path) -> None:
    content = io.BytesIO()  # torch's archive hides why a file could not be written
    torch.export.save(program, content, extra_files={"alexlab.json": about})
    path.write_bytes(content.getbuffer())


def load_torch(path: Path) -> Callable[[Tensor], Tensor]:
    with path.open("rb") as file:  # torch takes only paths that end in .pt2
        return torch.export.load(file).module()


def compare(net: Callable[[Tensor], Tensor], pixels: Tensor, expected: Tensor, tolerance: float) -> str:
    """Return a line to print about the file's logits; RunFailedError if they differ from the run's too much."""
    with torch.no_grad():  # two batches, because the file must take any batch size
        logits = torch.cat([net(part) for part in (pixels[:1], pixels[1:]) if len(part)])
    worst = float((logits - expected).abs().max())
    same = int((logits.argmax(1) == expected.argmax(1)).sum())
    result = f"on {counted(len(pixels), 'image')}, the logits differ from the run's by {worst:.1e} at most"
    if not worst <= tolerance:  # true for NaN
        largest = float(expected.abs().max())
        raise RunFailedError(
            f"The file was removed, because it is not the run's network: {result}, and tolerance={tolerance} (the "
            f"largest logit is {largest:.1f}).",
            1,
        )
    return f"checked: {result} (tolerance {tolerance}), and {same} of {len(pixels)} top-1 classes are the same"
