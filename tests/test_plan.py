"""What a run will do, worked out before it starts."""

from pathlib import Path

from conftest import tiny_train


def test_dry_run_says_what_would_run_and_stops(shapes: Path, tmp_path: Path) -> None:
    done = tiny_train(shapes, tmp_path / "dry", "dry_run=true", "trainer=ddp_cpu", "trainer.accumulate_grad_batches=2")
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    for part in (
        "8 (4 a device)",
        "2 x cpu",
        "learning rate",
        "0.005",
        "parameters",
        "checkpoint",
        "images an optimizer step",
    ):
        assert part in shown
    assert not (tmp_path / "dry").exists()
