"""A run's code: what is kept of it brings it back, and what is told of other code."""

import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from alexlab.engine import provenance as code_state
from alexlab.loggers import wandb_artifacts as artifacts


def git(root: Path, *words: str) -> str:
    named = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *named, *words], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository with code, texts, and a file that git is told to leave out."""
    root = tmp_path / "project"
    for name in ("train.py", "src/net.py", "conf/train.yaml", "README.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name}\n")
    (root / ".gitignore").write_text("*.pyc\n")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message=first")
    return root


def change(root: Path) -> None:
    """Of each kind: a file that is other, one that is gone, one that is new, and one of bytes."""
    (root / "src/net.py").write_text("# other\n")
    (root / "conf/train.yaml").unlink()
    (root / "src/new file.py").write_text("# new\n")
    (root / "src/bytes.bin").write_bytes(bytes(range(256)))
    (root / "src/left_out.pyc").write_bytes(b"x")


def test_the_commit_and_the_patch_bring_the_code_back(project: Path, tmp_path: Path) -> None:
    commit = git(project, "rev-parse", "HEAD")
    assert code_state.state(project) == (
        {"commit": commit, "dirty": False, "patch_sha256": None, "left_out": None},
        None,
    )
    change(project)
    before = git(project, "status", "--porcelain")
    told, patch = code_state.state(project)
    assert patch is not None
    assert told == {
        "commit": commit, "dirty": True, "patch_sha256": hashlib.sha256(patch).hexdigest(), "left_out": None
    }  # fmt: skip
    assert git(project, "status", "--porcelain") == before, "the user's index is as it was"
    other = tmp_path / "other"
    git(tmp_path, "clone", "--quiet", str(project), str(other))
    (tmp_path / "code.patch").write_bytes(patch)
    git(other, "apply", str(tmp_path / "code.patch"))
    for name in ("src/net.py", "src/new file.py", "src/bytes.bin"):
        assert (other / name).read_bytes() == (project / name).read_bytes()
    assert not (other / "conf/train.yaml").exists()
    assert not (other / "src/left_out.pyc").exists()
    assert code_state.state(other)[0] == told
    assert code_state.differs(told, "R", "git apply P", other) is None


def test_settings_of_git_make_no_other_hash(project: Path) -> None:
    change(project)
    told = code_state.state(project)[0]
    for key, value in (("diff.noprefix", "true"), ("diff.context", "9"), ("diff.algorithm", "histogram"),
                       ("color.ui", "always"), ("diff.external", "false"), ("core.abbrev", "4")):  # fmt: skip
        git(project, "config", key, value)
    assert code_state.state(project)[0] == told


def test_the_same_code_under_another_commit_is_the_same(project: Path) -> None:
    """Texts changed, or what was new was committed."""
    change(project)
    told = code_state.state(project)[0]
    (project / "README.md").write_text("other\n")
    git(project, "add", ".")
    git(project, "commit", "--quiet", "--message=second")
    assert code_state.state(project)[0]["commit"] != told["commit"]
    assert code_state.differs(told, "R", "git apply P", project) is None


def test_other_code_is_told_with_the_way_back(project: Path) -> None:
    first = git(project, "rev-parse", "HEAD")
    clean = code_state.state(project)[0]
    change(project)
    dirty = code_state.state(project)[0]
    assert code_state.differs(clean, "R", "git apply P", project) == (
        f"the code differs from that of R: there commit {first}, here {first} and changes. "
        f"Its own code: `git checkout {first}`."
    )
    git(project, "add", ".")
    git(project, "commit", "--quiet", "--message=second")
    (project / "train.py").write_text("# again other\n")
    git(project, "commit", "--quiet", "--all", "--message=third")
    third = git(project, "rev-parse", "HEAD")
    assert code_state.differs(dirty, "R", "git apply P", project) == (
        f"the code differs from that of R: there commit {first} and changes, here {third}. "
        f"Its own code: `git checkout {first}` and `git apply P`."
    )
    large = {**dirty, "left_out": "it is large"}
    told = code_state.differs(large, "R", "git apply P", project)
    assert told is not None
    assert told.endswith(f"`git checkout {first}` (what differed from it was not kept: it is large).")
    of_summary = {"commit": third, "dirty": True}  # of an older version
    assert "was not kept" in (code_state.differs(of_summary, "R", "git apply P", project) or "")
    assert code_state.differs({"commit": third, "dirty": False}, "R", "git apply P", project) is None
    for nothing in ({}, {"commit": None}, {"commit": "; rm -rf x"}):
        assert "is not known" in (code_state.differs(nothing, "R", "git apply P", project) or "")


def test_large_changes_are_left_out_and_told(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_state, "MOST", 2000)
    (project / "src/net.py").write_text("# long\n" * 500)
    told, patch = code_state.state(project)
    assert patch is None
    assert told["left_out"].startswith("it has ")
    assert told["left_out"].endswith(" bytes, and 2,000 are the most")
    one = told["patch_sha256"]
    (project / "src/net.py").write_text("# long\n" * 501)
    assert code_state.state(project)[0]["patch_sha256"] != one, "it is known whether it is the same"
    (project / "src/weights.bin").write_bytes(b"x" * 3000)
    assert code_state.state(project)[0]["left_out"] == "src/weights.bin is larger than 2,000 bytes"


def test_there_may_be_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    nothing = {"commit": None, "dirty": None, "patch_sha256": None, "left_out": None}
    assert code_state.state(tmp_path) == (nothing, None)
    told = code_state.differs({"commit": "a" * 40}, "R", "git apply P", tmp_path)
    assert told is not None
    assert "this is no git repository (there aaaa" in told
    monkeypatch.setenv("PATH", str(tmp_path))  # without git
    assert code_state.state(tmp_path) == ({**nothing, "left_out": "git could not be asked"}, None)


def lose(root: Path, commit: str, path: str) -> None:
    """A file of a commit, as in a clone without all blobs whose server is not there."""
    blob = git(root, "rev-parse", f"{commit}:{path}")
    (root / ".git/objects" / blob[:2] / blob[2:]).unlink()


def test_code_that_git_cannot_compare_is_not_the_same(project: Path) -> None:
    first = git(project, "rev-parse", "HEAD")
    clean = code_state.state(project)[0]
    (project / "src/net.py").write_text("# other\n")
    lose(project, first, "src/net.py")
    told = code_state.state(project)[0]
    assert told == {"commit": first, "dirty": None, "patch_sha256": None, "left_out": "git could not tell it"}
    assert code_state.differs(clean, "R", "git apply P", project) == (
        f"whether this is the code of R cannot be told: how it differs from commit {first} is not known (git could not "
        "tell it)."
    )
    git(project, "commit", "--quiet", "--all", "--message=second")
    assert "cannot be told" in (code_state.differs(clean, "R", "git apply P", project) or "")
    now = code_state.state(project)[0]
    assert code_state.differs(now, "R", "git apply P", project) is None
    for then in (told, {**told, "dirty": False}):  # the latter of an older version
        assert code_state.differs(then, "R", "git apply P", project) == (
            f"whether this is the code of R cannot be told: what differed there from commit {first} is not known (git "
            "could not tell it)."
        )


def test_a_repository_of_another_owner_is_one(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Git's own reason is told."""
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "true")
    told = code_state.state(project)[0]
    why = f"git says: detected dubious ownership in repository at '{project}'"
    assert told["left_out"].startswith(why)
    assert {**told, "left_out": None} == dict.fromkeys(("commit", "dirty", "patch_sha256", "left_out"))
    said = code_state.differs({"commit": "a" * 40}, "R", "git apply P", project)
    assert said is not None
    assert said.startswith(f"whether this is the code of R cannot be told: {why}; `git config --global --add safe.dir")
    assert said.endswith(f"helps (there {'a' * 40}).")
    assert f"R was trained with is not known: {why}" in (code_state.differs(told, "R", "git apply P", project) or "")


