"""AlexNet's training from a folder, prepared JPEGs, prepared pixels and the device's memory.

python benchmarks/end_to_end.py FOLDER [--batch 1024] [--seconds 20] [--rounds 3] [--overrides KEY=VALUE ...]

The training is compared with the device alone, and with a loop that uses torchvision's reference input; the forms take
turns. FOLDER has train/ and val/ with class folders. The images are linked repeatedly, until they fill ten batches. On
a GPU the paper's AlexNet is compiled and trained in bf16 with 224-pixel crops. On a CPU it is neither compiled nor in
bf16, and --batch 32 is enough to see that the script works. --overrides are passed to `alexlab benchmark`, for instance
data.num_workers=16.
"""

import itertools
import json
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from common import in_turn, options, run
from input import SIDE, reference_folder

FORMS = {
    "folder": ("folder", ["data=folder"]),
    "jpeg": ("jpeg", ["data=prepared"]),
    "raw": ("raw", ["data=prepared"]),
    "device": ("raw", ["data=prepared", "data.crop_on=device", "data.cache=device"]),
}


def reference(root: Path, batch: int, seconds: float) -> float:
    """Return the images per second of a plain loop with the transforms of torchvision's references/classification."""
    import torch
    from torch.nn.functional import cross_entropy
    from torch.utils.data import DataLoader
    from torchvision.models import alexnet

    data = reference_folder(root / "train")
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    loader: DataLoader[Any] = DataLoader(
        data, batch, shuffle=True, drop_last=True, num_workers=len(os.sched_getaffinity(0)), pin_memory=kind == "cuda",
        persistent_workers=True,
    )  # fmt: skip
    net: Any = alexnet(num_classes=len(data.classes)).to(kind)
    if kind == "cuda":
        net = torch.compile(net.to(memory_format=torch.channels_last))
    optimizer = torch.optim.SGD(net.parameters(), 1e-9, momentum=0.9)
    done, start = 0, 0.0
    for step, (images, targets) in enumerate(itertools.chain.from_iterable(itertools.repeat(loader))):
        layout = torch.channels_last if kind == "cuda" else torch.contiguous_format
        images, targets = images.to(kind, memory_format=layout, non_blocking=True), targets.to(kind, non_blocking=True)
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            loss = cross_entropy(net(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= 3:
            done += len(targets)
        if step == 2 or (step > 2 and time.perf_counter() - start > seconds):
            if kind == "cuda":
                torch.cuda.synchronize()
            if step > 2:
                break
            start = time.perf_counter()
    return done / (time.perf_counter() - start)


def linked(source: Path, out: Path, least: int) -> Path:
    """Make a folder of links to the images of `source`; training images are repeated until there are `least`."""
    paths = sorted((source / "train").glob("*/*"))
    for repeat in range(-(-least // len(paths))):
        for path in paths:
            link = out / "train" / path.parent.name / f"{repeat:04d}-{path.name}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
    (out / "val").symlink_to((source / "val").resolve())
    return out


def main() -> None:
    args = options(__doc__, "folder", batch=1024, seconds=20.0, rounds=3, overrides=[], reference=False)
    if args.reference:
        print(reference(args.folder, args.batch, args.seconds))
        return
    import torch

    gpu = torch.cuda.is_available()
    model = ["model=alexnet", f"data.image_size={SIDE}", f"data.batch_size={args.batch}", f"compile={gpu}".lower()]
    model += ["augment=basic", f"seconds={args.seconds}", "format=json", *args.overrides]
    with tempfile.TemporaryDirectory() as folder:
        roots = {"folder": linked(args.folder, Path(folder, "folder"), 10 * args.batch)}
        for name, how in (("jpeg", ["format=jpeg"]), ("raw", ["format=raw", "square=true"])):
            roots[name] = Path(folder, name)
            run(["-m", "alexlab", "prepare", f"data.root={roots['folder']}", f"out={roots[name]}", *how])

        def measure(form: str) -> Any:
            if form == "torchvision_reference":
                how = [f"--batch={args.batch}", f"--seconds={args.seconds}", "--reference"]
                return float(run([__file__, str(roots["folder"]), *how]))
            name, overrides = FORMS[form]
            return json.loads(run(["-m", "alexlab", "benchmark", f"data.root={roots[name]}", *overrides, *model]))

        forms = [*FORMS, "torchvision_reference"]
        rates = in_turn(args.rounds, {form: partial(measure, form) for form in forms})
    where = torch.cuda.get_device_name(0) if gpu else "CPU: these are no figures of a GPU"
    print(f"{where}, torch {torch.__version__}, batch {args.batch}, {args.rounds} rounds of {args.seconds:g} s")
    plain = statistics.median(rates.pop("torchvision_reference"))
    print(f"{'torchvision_reference':22s} {plain:9.0f} images/s")
    for form, each in rates.items():
        loader, device, whole = (statistics.median(one[k] for one in each) for k in ("loader", "device", "end_to_end"))
        print(
            f"{form:22s} {whole:9.0f} images/s, {whole / device:.2f} of the device alone ({device:.0f}), loader alone "
            f"{loader:.0f}, {whole / plain:.2f} x torchvision_reference"
        )


if __name__ == "__main__":
    main()
