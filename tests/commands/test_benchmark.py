"""benchmark.py and benchmarks/: that they run and say what they should; no time is looked at."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, clean_env, command

from alexlab.commands import benchmark
from alexlab.data.datamodule import ImageFolders
from alexlab.data.transforms import SampleTransform

WORDS = [*TINY, "data=folder", "data.batch_size=8", "data.num_workers=2", "seconds=0.2", "data.on_error=skip"]


def test_four_rates_and_the_bound(shapes: Path, tmp_path: Path) -> None:
    words = [word for word in WORDS if not word.startswith("logger")]
    done = command("benchmark", *words, f"data.root={shapes}", "format=json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    bound = found.pop("bound_by")
    assert set(found) == set(benchmark.NAMES)
    assert all(rate > 0 for rate in found.values())
    assert bound == ("input" if found["loader"] < found["device"] else "device")
    done = command("benchmark", *words, f"data.root={shapes}", "model=torchvision", "augment=strong")
    assert done.returncode == 0, done.stderr
    for line in ("decoding alone", "the loader alone", "the device alone, on one batch", "the whole training"):
        assert re.search(rf"{line} +│ +[0-9,]+ │", done.stdout)
    assert "-bound: " in done.stdout
    assert not (ROOT / "checkpoints").exists()


def test_mistakes(shapes: Path) -> None:
    for overrides, message in (
        (["format=xml"], "`format=xml` must be table or json"),
        (["seconds=0"], "`seconds=0` must be above 0"),
        (["data.batch_size=5000"], "`data.batch_size=5000` is larger than the"),
    ):
        done = command("benchmark", *WORDS, f"data.root={shapes}", *overrides)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False)
        assert message in done.stderr


def test_all_broken(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(8):
                (tmp_path / split / label / f"{i}.jpg").write_bytes(b"none")
    done = command("benchmark", *WORDS, f"data.root={tmp_path}")
    assert done.returncode == 2
    assert "All images of the first batch are broken, so nothing can be measured" in done.stderr


def test_the_verdict(shapes: Path) -> None:
    data = ImageFolders(str(shapes), 8, 0, SampleTransform(32), SampleTransform(32), num_workers=99).read()
    found = {"loader": 100.0, "device": 400.0, "end_to_end": 100.0}
    assert benchmark.verdict(found, "input", data, "cuda").startswith(
        "Input-bound: the device waited for data 75% of the time. Try prepared data"
    )
    found = {"loader": 600.0, "device": 400.0, "end_to_end": 240.0}
    assert benchmark.verdict(found, "device", data, "cuda") == "Device-bound: the loader alone is 1.5 times as fast."
    assert benchmark.verdict(found, "device", data, "cpu").endswith("the training reaches 60% of the device alone.")


@pytest.mark.parametrize(
    "words",
    [
        ["benchmarks/input.py", "FOLDER", "--rounds", "1", "--seconds", "0.1", "--batch", "8", "--warm", "1"],
        ["benchmarks/threads.py", "--seconds", "0.1", "--threads", "1", "2"],
        ["benchmarks/index.py", "--classes", "3", "--files", "60", "--rounds", "1"],
        ["benchmarks/growth.py", "--images", "16000"],
        ["benchmarks/resume.py"],
        ["benchmarks/loop.py", "--rounds", "1", "--only", "tiny"],
    ],
    ids=lambda words: words[0],
)
def test_the_benchmarks_run(words: list[str], shapes: Path) -> None:
    words = [str(shapes) if word == "FOLDER" else word for word in words]
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
        env=clean_env({"PYTHONPATH": os.environ.get("PYTHONPATH", "")}),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if words[0] == "benchmarks/loop.py":
        assert re.search(r"^tiny +bare [\d.]+ ms, Lightning [\d.]+ ms: [-\d.]+ ms/step", done.stdout, re.MULTILINE)
    if words[0] == "benchmarks/resume.py":
        assert done.stdout.count("10 of 10 are equal") == 3, done.stdout
    if words[0] == "benchmarks/growth.py":
        assert re.search(r"^ours +\[[\d.]+\] after 50 batches, \[[\d.]+\] at the end", done.stdout, re.MULTILINE)
    if words[0] == "benchmarks/input.py":
        for name in ("torchvision_reference", "decode_only", "ours", "memory_copy", "prepared_raw", "prepared_whole"):
            assert re.search(rf"^{name} +\d+ images/s", done.stdout, re.MULTILINE)