def test_a_run_without_code_json_may_have_been_in_a_repository(project: Path) -> None:
    nothing = code_state.differs({}, "R", "git apply P", project)
    assert nothing == "which code R was trained with is not known."
    outside = {"commit": None, "dirty": None, "patch_sha256": None, "left_out": None}
    assert code_state.differs(outside, "R", "git apply P", project) == (
        "which code R was trained with is not known: it was no git repository."
    )


def test_a_runs_summary_tells_of_code_what_its_code_json_does(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new text in the repository is no other code."""
    monkeypatch.setattr(code_state.state, "__defaults__", (project,))
    (project / "notes.txt").write_text("x")
    commit = git(project, "rev-parse", "HEAD")
    assert code_state.committed(tmp_path) == {"commit": commit, "dirty": False}
    code_state.keep(tmp_path)
    (project / "src/net.py").write_text("# other\n")
    assert code_state.committed(tmp_path) == {"commit": commit, "dirty": False}, "of its start"


def test_a_runs_directory_has_it_without_secrets(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "hunter2hunter2")
    (project / "src/net.py").write_text('TOKEN = "hunter2hunter2"\n')
    monkeypatch.setattr(code_state.state, "__defaults__", (project,))
    monkeypatch.setattr(code_state.differs, "__defaults__", (project,))
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    assert code_state.keep(run_dir) is None
    kept = (run_dir / "code.patch").read_text()
    assert "hunter2" not in kept
    assert '+TOKEN = "${oc.env:MY_TOKEN}"' in kept
    assert json.loads((run_dir / "code.json").read_text()) == code_state.state()[0] == code_state.read(run_dir)
    assert code_state.keep(run_dir) is None, "it goes on with the same code"
    (project / "src/net.py").write_text("# other\n")
    assert "the code differs from that of" in (code_state.keep(run_dir) or "")
    assert (run_dir / "code.patch").read_text() == kept, "that of its start"


def test_code_that_could_not_be_told_is_no_version_of_the_clean_one() -> None:
    commit, digest = "c" * 40, "d" * 64
    clean = {"commit": commit, "dirty": False, "patch_sha256": None, "left_out": None}
    other = {"commit": commit, "dirty": True, "patch_sha256": digest, "left_out": "it has 2,000,000 bytes"}
    untold = {"commit": commit, "dirty": None, "patch_sha256": None, "left_out": "git could not tell it"}
    assert artifacts.alias(clean) == "c" * 12
    assert artifacts.alias(other) == f"{'c' * 12}-{'d' * 12}"
    assert artifacts.alias(untold) == f"{'c' * 12}-unknown"
