"""What a run tells of itself."""

from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, command, summary_of

from alexlab.commands import summary as report
from alexlab.data.datamodule import ImageFolders
from alexlab.data.transforms import SampleTransform


def data_of(shapes: Path, workers: int, policy: str = "none", **more: str) -> ImageFolders:
    plain, train = SampleTransform(32), SampleTransform(32, policy=policy)
    return ImageFolders(str(shapes), 8, 0, train, plain, num_workers=workers, **more).read()  # type: ignore[arg-type]


def test_what_bounds_a_training_is_told_with_what_helps(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alexlab.data.datamodule.cores", lambda: 8)
    few = data_of(shapes, 2)
    assert report.bound_by(0.1, few) == "bound by the device: it waited for images 10% of the time."
    assert report.bound_by(0.43, few) == (
        "bound by the input: the device waited for images 43% of the time; what would help: more threads "
        f"(data.num_workers=8, here 2), or images prepared once (python prepare.py data.root={shapes} out=PATH)."
    )
    told = report.bound_by(0.43, data_of(shapes, 8, "trivial"))
    assert "more threads" not in told
    assert told.endswith("out=PATH), or a lighter augment than its policy.")


def test_a_run_from_prepared_images_is_told_of_pixels(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helps = "; what would help: "
    for form, square, told, on_gpu in (
        ("jpeg", "false", f"{helps}images prepared as pixels (prepare.py with format=raw).", None),
        (
            "raw",
            "false",
            ".",
            f"{helps}pixels of one size, which the GPU crops (prepare.py with format=raw square=true).",
        ),
        ("raw", "true", ".", f"{helps}data.cache=device, if they fit."),
    ):
        out = tmp_path / f"{form}-{square}"
        words = [f"data.root={shapes}", f"out={out}", f"format={form}", f"square={square}", "short_side=40"]
        done = command("prepare", *words)
        assert done.returncode == 0, done.stderr
        if square == "false" and form == "raw":  # the shapes are squares by themselves
            arrays = dict(np.load(out / "train.npz"))
            arrays["widths"][0], arrays["heights"][0] = 20, 80  # the same number of pixels
            np.savez(out / "train.npz", **arrays)
        assert report.bound_by(0.5, data_of(out, 99)).endswith(f"50% of the time{told}")
        told = on_gpu or told
        assert report.bound_by(0.5, data_of(out, 99, device="cuda")).endswith(f"50% of the time{told}")


def test_a_run_ends_with_it(shapes: Path, tmp_path: Path) -> None:
    words = ["data=folder", f"data.root={shapes}", "data.batch_size=8", "trainer.max_epochs=1"]
    done = command("train.py", *TINY, *words, f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    wait = summary_of(tmp_path / "run")["data_wait"]
    assert 0 < wait < 1
    assert f"waited for images {wait:.0%} of the time" in done.stdout
