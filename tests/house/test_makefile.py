"""`make setup TORCH=...`: which build of torch is installed. Nothing is installed here."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

LOCK = (ROOT / "requirements.lock").read_text()
VERSIONS = [f"{name}=={version}" for name, version in re.findall(r"^(torch|torchvision)==(\S+)", LOCK, re.MULTILINE)]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    return tmp_path


def installs(project: Path, *words: str) -> list[list[str]]:
    """The options of each `uv pip install` that `make` would run."""
    done = subprocess.run(["make", "-n", *words], cwd=project, capture_output=True, text=True, check=True)
    return [line.split("uv pip install ")[1].split() for line in done.stdout.splitlines() if "uv pip install" in line]


def test_by_default_all_wheels_are_those_of_the_lock(project: Path) -> None:
    first, own = installs(project, "setup")
    assert {"--require-hashes", "requirements.lock"} <= {*first}
    assert not any("torch" in word for word in (*first, *own))


@pytest.mark.parametrize("build", ["cpu", "cu126", "rocm7.2"])
def test_another_build_has_the_locks_versions_and_all_else_its_hashes(build: str, project: Path) -> None:
    rest, torch, own = installs(project, "setup", f"TORCH={build}")
    assert {"--require-hashes", "--no-deps", ".venv/without-torch.lock"} <= {*rest}
    assert f"--torch-backend={build}" in torch
    assert torch[-2:] == VERSIONS
    assert "--no-deps" in own

    done = subprocess.run(["make", "-n", "setup", f"TORCH={build}"], cwd=project, capture_output=True, text=True)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("awk"))
    subprocess.run(line, shell=True, cwd=project, check=True)
    before, after = (
        re.findall(r"^([\w.-]+)==", text, re.MULTILINE)
        for text in (LOCK, (project / ".venv/without-torch.lock").read_text())
    )
    left_out = {name for name in before if name not in after}
    assert {"torch", "torchvision", "triton", "nvidia-cudnn-cu13"} <= left_out
    assert {name.split("-")[0] for name in left_out} == {"torch", "torchvision", "triton", "nvidia", "cuda"}
    assert "torchmetrics" in after
    hashes = LOCK.count("--hash"), (project / ".venv/without-torch.lock").read_text().count("--hash")
    assert hashes[0] > hashes[1] > len(after)


def test_a_later_make_keeps_the_build_and_another_one_replaces_it(project: Path) -> None:
    stamp = project / ".venv/.installed"
    stamp.write_text("cpu\n")
    assert installs(project, "setup") == installs(project, "test") == installs(project, "setup", "TORCH=cpu") == []
    reinstall = {"--reinstall-package", "torch", "torchvision"}
    assert reinstall <= {*installs(project, "setup", "TORCH=lock")[0]}, "2.15.0+cpu would pass for 2.15.0"
    assert {*reinstall, "--torch-backend=cu126"} <= {*installs(project, "setup", "TORCH=cu126")[1]}
    (project / "requirements.lock").touch()
    assert "--torch-backend=cpu" in installs(project, "setup")[1], "a new lock, the same build"
    stamp.write_text("")  # as older versions wrote it
    assert installs(project, "setup", "TORCH=lock") == []


def test_the_path_of_the_clone_may_have_spaces_and_any_letters(tmp_path: Path) -> None:
    folder = tmp_path / "my clone, ü 图 'it' $x"
    (folder / ".venv/bin").mkdir(parents=True)
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for name in ("python", "uv"):  # which record their calls
        tool = folder / ".venv/bin" / name
        tool.write_text(f'#!/bin/sh\necho "{name} $VIRTUAL_ENV $*" >> calls\n')
        tool.chmod(0o755)
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "ARGS"))}
    words = ["make", "train", "PYTHON=true"]  # without the variables of a `make test` that runs this
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    calls = (folder / "calls").read_text().splitlines()
    assert [call.split()[:2] for call in calls[:2]] == [["uv", ".venv"], ["uv", ".venv"]]
    assert calls[-1].endswith("train.py")
    assert "source .venv/bin/activate" in done.stdout
