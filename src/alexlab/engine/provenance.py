"""Record the code of a run: the commit, the uncommitted changes, and the source files of the network.

`code.json` in the run directory has the commit and the hash of the changes; `code.patch` has the changes themselves.
`git checkout COMMIT` and `git apply code.patch` restore the code.
"""

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from alexlab.engine import run_dir as rundir
from alexlab.engine.config import ROOT
from alexlab.engine.errors import is_library
from alexlab.engine.files import atomic_write

if TYPE_CHECKING:
    from torch import nn

# what is compared; a change of documents or tests is no change of the code
PARTS = (":(glob)*.py", "src", "conf", "pyproject.toml", "requirements.lock")
MAX_PATCH = 1_000_000  # bytes of a saved patch
GIT_TIMEOUT = 60  # seconds
COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
# These options override the user's settings of git, so that the same changes always have the same hash.
DIFF = (
    *("diff", "--binary", "--full-index", "--no-color", "--no-ext-diff", "--no-textconv", "--no-renames"),
    *("--no-indent-heuristic", "--diff-algorithm=myers", "--unified=3", "--inter-hunk-context=0", "--no-relative"),
    *("--src-prefix=a/", "--dst-prefix=b/", "--submodule=short", "--ignore-submodules=none"),
)


class GitError(Exception):
    """Git is missing or failed."""


def save(run_dir: Path, root: Path = ROOT) -> str | None:
    """Write code.json and code.patch of a new run; those of a resumed run stay as they are.

    Returns a warning if the code of a new run is not known, or if the code of a resumed run has changed, else None.
    """
    if (run_dir / "code.json").is_file():
        apply = shlex.join(["git", "apply", rundir.shown(run_dir / "code.patch")])
        return difference(read(run_dir), rundir.shown(run_dir), apply, root)
    code, patch = state(root)
    if patch:
        with atomic_write(run_dir / "code.patch") as file:
            file.write(patch)
    rundir.write_json(run_dir / "code.json", code)
    unknown = code["dirty"] is None and code["left_out"]
    return f"the code of this run is not recorded: {unknown}." if unknown else None


def read(run_dir: Path) -> dict[str, Any]:
    """Return what is known of a run's code: code.json, or the commit in the summary of an older run, or {}."""
    path, code = run_dir / "code.json", None
    with contextlib.suppress(OSError, ValueError, RecursionError):  # anybody may have written it
        code = json.loads(path.read_text()) if path.is_file() else rundir.read_summary(run_dir).get("git")
    return code if isinstance(code, dict) else {}


def commit_of(run_dir: Path) -> dict[str, Any]:
    """Return the commit of a run, and whether it had uncommitted changes; of the current code for a new run."""
    code = read(run_dir) or state()[0]
    return {key: code.get(key) for key in ("commit", "dirty")}


def state(root: Path = ROOT) -> tuple[dict[str, Any], bytes | None]:
    """Return the content of code.json for the current code, and the patch if it is small enough to be saved.

    `commit` is null without a repository; `dirty` and `patch_sha256` are null if git cannot tell; `left_out` is the
    reason if something is not known or not saved.
    """
    code: dict[str, Any] = {"commit": None, "dirty": None, "patch_sha256": None, "left_out": None}
    try:
        code["commit"] = _head(root)
        patch = _patch(root, code["commit"])
    except (GitError, OSError) as error:  # or there is no folder for temporary files
        return {**code, "left_out": None if "not a git repository" in str(error) else str(error)}, None
    code |= {"dirty": bool(patch), "patch_sha256": _sha256(patch)}
    if len(patch) > MAX_PATCH:
        code["left_out"] = f"the changes are {len(patch):,} bytes, and at most {MAX_PATCH:,} are saved"
    return code, None if code["left_out"] else patch or None


