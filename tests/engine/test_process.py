"""What a container or a daemon may lack."""

import subprocess
import sys

from conftest import ROOT, clean_env

LACKING = """
import os, sys
from alexlab.engine.process import complete_environment
os.path.expanduser = lambda path: path  # as without HOME and an entry in passwd
complete_environment()
print("caf\\udce9", os.open("FILE", os.O_CREAT | os.O_WRONLY) > 2, os.environ["HOME"])
sys.stderr.write("nowhere")
os.write(1, b"nowhere")
"""


def test_a_process_without_streams_and_home_gets_them(tmp_path) -> None:  # type: ignore[no-untyped-def]
    code = LACKING.replace("FILE", str(tmp_path / "file"))
    words = [sys.executable, "-c", code]
    closed = subprocess.run(
        ["sh", "-c", 'exec "$@" >&- 2>&- <&-', "sh", *words], cwd=ROOT, env=clean_env(), check=False
    )
    assert (closed.returncode, (tmp_path / "file").read_bytes()) == (0, b"")
    done = subprocess.run(words, cwd=ROOT, env=clean_env(), capture_output=True, text=True, check=True)
    assert done.stdout.replace("nowhere", "") == "caf\\udce9 True /\n"
