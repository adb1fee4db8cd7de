"""What a run prints and records about itself."""

from pathlib import Path

import pytest
from test_prepare import config_of

from alexlab.commands import summary as report
from alexlab.commands.prepare import prepare
from alexlab.data.datamodule import ImageFolders
from alexlab.data.transforms import SampleTransform


def data_of(shapes: Path, workers: int, policy: str = "none", **more: str | float) -> ImageFolders:
    plain, train = SampleTransform(32), SampleTransform(32, policy=policy)
    return ImageFolders(str(shapes), 8, 0, train, plain, num_workers=workers, **more).read()  # type: ignore[arg-type]


def test_a_training_is_input_bound_or_device_bound(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alexlab.data.datamodule.cores", lambda: 8)
    few = data_of(shapes, 2)
    assert report.bound_by(0.1, few) == "Device-bound: the device waited for data 10% of the time."
    assert report.bound_by(0.43, few) == (
        "Input-bound: the device waited for data 43% of the time. Try data.num_workers=8 (now 2), or prepared data "
        f"(alexlab prepare data.root={shapes} out=PATH)."
    )
    divided = data_of(shapes / "train", 8, val_fraction=0.25)
    assert "prepared data (alexlab prepare with the same keys of data, and out=PATH)" in report.bound_by(0.43, divided)
    line = report.bound_by(0.43, data_of(shapes, 8, "trivial"))
    assert "num_workers" not in line
    assert line.endswith("out=PATH), or augment.policy=none.")


def test_an_input_bound_run_from_prepared_jpegs_could_use_raw_pixels(shapes: Path, tmp_path: Path) -> None:
    prepare(config_of(shapes, tmp_path / "jpeg", format="jpeg", short_side=40))
    line = report.bound_by(0.5, data_of(tmp_path / "jpeg", 99))
    assert line.endswith("50% of the time. Try data prepared as pixels (alexlab prepare with format=raw).")