def difference(then: dict[str, Any], name: str, apply_command: str, root: Path = ROOT) -> str | None:
    """Describe how the current code differs from that of the run `name`, and how to restore it; None if it is the same.

    The code is compared, not the commit: new documents, or changes that were committed since, make no difference.
    `then` is the content of the run's code.json, and `apply_command` applies the run's patch.
    """
    commit, digest, reason = then.get("commit"), then.get("patch_sha256"), then.get("left_out")
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        return f"the code of {name} is not known{f': {reason}' if reason else ''}."
    if reason and not digest:
        return f"the changes of {name} to commit {commit} are not known ({reason}): the code cannot be compared."
    try:
        head = _head(root)
        here = f"{head}{' with changes' if _patch(root, head) else ''}"
        is_known = "patch_sha256" in then or not then.get("dirty")  # a summary of an older run has no hash
        if is_known and _sha256(_patch(root, commit)) == digest:
            return None
    except GitError as error:
        restore = how_to_restore(then, apply_command)
        return f"the code cannot be compared with that of {name} (commit {commit}): {error}. {restore}"
    was = f"commit {commit}{' with changes' if then.get('dirty') else ''}"
    return f"the code differs from that of {name}: {was}, now {here}. {how_to_restore(then, apply_command)}"


def how_to_restore(code: dict[str, Any], apply_command: str) -> str:
    """Return the sentence that says how to restore the code of a code.json, which anybody may have written."""
    commit = code.get("commit")
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        return "The commit of that code is not known."
    restore = f"To restore the code: `git checkout {commit}`"
    if code.get("patch_sha256") and not code.get("left_out"):
        return f"{restore} and `{apply_command}`."
    reason = f": {code['left_out']}" if code.get("left_out") else ""
    return f"{restore} (uncommitted changes were not saved{reason})." if code.get("dirty") else f"{restore}."


def _sha256(patch: bytes) -> str | None:
    return hashlib.sha256(patch).hexdigest() if patch else None


def _head(root: Path) -> str:
    return _git(root, "rev-parse", "--verify", "HEAD").decode().strip()


def _patch(root: Path, commit: str) -> bytes:
    """Return the patch from `commit` to the current code, with untracked files. The user's index is not changed."""
    index = root / os.fsdecode(_git(root, "rev-parse", "--git-path", "index").strip())
    with tempfile.TemporaryDirectory() as folder:
        copied = f"{folder}/index"
        with contextlib.suppress(FileNotFoundError):
            shutil.copy2(index, copied)
        listing = ("ls-files", "-z", "--others", "--exclude-standard", "--", *PARTS)
        if untracked := _git(root, *listing, GIT_INDEX_FILE=copied):
            add = ("add", "--intent-to-add", "--pathspec-from-file=-", "--pathspec-file-nul")
            _git(root, *add, stdin=untracked, GIT_INDEX_FILE=copied, GIT_LITERAL_PATHSPECS="1")
        return _git(root, *DIFF, commit, "--", *PARTS, GIT_INDEX_FILE=copied)


def _git(root: Path, *arguments: str, stdin: bytes = b"", **more_env: str) -> bytes:
    env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C", **more_env}
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, input=stdin, capture_output=True, timeout=GIT_TIMEOUT, check=False, env=env
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise GitError(f"git did not run ({error})") from error
    if done.returncode:
        reason = " ".join(done.stderr.decode(errors="replace").split())[:300]
        raise GitError(f"git failed: {reason or f'exit code {done.returncode}'}")
    return done.stdout


# -- the source files of a network


def source_hashes(net: "nn.Module") -> dict[str, str]:
    """Return path -> SHA-256 of the source files that define the classes of a network.

    Files of installed libraries are skipped. Paths are relative to the project, or start with the name of the package.
    """
    hashes = {}
    for name in {base.__module__ for module in net.modules() for base in type(module).__mro__}:
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is None or not file.endswith(".py") or is_library(file):
            continue
        path = Path(file).resolve()
        package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        key = path.relative_to(ROOT) if path.is_relative_to(ROOT) else PurePath(*package, path.name)
        with contextlib.suppress(OSError):  # a file that was removed after the import
            hashes[key.as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return dict(sorted(hashes.items()))


def changed_sources(then: Any, net: "nn.Module") -> list[str]:
    """Return the paths of `then`, as `source_hashes` returned it, whose files are missing or changed now.

    Returns [] for a checkpoint without hashes. Anybody may have written it, so unprintable paths are skipped.
    """
    now = source_hashes(net)
    hashes = then.items() if isinstance(then, dict) else ()
    return [path for path, digest in hashes if now.get(path) != digest and str(path).isprintable()]
