"""examples/ray_tune.py on a real Ray of this machine."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, clean_env, summary_of

pytest.importorskip("ray", reason="needs the extra `ray`")

# the example with fewer trials, which write to another folder
START = """
from pathlib import Path
import sys
file, folder = "examples/ray_tune.py", sys.argv.pop(1)
code = Path(file).read_text()
for old, new in (('"val/acc1", 12', '"val/acc1", 4'), ('ROOT / "logs', 'Path("%s") / "logs' % folder)):
    assert old in code
    code = code.replace(old, new)
exec(compile(code, file, "exec"), {"__name__": "__main__", "__file__": str(Path(file).resolve())})
"""


def test_asha_over_train_py_stops_worse_trials(shapes: Path, tmp_path: Path) -> None:
    words = [*TINY, "data=folder", f"data.root={shapes}", "data.batch_size=8", "trainer.max_epochs=6"]
    done = subprocess.run(
        [sys.executable, "-c", START, str(tmp_path), *words, "trainer.limit_train_batches=2"],
        cwd=ROOT, env=clean_env({"OMP_NUM_THREADS": "1"}), capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "logs/train/multiruns").iterdir()
    ends = [summary_of(run_dir)["status"] for run_dir in folder.iterdir()]
    assert len(ends) == 4
    assert set(ends) <= {"finished", "preempted"}
    assert "finished" in ends
    assert all((run_dir / "checkpoints/last.ckpt").exists() for run_dir in folder.iterdir())
    assert f"alexlab compare runs={folder}" in done.stdout
    assert "best: val/acc1 " in done.stdout
