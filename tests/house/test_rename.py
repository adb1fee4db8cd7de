"""A project with a name of its own: docs/rename.py, in copies of this checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, clean_env

NAME = "plank" + "ton"  # which must not occur in any file
pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a checkout of git")


def run(*words: str, folder: Path, code: int = 0, **more: str) -> str:
    who = {f"GIT_{kind}_{key}": "a@b" for kind in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
    env = clean_env(who | {"GIT_CONFIG_GLOBAL": os.devnull, "OMP_NUM_THREADS": "1"} | more)
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def commit(folder: Path, message: str) -> None:
    run("git", "add", "--all", folder=folder)
    run("git", "commit", "--quiet", "--message", message, folder=folder)


def rename(folder: Path, *words: str, code: int = 0) -> str:
    return run(sys.executable, "docs/rename.py", *words, folder=folder, code=code)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of this checkout, with changes that are not committed yet, in a repository of their own."""
    folder = tmp_path_factory.mktemp("rename") / "template"
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", folder=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    run("git", "init", "--quiet", "--initial-branch=main", folder=folder)
    commit(folder, "the template")
    return folder


@pytest.fixture(scope="module")
def fork(template: Path) -> Path:
    folder = template.with_name("fork")
    run("git", "clone", "--quiet", str(template), str(folder), folder=template)
    rename(folder, NAME)
    commit(folder, "our name")
    # what installing it would write
    run(sys.executable, "-c", "import setuptools; setuptools.setup()", "-q", "egg_info", folder=folder)
    return folder


def test_a_renamed_project_trains_passes_its_own_tests_and_reads_old_runs(fork: Path) -> None:
    found = run("git", "grep", "-Iil", "alexlab", folder=fork).split()
    of_old = {name for name in found if not name.startswith("tests/fixtures/")}
    assert f"src/{NAME}/engine/config.py" in of_old
    assert of_old <= {"CHANGELOG.md", "LICENSE", f"src/{NAME}/engine/config.py"}
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/house/test_architecture.py"]
    words += ["tests/commands/test_old_runs.py", "tests/commands/test_configs.py"]
    words += ["tests/house/test_readme.py::test_a_network_is_one_file_and_one_yaml"]
    printed = run(*words, folder=fork, PYTHONPATH=str(fork / "src"))
    assert " passed" in printed
    assert f"{NAME} COMMAND" in run(sys.executable, "-m", NAME, "--help", folder=fork, PYTHONPATH=str(fork / "src"))


def test_a_later_commit_of_the_template_is_merged_under_the_new_name(template: Path, fork: Path) -> None:
    ours, theirs = fork / f"src/{NAME}/models/alexnet.py", template / "src/alexlab/models/alexnet.py"
    ours.write_text(ours.read_text() + "\n\nOURS = 1\n")
    commit(fork, "a change of ours")
    theirs.write_text('"""Theirs."""\n' + theirs.read_text())
    (template / "src/alexlab/models/later.py").write_text("from alexlab.models import alexnet\n")
    commit(template, "a change of theirs")
    run("git", "fetch", "--quiet", "origin", folder=fork)
    assert "Look at it, and then: git commit" in rename(fork, "--merge", "origin/main")
    run("git", "commit", "--quiet", "--no-edit", "--message", "the template's", folder=fork)
    assert ours.read_text().startswith('"""Theirs."""\n')
    assert ours.read_text().endswith("\n\nOURS = 1\n")
    assert (fork / f"src/{NAME}/models/later.py").read_text() == f"from {NAME}.models import alexnet\n"
    assert not (fork / "src/alexlab").exists()
    assert len(run("git", "log", "-1", "--format=%P", folder=fork).split()) == 2

    # a merge that git refuses is none
    (template / "LATER.md").write_text("theirs")
    commit(template, "one more file")
    run("git", "fetch", "--quiet", "origin", folder=fork)
    (fork / "LATER.md").write_text("ours, and not committed")
    refused = rename(fork, "--merge", "origin/main", code=1)
    assert "error: nothing was merged, for the reason above" in refused
    assert not (fork / ".git/MERGE_HEAD").exists()
    (fork / "LATER.md").unlink()
    rename(fork, "--merge", "origin/main")
    run("git", "commit", "--quiet", "--no-edit", "--message", "the template's", folder=fork)
    assert (fork / "LATER.md").read_text() == "theirs"

    # the next one starts from there, and a conflict is git's
    for path, word in ((ours, "ours"), (theirs, "theirs")):
        path.write_text(path.read_text().replace('"""Theirs."""', f'"""{word}"""'))
    commit(fork, "ours")
    commit(template, "theirs")
    run("git", "fetch", "--quiet", "origin", folder=fork)
    assert "Resolve the conflicts, and then: git commit" in rename(fork, "--merge", "origin/main")
    assert '"""ours"""\n=======\n"""theirs"""\n>>>>>>>' in ours.read_text()


def test_what_is_no_name_is_refused(template: Path) -> None:
    for name, sentence in (
        (
            "My-Birds",
            "error: My-Birds is not a valid package name: use lowercase letters, digits and _, no word of Python.",
        ),
        ("class", "error: class is not a valid package name: use lowercase letters, digits and _, no word of Python."),
        ("alexlab", "error: alexlab is the name already."),
        ("torch", "error: torch is the name of another package or file: choose another one."),
        ("train", "error: train is the name of another package or file: choose another one."),
        ("pool", "where a later rename would replace it too: choose another one."),
    ):
        assert sentence in rename(template, name, code=1)
    (template / "README.md").write_text("changed")
    assert "error: there are uncommitted changes: commit them first." in rename(template, NAME, code=1)
    run("git", "checkout", "--quiet", "README.md", folder=template)
