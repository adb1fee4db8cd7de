"""`alexlab benchmark` and the scripts in benchmarks/ run and print what they should. No time is checked."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, command

from alexlab.commands import benchmark
from alexlab.data.datamodule import ImageFolders
from alexlab.data.transforms import SampleTransform

WORDS = [*TINY, "data=folder", "data.batch_size=8", "data.num_workers=2", "seconds=0.2", "data.on_error=skip"]


def test_four_rates_and_the_limit_are_printed(shapes: Path, tmp_path: Path) -> None:
    words = [word for word in WORDS if not word.startswith("logger")]
    # a schedule that ends after the two steps of the run, which the benchmark exceeds
    ends = ["scheduler=constant", "~scheduler.name", "~scheduler.unit", "~scheduler.warmup", "trainer.max_steps=2"]
    ends += ["+scheduler._target_=torch.optim.lr_scheduler.OneCycleLR", "+scheduler.interval=step"]
    done = command("benchmark", *words, *ends, f"data.root={shapes}", "format=json")
    assert done.returncode == 0, done.stderr
    rates = json.loads(done.stdout)
    bound = rates.pop("bound_by")
    assert set(rates) == {"decode_only", "loader", "device", "end_to_end"}
    assert all(rate > 0 for rate in rates.values())
    assert bound == ("input" if rates["loader"] < rates["device"] else "device")
    done = command("benchmark", *words, f"data.root={shapes}", "model=torchvision", "augment=strong")
    assert done.returncode == 0, done.stderr
    for line in ("decoding alone", "the loader alone", "the device alone, on one batch", "the whole training"):
        assert re.search(rf"{line} +[0-9,]+ images/s", done.stdout)
    assert "-bound: " in done.stdout
    assert not (ROOT / "checkpoints").exists()


def test_wrong_settings_are_refused(shapes: Path) -> None:
    done = command("benchmark", *WORDS, f"data.root={shapes}", "data.batch_size=5000")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "`data.batch_size=5000` is larger than the" in done.stderr


def test_the_printed_sentence_names_the_limit_and_a_fix(shapes: Path) -> None:
    data = ImageFolders(str(shapes), 8, 0, SampleTransform(32), SampleTransform(32), num_workers=99).read()
    rates = {"loader": 100.0, "device": 400.0, "end_to_end": 100.0}
    assert benchmark.verdict(rates, "input", data, "cuda").startswith(
        "Input-bound: the device waited for data 75% of the time. Try prepared data"
    )
    rates = {"loader": 600.0, "device": 400.0, "end_to_end": 240.0}
    assert benchmark.verdict(rates, "device", data, "cuda") == "Device-bound: the loader alone is 1.5 times as fast."
    assert benchmark.verdict(rates, "device", data, "cpu").endswith("the training reaches 60% of the device alone.")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["threads.py", "--seconds=0.1", "--threads", "1", "2"], r"^  2 threads: +\d+ images/s"),
        (["index.py", "--classes=3", "--files=60", "--rounds=1"], r'"walk": [\d.]+'),
        (["metrics.py", "--updates=2", "--rounds=1"], r"(^\d+ classes: torchmetrics \d+ us, ours \d+ us, .*\n){2}"),
        (["ranks.py", "--ranks", "2", "--steps=3", "--megabytes=1"], r"^ +2( +[\d.]+){6}$"),
        (["resume.py", "--every=5"], r"(^ours, .* 2 of 2 are equal\n){3}"),
        (
            ["loop.py", "--rounds=1", "--steps=20", "--only=tiny"],
            r"^tiny +bare [\d.]+ ms, Lightning [\d.]+ ms: [-\d.]+ ms",
        ),
    ],
    ids=["threads.py", "index.py", "metrics.py", "ranks.py", "resume.py", "loop.py"],
)
def test_a_benchmark_runs(words: list[str], line: str) -> None:
    done = command(f"benchmarks/{words[0]}", *words[1:], env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert re.search(line, done.stdout, re.MULTILINE), done.stdout


CANDIDATES = ("torchvision_reference", "decode_only", "ours", "memory_copy", "prepared_raw", "prepared_whole")


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["growth.py", "--images=2560"], [r"ours +\[[\d., ]+\] after 5 batches, \[[\d., ]+\] at the end"]),
        (
            ["input.py", "FOLDER", "--rounds=1", "--seconds=0.1", "--batch=8", "--warm=1"],
            [rf"{name} +\d+ images/s" for name in CANDIDATES],
        ),
    ],
    ids=["growth.py", "input.py"],
)
def test_a_benchmark_that_starts_processes_runs(
    words: list[str], lines: list[str], shapes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The processes are forks, which have imported torch already."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    script = importlib.import_module(words[0].removesuffix(".py"))

    def run(words: list[str]) -> str:
        done = command(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    monkeypatch.setattr(script, "run", run)
    monkeypatch.setattr(sys, "argv", [str(shapes) if word == "FOLDER" else word for word in words])
    script.main()
    printed = capsys.readouterr().out
    for line in lines:
        assert re.search(rf"^{line}", printed, re.MULTILINE), printed
