"""A run's network as one file for use without this package, checked before it is in place: the task of export.py."""

import contextlib
import importlib
import io
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from alexlab.commands.predict import Listed, find_images
from alexlab.data import decode
from alexlab.data.dataset import ImageSource
from alexlab.data.fast import prepared
from alexlab.engine import checkpoint_io as checkpoint
from alexlab.engine import run_dir as rundir
from alexlab.engine.errors import RunFailedError, UserError
from alexlab.engine.schema import ExportConfig, TrainConfig
from alexlab.models.introspection import normalization
from alexlab.tasks import load as loading

NAMES = {"onnx": "model.onnx", "torch_export": "model.pt2"}
CHECKED = 16  # images at most that the file is checked on
ONNX_BYTES = 1_500_000_000  # of weights; of more, torch writes them beside the file, as protobuf ends at 2 GiB

# docs/export.md holds them too, and a test runs them from there
EXAMPLES = {
    "onnx": """\
import json, numpy, onnxruntime, PIL.Image, PIL.ImageOps

net = onnxruntime.InferenceSession("model.onnx")
about = json.loads(net.get_modelmeta().custom_metadata_map["alexlab"])
image = PIL.ImageOps.exif_transpose(PIL.Image.open("picture.jpg")).convert("RGB")
image = image.resize([about["short_side"] * side // min(image.size) for side in image.size], PIL.Image.BILINEAR)
x, y = (round((side - about["image_size"]) / 2) for side in image.size)
pixels = numpy.array(image)[y : y + about["image_size"], x : x + about["image_size"]].transpose(2, 0, 1)[None]
print(about["classes"][net.run(None, {"images": pixels})[0].argmax()])
""",
    "torch_export": """\
import json, numpy, torch, PIL.Image, PIL.ImageOps

net = torch.export.load("model.pt2", extra_files=(files := {"alexlab.json": ""})).module()
about = json.loads(files["alexlab.json"])
image = PIL.ImageOps.exif_transpose(PIL.Image.open("picture.jpg")).convert("RGB")
image = image.resize([about["short_side"] * side // min(image.size) for side in image.size], PIL.Image.BILINEAR)
x, y = (round((side - about["image_size"]) / 2) for side in image.size)
pixels = numpy.array(image)[y : y + about["image_size"], x : x + about["image_size"]].transpose(2, 0, 1)[None]
print(about["classes"][net(torch.tensor(pixels)).argmax()])
""",
}


class FromPixels(nn.Module):
    """A network with its normalization, so that who uses the file gives pixels as they are.

    Args:
        mean, std: of RGB on a 0-1 scale.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, net: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("scale", torch.tensor([1 / (255 * s) for s in std]).view(1, 3, 1, 1))
        self.register_buffer("shift", torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) of 0..255, RGB -> float32 logits (B, classes)."""
        return self.net(images.float() * self.scale + self.shift)


def export(config: ExportConfig) -> None:
    """Write the file beside its place, load it, compare its logits with the run's on real images, and move it there.

    Raises:
        UserError: no such run, images, place or extra, or a network that cannot be exported.
        RunFailedError: the file's logits are not the run's; nothing is left of it.
    """
    logs, format, ckpt = Path(config.paths.logs), str(config.format), str(config.ckpt)
    need_extra(format)
    run_dir = rundir.find_run(str(config.run), logs, ckpt)
    out = Path(config.out).expanduser() if config.out else run_dir / NAMES[format]
    if out.suffix != Path(NAMES[format]).suffix:
        raise UserError(f"out={config.out}: its name must end in {Path(NAMES[format]).suffix} with format={format}.")
    net, transform, classes = loading.load(run_dir, ckpt, logs)
    its = loading.config_of(run_dir)
    pixels = read_pixels(*find_real(config, its), transform)
    mean, std = normalization(net, its.model.mean, its.model.std)
    about = {**describe(run_dir, ckpt, its, classes), "mean": mean, "std": std}
    program = capture(FromPixels(net.requires_grad_(False), about["mean"], about["std"]), its.data.image_size)
    with torch.no_grad():
        expected = net(transform.normalize(pixels))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write, load = (write_onnx, load_onnx) if format == "onnx" else (write_torch, load_torch)
        # in a folder of a new name: a link that lies there already would be written through
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent) as folder:
            beside = Path(folder, out.name)
            write(program, json.dumps(about), beside)
            agreed = compare(load(beside), pixels, expected, config.tolerance)
            beside.replace(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): choose another place with out=FILE.") from error
    shown = rundir.shown(out)
    print(f"{shown}: {out.stat().st_size / 1e6:.1f} MB, {about['model']}, {len(classes)} classes, any batch size")
    print(f"{agreed}\n\nwithout this package:\n")
    print(EXAMPLES[format].replace(f'"{NAMES[format]}"', json.dumps(shown)), end="", flush=True)


def need_extra(format: str) -> None:
    """Raises UserError where ONNX's packages are missing."""
    try:
        for name in ("onnx", "onnxscript", "onnxruntime") if format == "onnx" else ():
            importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"format=onnx needs the extra: pip install 'alexlab[export]' ({error}).") from None


