"""The code of a run: what is saved restores it, and changes since then are reported."""

import hashlib
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from alexlab.engine import provenance
from alexlab.models.alexnet import AlexNet

NOTHING = {"commit": None, "dirty": None, "patch_sha256": None, "left_out": None}


def git(root: Path, *words: str) -> str:
    named = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.check_output(["git", *named, *words], cwd=root, text=True).strip()


def commit(root: Path) -> str:
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message=x")
    return git(root, "rev-parse", "HEAD")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository with code, a document, and a pattern of ignored files."""
    root = tmp_path / "project"
    for name in ("train.py", "src/net.py", "conf/train.yaml", "README.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name}\n")
    (root / ".gitignore").write_text("*.pyc\n")
    git(root, "init", "--quiet")
    commit(root)
    return root


def change(root: Path) -> None:
    """Change a file, remove one, add three, of which one is staged and one is binary, and an ignored one."""
    (root / "src/net.py").write_text("# other\n")
    (root / "conf/train.yaml").unlink()
    (root / "src/new file.py").write_text("# new\n")
    (root / "src/bytes.bin").write_bytes(bytes(range(256)))
    (root / "conf/staged.yaml").write_text("a: 1\n")
    git(root, "add", "conf/staged.yaml")
    (root / "src/ignored.pyc").write_bytes(b"x")


def difference(then: dict, root: Path) -> str:
    return provenance.difference(then, "R", "git apply P", root) or "none"


def test_the_commit_and_the_patch_restore_the_code(project: Path, tmp_path: Path) -> None:
    head = git(project, "rev-parse", "HEAD")
    assert provenance.state(project) == ({**NOTHING, "commit": head, "dirty": False}, None)
    change(project)
    before = git(project, "status", "--porcelain")
    code, patch = provenance.state(project)
    assert patch is not None
    digest = hashlib.sha256(patch).hexdigest()
    assert code == {"commit": head, "dirty": True, "patch_sha256": digest, "left_out": None}
    assert git(project, "status", "--porcelain") == before, "the user's index is unchanged"
    other = tmp_path / "other"
    git(tmp_path, "clone", "--quiet", str(project), str(other))
    (tmp_path / "code.patch").write_bytes(patch)
    git(other, "apply", str(tmp_path / "code.patch"))
    for name in ("src/net.py", "src/new file.py", "src/bytes.bin", "conf/staged.yaml"):
        assert (other / name).read_bytes() == (project / name).read_bytes()
    assert not (other / "conf/train.yaml").exists()
    assert not (other / "src/ignored.pyc").exists()
    assert provenance.state(other)[0] == code
    assert difference(code, other) == "none"


def test_the_hash_of_the_same_changes_is_always_the_same(project: Path) -> None:
    """With other settings of git, and after the changes were committed with a change of a document."""
    change(project)
    code = provenance.state(project)[0]
    settings = (
        "diff.noprefix=true diff.context=9 diff.algorithm=histogram color.ui=always core.abbrev=4 diff.external=false"
    )
    for setting in settings.split():
        git(project, "config", *setting.split("="))
    assert provenance.state(project)[0] == code
    (project / "README.md").write_text("other\n")
    assert commit(project) != code["commit"]
    assert difference(code, project) == "none"


def test_changed_code_is_reported_with_the_way_back(project: Path) -> None:
    first = git(project, "rev-parse", "HEAD")
    clean = provenance.state(project)[0]
    change(project)
    dirty = provenance.state(project)[0]
    assert difference(clean, project) == (
        f"the code differs from that of R: commit {first}, now {first} with changes. "
        f"To restore the code: `git checkout {first}`."
    )
    commit(project)
    (project / "train.py").write_text("# again other\n")
    third = commit(project)
    assert difference(dirty, project) == (
        f"the code differs from that of R: commit {first} with changes, now {third}. "
        f"To restore the code: `git checkout {first}` and `git apply P`."
    )
    large = difference({**dirty, "left_out": "they are large"}, project)
    assert large.endswith(f"`git checkout {first}` (uncommitted changes were not saved: they are large).")
    assert "were not saved" in difference({"commit": third, "dirty": True}, project), "of an old summary"
    assert difference({"commit": third, "dirty": False}, project) == "none"
    assert f"of R (commit {'a' * 40}): git failed: " in difference({"commit": "a" * 40}, project), "of elsewhere"
    for unknown in ({}, {"commit": None}, {"commit": "; rm -rf x"}):
        assert difference(unknown, project) == "the code of R is not known."


def test_a_large_patch_is_not_saved(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "MAX_PATCH", 2000)
    (project / "src/net.py").write_text("# long\n" * 500)
    code, patch = provenance.state(project)
    assert patch is None
    assert code["dirty"]
    assert code["left_out"].startswith("the changes are ")
    assert code["left_out"].endswith(" bytes, and at most 2,000 are saved")
    (project / "src/net.py").write_text("# long\n" * 501)
    assert provenance.state(project)[0]["patch_sha256"] != code["patch_sha256"], "other changes have another hash"


def test_a_run_saves_its_code_once_and_reports_changes(project: Path, tmp_path: Path) -> None:
    (project / "src/net.py").write_text("# other\n")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    assert provenance.save(run_dir, project) is None
    code, patch = provenance.state(project)
    assert (run_dir / "code.patch").read_bytes() == patch
    assert json.loads((run_dir / "code.json").read_text()) == code == provenance.read(run_dir)
    assert provenance.commit_of(run_dir) == {"commit": code["commit"], "dirty": True}
    assert provenance.save(run_dir, project) is None, "resumed with the same code"
    (project / "src/net.py").write_text("# again other\n")
    assert "the code differs from that of" in (provenance.save(run_dir, project) or "")
    assert (run_dir / "code.patch").read_bytes() == patch, "of the start"


def test_without_a_repository_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.state(tmp_path) == (NOTHING, None)
    assert provenance.save(tmp_path, tmp_path) is None, "not worth a warning"
    assert "(commit aaaa" in difference({"commit": "a" * 40}, tmp_path)
    assert "not a git repository" in difference({"commit": "a" * 40}, tmp_path)


def test_git_that_is_missing_or_refuses_is_reported(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = git(project, "rev-parse", "HEAD")
    clean = provenance.state(project)[0]
    (project / "src/net.py").write_text("# other\n")
    blob = git(project, "rev-parse", f"{first}:src/net.py")
    (project / ".git/objects" / blob[:2] / blob[2:]).unlink()  # as in a clone without all blobs
    code = provenance.state(project)[0]
    assert code["commit"] == first
    assert code["left_out"].startswith("git failed: ")
    assert difference(clean, project).startswith(f"the code cannot be compared with that of R (commit {first}): git f")
    assert difference(code, project).startswith(f"the changes of R to commit {first} are not known (git failed: ")
    with monkeypatch.context() as patch:
        patch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "true")
        reason = provenance.state(project)[0]["left_out"]
        assert reason.startswith("git failed: fatal: detected dubious ownership in repository")
        assert "git config --global --add safe.directory" in reason
    monkeypatch.setenv("PATH", str(tmp_path))
    warning = provenance.save(tmp_path, project)
    assert warning is not None
    assert warning.startswith("the code of this run is not recorded: git did not run (")


# -- the source files of a network


def test_only_own_source_files_of_a_network_are_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "hashed_package"
    package.mkdir()
    (package / "__init__.py").write_text("from torch import nn\nclass Base(nn.Module): ...\n")
    (package / "block.py").write_text("from torch import nn\nclass Block(nn.Conv2d): ...\n")
    (package / "net.py").write_text(
        "from hashed_package import Base\nfrom hashed_package.block import Block\n"
        "class Net(Base):\n    def __init__(self):\n        super().__init__()\n        self.block = Block(3, 4, 1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    net = importlib.import_module("hashed_package.net").Net()
    hashes = provenance.source_hashes(net)
    files = {f"hashed_package/{name}.py" for name in ("__init__", "block", "net")}
    assert hashes.keys() == files, "base classes and parts, no file of torch"
    assert hashes["hashed_package/net.py"] == hashlib.sha256((package / "net.py").read_bytes()).hexdigest()
    assert provenance.changed_sources(hashes, net) == []
    (package / "block.py").write_text("# edited\n")
    assert provenance.changed_sources(hashes, net) == ["hashed_package/block.py"]
    assert provenance.changed_sources({**hashes, "gone.py": "x"}, net) == ["hashed_package/block.py", "gone.py"]
    for name in [name for name in sys.modules if name.startswith("hashed_package")]:
        monkeypatch.delitem(sys.modules, name)


def test_a_network_of_the_project_has_paths_in_the_project() -> None:
    assert {"src/alexlab/models/alexnet.py"} <= provenance.source_hashes(AlexNet(10)).keys()
    assert provenance.source_hashes(nn.Linear(1, 1)) == {}
    for none in (None, {}, "text"):
        assert provenance.changed_sources(none, nn.Linear(1, 1)) == []
