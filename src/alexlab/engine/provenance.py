"""The code that a run was started with: its commit, and what differed from that. Light.

`code.json` in the run's directory has the commit and the hash of the differences, `code.patch` the differences:
`git checkout COMMIT` and `git apply code.patch` bring the code back.
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alexlab.engine import run_dir as rundir
from alexlab.engine import secrecy
from alexlab.engine.config import ROOT
from alexlab.engine.files import atomic_write

# what a run is made of: texts and tests may change beside it
PARTS = (":(glob)*.py", "src", "conf", "pyproject.toml", "requirements.lock")
NO_REPOSITORY = "this is no git repository"
MOST = 1_000_000  # bytes of a patch that is kept
# whatever the user's own settings of git say, so that the same differences have the same hash
DIFF = ("diff", "--binary", "--full-index", "--no-color", "--no-ext-diff", "--no-textconv", "--no-renames",
        "--no-indent-heuristic", "--diff-algorithm=myers", "--unified=3", "--inter-hunk-context=0", "--no-relative",
        "--src-prefix=a/", "--dst-prefix=b/", "--submodule=short", "--ignore-submodules=none")  # fmt: skip


def keep(run_dir: Path) -> str | None:
    """Write code.json and code.patch; of a run that goes on they stay those of its start.

    Returns:
        What to tell where a run goes on with other code.
    """
    if (run_dir / "code.json").is_file():
        return differs(read(run_dir), rundir.shown(run_dir), f"git apply {rundir.shown(run_dir / 'code.patch')}")
    told, patch = state()
    if patch:
        text = secrecy.masked(patch.decode(errors="surrogateescape")).encode(errors="surrogateescape")
        with atomic_write(run_dir / "code.patch") as file:
            file.write(text)
    rundir.write_json(run_dir / "code.json", told)
    return None


def read(run_dir: Path) -> dict[str, Any]:
    """What is known of a run's code: its code.json, or, of an older version, the commit of its summary."""
    path = run_dir / "code.json"
    if path.exists() or path.is_symlink():  # nothing, where it cannot be read
        with contextlib.suppress(OSError, ValueError, RecursionError):
            told = json.loads(path.read_text()) if path.is_file() and path.stat().st_size < 2**16 else None
            if isinstance(told, dict):
                return told
        return {}
    git = rundir.read_summary(run_dir).get("git")
    return git if isinstance(git, dict) else {}


def committed(run_dir: Path) -> dict[str, Any]:
    """The commit of a run's start, and whether its code differed from it, as its code.json says."""
    told = read(run_dir) or state()[0]
    return {key: told.get(key) for key in ("commit", "dirty")}


def state(root: Path = ROOT) -> tuple[dict[str, Any], bytes | None]:
    """The commit, whether code differs from it, the SHA-256 of how, and why that is not kept, if it is not; and the
    patch, of at most `MOST` bytes.

    The hash is of the patch before secrets are masked in it. All is null outside a git repository; `dirty` is where git
    does not tell what differs, and `commit` where it does not tell that, `left_out` having why.
    """
    commit, why = _commit(root)
    if commit is None:
        why = None if why == NO_REPOSITORY else why
        return {"commit": None, "dirty": None, "patch_sha256": None, "left_out": why}, None
    patch, digest, left_out = _patch(root, commit)
    dirty = None if digest is None and left_out else digest is not None
    return {"commit": commit, "dirty": dirty, "patch_sha256": digest, "left_out": left_out}, patch


def differs(then: dict[str, Any], name: str, applies: str, root: Path = ROOT) -> str | None:
    """In words where the code here is not that of `then`, and how to bring that back; None where it is the same.

    Another commit whose code is the same, as only texts differ or as the differences were committed, is the same.

    Args:
        name: of the run whose code it was.
        applies: the command that applies its patch.
    """
    commit, (here, why) = then.get("commit"), _commit(root)
    digest, kept, left_out = then.get("patch_sha256"), "patch_sha256" in then, then.get("left_out")
    if not isinstance(commit, str) or not _is_hash(commit):
        was = f": {left_out or 'it was no git repository'}" if kept and commit is None else ""
        return f"which code {name} was trained with is not known{was}."
    untold = f"whether this is the code of {name} cannot be told"
    if here is None:
        return f"{untold}: {why} (there {commit})."
    if left_out and digest is None:
        return f"{untold}: what differed there from commit {commit} is not known ({left_out})."
    known = _git(root, "cat-file", "-e", f"{commit}^{{commit}}") is not None
    if known and (kept or not then.get("dirty")):
        _, ours, why = _patch(root, commit)
        if ours is None and why:
            return f"{untold}: how it differs from commit {commit} is not known ({why})."
        if ours == digest:
            return None
    was = f"commit {commit}{' and changes' if then.get('dirty') else ''}"
    now = f"{here}{' and changes' if _patch(root, here)[1] else ''}"
    back = f"`git checkout {commit}`"
    if digest and not then.get("left_out"):
        back += f" and `{applies}`"
    elif then.get("dirty"):
        back += f" (what differed from it was not kept{f': {left_out}' if left_out else ''})"
    return f"the code differs from that of {name}: there {was}, here {now}. Its own code: {back}."


