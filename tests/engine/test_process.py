"""What a container or a daemon may lack."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT, clean_env

from alexlab.engine.errors import UserError, mistake
from alexlab.engine.process import read_env

LACKING = """
import logging, os, sys
from alexlab.engine.process import complete_environment
os.path.expanduser = lambda path: path  # as without HOME and an entry in passwd
complete_environment()
print("caf\\udce9", os.open("FILE", os.O_CREAT | os.O_WRONLY) > 2, os.environ["HOME"])
print(logging.getLogger("matplotlib").isEnabledFor(logging.WARNING))  # its note on a home that cannot be written
sys.stderr.write("nowhere")
os.write(1, b"nowhere")
"""


def test_a_process_without_streams_and_home_gets_them(tmp_path: Path) -> None:
    code = LACKING.replace("FILE", str(tmp_path / "file"))
    words = [sys.executable, "-c", code]
    closed = subprocess.run(
        ["sh", "-c", 'exec "$@" >&- 2>&- <&-', "sh", *words], cwd=ROOT, env=clean_env(), check=False
    )
    assert (closed.returncode, (tmp_path / "file").read_bytes()) == (0, b"")
    done = subprocess.run(words, cwd=ROOT, env=clean_env(), capture_output=True, text=True, check=True)
    assert done.stdout.replace("nowhere", "") == "caf\\udce9 True /\nFalse\n"


def test_a_dot_env_file_sets_what_is_not_set(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("# a comment\nFIRST='of the file'\nexport SECOND=of the file\n")
    code = "import os, pathlib; from alexlab.engine.process import read_env; read_env(pathlib.Path('{}'));"
    code = code.format(tmp_path / ".env") + "print(os.environ['FIRST'], os.environ['SECOND'], sep=', ')"
    env = {**clean_env(), "SECOND": "of the shell"}
    env.pop("PYTHON_DOTENV_DISABLED")  # the tests ignore the .env of this checkout
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "of the file, of the shell\n"
    (tmp_path / ".env").write_bytes(b"A=\xff")
    with pytest.raises(UserError, match=r"\.env cannot be read .*: write lines NAME=VALUE in UTF-8"):
        read_env(tmp_path / ".env")


def test_a_missing_home_or_temporary_folder_is_a_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/dev/null/x"])
    for broken, message in (
        (Path("~nobody-of-this-name/x").expanduser, "the home folder of that user is not known"),
        (tempfile.gettempdir, "set the environment variable TMPDIR"),
    ):
        with pytest.raises((RuntimeError, FileNotFoundError)) as raised:
            broken()
        assert message in str(mistake(raised.value))