def find_real(config: ExportConfig, its: TrainConfig) -> tuple[ImageSource, list[int]]:
    """At most `CHECKED` of the images given, or of the run's own test/, val/ or class folders, from all over them.

    Raises:
        UserError: there are none.
    """
    root = Path(its.data.root)
    folder = next((root / name for name in ("test", "val") if (root / name).is_dir()), root)
    images: ImageSource
    try:
        if not config.images and prepared.is_prepared(root):
            splits = prepared.read(root)
            images = splits.get("test") or splits["val"]
        else:
            images = Listed(find_images(str(config.images or folder)))
    except UserError:
        if config.images:
            raise
        fix = "the file is checked on real ones: give some with images=PATH (an image, a folder or a quoted glob)."
        raise UserError(f"{folder} holds no image any more, and {fix}") from None
    found = len(images.targets)
    count = min(CHECKED, found)
    return images, [i * found // count for i in range(count)]


def read_pixels(images: ImageSource, numbers: list[int], transform: loading.EvalTransform) -> Tensor:
    """uint8 (B, 3, S, S), cropped as in the run's evaluation; broken images are told and left out.

    Raises:
        UserError: all are broken.
    """
    pixels = []
    for i in numbers:
        try:
            pixels.append(transform.crop(images.picture(i)))
        except OSError as error:
            print(f"note: {decode.BrokenImageError(images.path(i), error).reason}: left out of the check.")
    if not pixels:
        raise UserError("no image is left to check the file on: give whole ones with images=PATH.")
    return torch.stack(pixels).contiguous()


def describe(run_dir: Path, ckpt: str, its: TrainConfig, classes: list[str]) -> dict[str, Any]:
    """What goes into the file beside the network: all that its user needs to know."""
    size, ratio, path = its.data.image_size, its.augment.crop_ratio, rundir.ckpt_of(run_dir, ckpt)
    return {
        "classes": classes,
        "class_folders": list(checkpoint.load(path)["alexlab"]["classes"]),
        "input": f"images: uint8 (B, 3, {size}, {size}) of 0 to 255, RGB, any B; mean and std are applied inside",
        "output": f"logits: float32 (B, {len(classes)}), in the order of classes; their softmax is the probabilities",
        "preprocessing": "turned as EXIF says; scaled so that the short side has short_side pixels and the long one as "
        "many, rounded down; the middle image_size x image_size of that (torchvision's Resize and CenterCrop)",
        "image_size": size, "crop_ratio": ratio, "short_side": round(size / ratio),
        "interpolation": "bilinear, antialiased",
        "model": its.model.name, "run": rundir.name_of(run_dir), "checkpoint": path.name,
        "alexlab": version("alexlab"), "torch": torch.__version__,
    }  # fmt: skip


def capture(net: FromPixels, size: int) -> ExportedProgram:
    """The network's graph, for any number of images of `size` x `size` pixels.

    Raises:
        UserError: it has none, or one for a fixed number of images.
    """
    images = torch.zeros(2, 3, size, size, dtype=torch.uint8)  # torch takes a 1 for a fixed one
    fix = "its forward must be of tensor operations alone, and decide nothing by values or the number of images."
    with torch.no_grad(), refused(f"{type(net.net).__name__} cannot be exported", fix):
        program = torch.export.export(net, (images,), dynamic_shapes=({0: Dim("batch")},))
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # this machine's paths, which would go along
    return program


@contextlib.contextmanager
def refused(what: str, fix: str) -> Iterator[None]:
    """Torch's reasons are of many types and pages long: a UserError with the first line, and nothing beside it."""
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
    """Raises UserError where ONNX has not what the network needs, or no room for it in one file."""
    size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    if size > ONNX_BYTES:
        sizes = f"the weights take {size / 1e9:.1f} GB, and one ONNX file holds {ONNX_BYTES / 1e9:.1f} GB of them"
        raise UserError(f"{sizes}: format=torch_export has no such limit.")
    with refused("ONNX cannot hold the network", "format=torch_export can."):
        made = torch.onnx.export(
            program, input_names=["images"], output_names=["logits"], dynamic_shapes=({0: "batch"},),
            dynamo=True, verbose=False,
        )  # fmt: skip
    assert made is not None
    made.model.metadata_props["alexlab"] = about
    made.save(path)


def load_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def write_torch(program: ExportedProgram, about: str, path: Path) -> None:
    whole = io.BytesIO()  # torch's archive hides why a file could not be written
    torch.export.save(program, whole, extra_files={"alexlab.json": about})
    path.write_bytes(whole.getbuffer())


def load_torch(path: Path) -> Callable[[Tensor], Tensor]:
    with path.open("rb") as file:  # by its path, it must end in .pt2
        return torch.export.load(file).module()


def compare(net: Callable[[Tensor], Tensor], pixels: Tensor, expected: Tensor, tolerance: float) -> str:
    """How near the file's logits are to the run's, in words.

    Raises:
        RunFailedError: not within `tolerance`.
    """
    with torch.no_grad():  # one image, then the others: the file must take both
        found = torch.cat([net(part) for part in (pixels[:1], pixels[1:]) if len(part)])
    worst = float((found - expected).abs().max())
    same = int((found.argmax(1) == expected.argmax(1)).sum())
    told = f"on {len(pixels)} image(s) its logits differ from the run's by {worst:.1e} at most"
    if not worst <= tolerance:  # NaN is not
        told += f", and tolerance={tolerance} (the largest logit is {float(expected.abs().max()):.1f})."
        raise RunFailedError(f"the file is not the run's network, and was not kept: {told}", 1)
    return f"checked: {told} (tolerance {tolerance}), and {same} of {len(pixels)} best classes are the same"