def _is_hash(commit: str) -> bool:
    return len(commit) in (40, 64) and set(commit) <= set("0123456789abcdef")


def _commit(root: Path) -> tuple[str | None, str | None]:
    """The commit, or None and why git does not tell it."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--verify", "HEAD"], cwd=root, stdin=subprocess.DEVNULL, capture_output=True,
            timeout=60, check=False, env={**os.environ, "LC_ALL": "C"}, text=True, errors="replace",
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None, "git could not be asked"
    if not done.returncode:
        return done.stdout.strip(), None
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["nothing"]
    if "not a git repository" in lines[0]:
        return None, NO_REPOSITORY
    helps = [f"; `{line}` helps" for line in lines if line.startswith("git config ")]  # of another owner's repository
    return None, f"git says: {lines[0].removeprefix('fatal: ')}{''.join(helps)}"


def _git(root: Path, *words: str, given: bytes | None = None, env: dict[str, str] | None = None) -> bytes | None:
    """What git prints; None where it fails, or is not there."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            ["git", *words], cwd=root, input=given, stdin=None if given is not None else subprocess.DEVNULL,
            capture_output=True, check=True, timeout=60, env={**os.environ, "GIT_OPTIONAL_LOCKS": "0", **(env or {})},
        )  # fmt: skip
        return done.stdout
    return None


def _patch(root: Path, commit: str) -> tuple[bytes | None, str | None, str | None]:
    """How the code differs from `commit`, files that git does not know yet included: the patch if it is kept, its
    SHA-256, and why it is not kept."""
    with _index_with_new(root) as (env, too_large):
        try:
            process = subprocess.Popen(
                ["git", *DIFF, commit, "--", *PARTS], cwd=root, env=env, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
        except OSError:
            return None, None, "git could not be asked"
        assert process.stdout is not None
        digest, size, head = hashlib.sha256(), 0, b""
        while chunk := process.stdout.read(1 << 16):
            digest.update(chunk)
            size += len(chunk)
            head = head + chunk if size <= MOST else b""
        if process.wait():
            return None, None, "git could not tell it"
    if not size and not too_large:
        return None, None, None
    for name in too_large:  # another one of these is another state, too
        digest.update(name.encode(errors="surrogateescape") + b"\0")
    if too_large:
        return None, digest.hexdigest(), f"{', '.join(too_large[:3])} is larger than {MOST:,} bytes"
    if size > MOST:
        return None, digest.hexdigest(), f"it has {size:,} bytes, and {MOST:,} are the most"
    return head, digest.hexdigest(), None


@contextlib.contextmanager
def _index_with_new(root: Path) -> Iterator[tuple[dict[str, str], list[str]]]:
    """An environment for git whose index knows of the new files, and those that are too large for it. The user's own
    index stays as it is."""
    env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    listed = _git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", *PARTS) or b""
    new = [os.fsdecode(name) for name in listed.split(b"\0") if name]
    too_large = sorted(name for name in new if _size(root / name) > MOST)
    new = [name for name in new if name not in too_large]
    index = _git(root, "rev-parse", "--git-path", "index")
    if not new or index is None:
        yield env, too_large
        return
    with tempfile.TemporaryDirectory() as folder:
        env["GIT_INDEX_FILE"] = str(Path(folder, "index"))
        with contextlib.suppress(FileNotFoundError):
            shutil.copy2(root / os.fsdecode(index.rstrip(b"\n")), env["GIT_INDEX_FILE"])
        _git(
            root, "add", "--intent-to-add", "--pathspec-from-file=-", "--pathspec-file-nul",
            given=b"\0".join(os.fsencode(name) for name in new),
            env={"GIT_INDEX_FILE": env["GIT_INDEX_FILE"], "GIT_LITERAL_PATHSPECS": "1"},
        )  # fmt: skip
        yield env, too_large


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0
