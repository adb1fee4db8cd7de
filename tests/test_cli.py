"""The commands' wrapper."""

import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def test_works_from_any_directory(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "train.py"), "--cfg", "job", "--resolve"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"root: {ROOT}/data/demo" in done.stdout
    assert list(tmp_path.iterdir()) == []
