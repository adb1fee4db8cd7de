"""A trained network as a folder for the Hugging Face hub: write it, and load it.

The folder has model.safetensors, config.json, preprocessor_config.json and README.md, the model card. Of a timm network
config.json is timm's, so that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it too.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from alexlab.engine.config import FORMER_NAMES, with_current_targets
from alexlab.engine.errors import UserError

PREFIX = "hub:"  # of a repository of the hub: hub:USER/NAME
WEIGHTS, CONFIG, PREPROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"
KEY = "alexlab"  # of ours in config.json
NEEDED = {"name", "net", "classes", "class_folders", "height", "width", "crop_ratio", "mean", "std"}


def need_extra(what: str) -> None:
    try:
        import huggingface_hub  # noqa: F401
        import safetensors  # noqa: F401
    except ImportError:
        raise UserError(f"{what} needs the extra: pip install 'alexlab[hub]'.") from None


def save(net: nn.Module, about: dict[str, Any], folder: Path) -> None:
    """Write weights and configs of a network.

    Args:
        about: what `read_config` returns: `net` (settings of the network), `is_timm`, `classes`, `class_folders`,
            `height`, `width`, `covered` (height and width before the crop), `crop_ratio`, `mean`, `std`.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {}
    if about["is_timm"]:
        from timm.models import save_for_hf

        labels = {"num_classes": len(about["classes"]), "label_names": about["classes"]}
        size = [len(about["mean"]), about["height"], about["width"]]
        ratio = math.nextafter(about["height"] / about["covered"][0], 0)  # timm rounds height / ratio down
        inputs = {"mean": about["mean"], "std": about["std"], "input_size": size, "crop_pct": ratio}
        save_for_hf(
            net, str(folder), labels, safe_serialization=True, data_config={**inputs, "interpolation": "bilinear"}
        )
        config = json.loads((folder / CONFIG).read_text())
        for key in ("tag", "license", "origin_url", "paper_ids"):  # of timm's weights, which these are not
            config["pretrained_cfg"].pop(key, None)
    else:
        weights = {name: value.contiguous() for name, value in net.state_dict().items()}
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / CONFIG, {**config, KEY: about})
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors lets only the owner read it
    if about["height"] != about["width"]:  # no `shortest_edge` covers a rectangle for images of each shape
        return
    crop = {"height": about["height"], "width": about["width"]}
    preprocessor = {
        "do_resize": True, "size": {"shortest_edge": min(about["covered"])}, "resample": 2, "do_center_crop": True,
        "crop_size": crop, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": about["mean"], "image_std": about["std"],
    }  # fmt: skip
    write_json(folder / PREPROCESSOR, preprocessor)


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def folder_of(named: str) -> Path | None:
    """Return the folder that `save` wrote; None if this names something else.

    Args:
        named: a folder; or hub:USER/NAME, which is downloaded unless it is in the cache of the hub.

    Raises:
        UserError: the repository cannot be downloaded, or is not of this project.
    """
    if named.startswith(PREFIX):
        need_extra(named)
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(named.removeprefix(PREFIX), allow_patterns=[WEIGHTS, "*.json"]))
        except Exception as error:  # of the hub, of the network, or a name that it refuses
            why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise UserError(f"{named} cannot be downloaded ({why}).") from error
        if read_config(folder) is None:
            raise UserError(f"{named} is no network of this project: {CONFIG} has no `{KEY}`.")
        return folder
    folder = Path(named).expanduser()
    return folder if read_config(folder) is not None else None


def read_config(folder: Path) -> dict[str, Any] | None:
    """Return what `save` wrote about the network; None if the folder is of something else."""
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        return None
    about = next((config[key] for key in (KEY, *FORMER_NAMES) if key in config), None) if type(config) is dict else None
    return with_current_targets(about) if isinstance(about, dict) and about.keys() >= NEEDED else None


def as_checkpoint(about: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Any]:
    """Return a checkpoint of a run with this network, as far as another run needs it."""
    model = {"name": about["name"], "net": about["net"], "mean": about["mean"], "std": about["std"]}
    config = {"model": {**model, "in_channels": len(about["mean"])}}
    state = {f"net.{name}": value for name, value in weights.items()}
    return {"state_dict": state, KEY: {"classes": about["class_folders"], "config": config}}


def card(
    about: dict[str, Any],
    results: Sequence[tuple[str, float, int | None, tuple[float, float] | None]],
    split: str,
    classes: Mapping[str, Mapping[str, float | None]],
    facts: Mapping[str, str],
    command: str,
    base: str | None,
) -> str:
    """Return the model card.

    Args:
        results: metrics as (name, value, number of images, 95 % interval).
        split: of which images `classes` are.
        classes: recall, precision and support of each class, of `alexlab eval`; or nothing.
        facts: paragraphs by their first word, such as Data.
        command: what trained the network.
        base: the repository of the hub whose weights the training started from.
    """
    from huggingface_hub import ModelCardData

    rows = [
        f"| {name} | {value:.4f} | {count or ''} | {'{:.4f} to {:.4f}'.format(*interval) if interval else ''} |"
        for name, value, count, interval in results
    ]
    lines = ["| metric | value | images | 95 % interval |", "|---|---|---|---|", *rows]
    if classes:
        lines += ["", f"| class ({split}) | recall | precision | images |", "|---|---|---|---|"]
    for name, each in classes.items():
        cells = ["-" if each[key] is None else f"{each[key]:.4f}" for key in ("recall", "precision")]
        lines.append(" | ".join(["| " + name.replace("|", "\\|"), *cells, f"{each['support']} |"]))
    listed = ", ".join(about["classes"][:50]) + (", ..." if len(about["classes"]) > 50 else "")
    height, width, covered = about["height"], about["width"], " x ".join(map(str, about["covered"]))
    colours = {1: "Grey", 3: "RGB", 4: "RGBA"}.get(len(about["mean"]), f"{len(about['mean'])}-channel")
    pixels = f"{colours} images, resized (bilinear) to cover {covered} pixels; of these the central {height} x {width} "
    pixels += f"pixels, scaled to 0-1 and normalized with mean {about['mean']} and std {about['std']}."
    function = "sigmoid()" if about["multilabel"] else "softmax(1)"
    timm = """
```python
import timm

net = timm.create_model("hf-hub:USER/NAME", pretrained=True).eval()  # needs timm alone
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net))
```
"""
    paragraphs = "\n\n".join(f"**{name}.** {text}" for name, text in facts.items())
    tables, library, tags = "\n".join(lines), "timm" if about["is_timm"] else "pytorch", ["image-classification", KEY]
    head = ModelCardData(library_name=library, pipeline_tag=tags[0], tags=tags, base_model=base)
    return f"""---
{head.to_yaml()}
---
# {about["name"]}

Classifies images into {len(about["classes"])} classes: {listed}.

{tables}

{paragraphs}

```
{command}
```

**Input.** {pixels}

**License, intended use and limits.** To be completed by the author.

```python
import {KEY}  # of the repository that trained the network

net, transform, classes = {KEY}.load("hub:USER/NAME")  # or a folder
probabilities = net(transform("picture.jpg")[None]).{function}
```
{timm if about["is_timm"] else ""}"""
