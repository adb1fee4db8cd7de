"""Seconds to read the index of a large folder, and to load it from the cache; a bare os.scandir walk; torchvision.

Also measured are the fingerprint, and the first batch of a pass that resumes late in an epoch.

python benchmarks/index.py [--files 1281167] [--classes 1000] [--rounds 3] [--torchvision]

The script creates that many empty temporary files, which takes a minute, and removes them at the end.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from common import about, options

from alexlab.data.fast.folder_cache import cached_scan
from alexlab.data.folder import ImageIndex, scan
from alexlab.data.sampler import TrainBatchSampler


def make(root: Path, files: int, classes: int) -> None:
    for c in range(classes):
        folder = root / f"n{c:08d}"
        folder.mkdir(parents=True)
        for i in range(c, files, classes):
            os.close(os.open(f"{folder}/n{c:08d}_{i}.JPEG", os.O_CREAT | os.O_WRONLY))


def walk(root: Path) -> int:
    """Look at each entry, and do nothing with it."""
    count = 0
    waiting = [str(root)]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                else:
                    count += 1
    return count


def sizes(index: ImageIndex) -> int:
    """Read the size of each file, of which the fingerprint reads a sample."""
    return sum(os.stat(index.path(i)).st_size for i in range(len(index)))  # noqa: PTH116, as folder.py does


def timed(what: Callable[[], Any]) -> tuple[float, float, Any]:
    """Return the seconds that `what` takes, the MB by which the process grows, and the result."""
    memory, start = psutil.Process().memory_info().rss, time.perf_counter()
    result = what()
    return time.perf_counter() - start, (psutil.Process().memory_info().rss - memory) / 1e6, result


def main() -> None:
    args = options(__doc__, files=1_281_167, classes=1000, rounds=3, torchvision=False)
    with tempfile.TemporaryDirectory() as folder:
        root, cache = Path(folder, "images"), Path(folder, "cache")
        make(root, args.files, args.classes)
        names = ("walk", "scan", "cached", "fingerprint", "all sizes", "late start")
        times: dict[str, list[float]] = {name: [] for name in names}
        assert walk(root) == args.files  # the system's cache of names is warm for all
        time.sleep(2.5)  # the index of a folder that has just changed is not saved
        cached_scan(root, None, cache)
        for _ in range(args.rounds):
            times["walk"].append(timed(lambda: walk(root))[0])
            times["scan"].append(timed(lambda: scan(root))[0])
            seconds, _, index = timed(lambda: cached_scan(root, None, cache))
            times["cached"].append(seconds)
            times["fingerprint"].append(timed(lambda index=index: index.fingerprint)[0])  # type: ignore[misc]
            times["all sizes"].append(timed(lambda index=index: sizes(index))[0])  # type: ignore[misc]
            assert len(index) == args.files
            late = TrainBatchSampler(len(index), min(256, len(index)), seed=0)
            late.resume_at = (0, len(late) * 4 // 5)
            times["late start"].append(timed(lambda late=late: next(iter(late), None))[0])  # type: ignore[misc]
        held = len(index.names) + index.ends.nbytes + index.targets.nbytes
        results: dict[str, Any] = {name: round(statistics.median(values), 3) for name, values in times.items()}
        results["scan / walk"] = round(results["scan"] / max(results["walk"], 1e-9), 2)
        results["bytes an image"] = round(held / args.files, 1)
        if args.torchvision:
            from torchvision.datasets import ImageFolder

            seconds, grown, _ = timed(lambda: ImageFolder(str(root)))
            results["ImageFolder"] = round(seconds, 3)
            results["ImageFolder's bytes an image"] = round(grown * 1e6 / args.files)
    print(about(files=args.files, rounds=args.rounds, **results))


if __name__ == "__main__":
    main()
