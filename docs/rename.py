"""Give the project a name of its own, and merge later commits of the template into the renamed project.

python docs/rename.py NAME              package, command, documents and tests; commit the result
python docs/rename.py --merge COMMIT    merge a commit of the template, such as template/main; then git commit

It needs git and Python alone, and a checkout without uncommitted changes.
"""

import importlib.util
import keyword
import re
import subprocess
import sys
import tempfile
from pathlib import Path

FORMER = re.compile(r"^FORMER_NAMES: tuple\[str, \.\.\.\] = \((.*)\)", re.M)  # in engine/config.py
# runs and changes of the past keep the name that they had
KEPT = ("tests/fixtures/", "CHANGELOG.md", "LICENSE")


def git(*words: str, folder: Path) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: git {' '.join(words[:2])}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def name_of(root: Path) -> str:
    """Return the name of the package in src/."""
    [config] = (root / "src").glob("*/engine/config.py")
    return config.parent.parent.name


def check_name(root: Path, name: str) -> None:
    """End with an error if this cannot be the name of the package."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        sys.exit(f"error: {name} is not a valid package name: use lowercase letters, digits and _, no word of Python.")
    if name == name_of(root):
        sys.exit(f"error: {name} is the name already.")
    if importlib.util.find_spec(name) is not None or list(root.glob(f"{name}*")):
        sys.exit(f"error: {name} is the name of another package or file: choose another one.")
    if found := subprocess.run(
        ["git", "grep", "-il", name, "--", "src", "conf", "tests", "*.py"], cwd=root, capture_output=True, text=True
    ).stdout:
        where = found.split()[0]
        sys.exit(f"error: {name} occurs in {where}, where a later rename would replace it too: choose another one.")


def rename(root: Path, name: str) -> None:
    """Rename package and command in all files that git tracks."""
    old = name_of(root)
    if name == old:
        return
    for line in git("ls-files", "-z", folder=root).split("\0"):
        path = root / line
        if not line or line.startswith(KEPT) or path.is_symlink() or not path.is_file():
            continue
        content = path.read_bytes()
        changed = content.replace(old.encode(), name.encode()).replace(old.upper().encode(), name.upper().encode())
        if changed != content and b"\0" not in content:
            path.write_bytes(changed)
    git("mv", f"src/{old}", f"src/{name}", folder=root)
    for line in git("ls-files", "-z", folder=root).split("\0"):
        if old in Path(line).name and not line.startswith(KEPT):
            git("mv", line, str(Path(line).with_name(Path(line).name.replace(old, name))), folder=root)
    config = root / f"src/{name}/engine/config.py"
    text = config.read_text()
    former = [part.strip().strip('"').replace(name, old) for part in FORMER.findall(text)[0].split(",") if part.strip()]
    names = "".join(f'"{each}", ' for each in dict.fromkeys([*former, old]) if each != name)
    config.write_text(FORMER.sub(f"FORMER_NAMES: tuple[str, ...] = ({names.strip() if names else ''})", text))
    git("add", "--all", folder=root)


def merge(root: Path, commit: str) -> None:
    """Merge what the template has changed since the last merge, under the name of this project."""
    name, base = name_of(root), git("merge-base", "HEAD", commit, folder=root).strip()
    commit_id, renamed = git("rev-parse", commit, folder=root).strip(), list[str]()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        git("clone", "--quiet", "--shared", "--no-checkout", str(root), str(copy), folder=root)
        for each in (base, commit_id):
            git("checkout", "--quiet", "--force", "--detach", each, folder=copy)
            rename(copy, name)
            tree = git("write-tree", folder=copy).strip()
            parents = [word for parent in renamed for word in ("-p", parent)]
            renamed.append(git("commit-tree", tree, *parents, "-m", f"{each} renamed", folder=copy).strip())
        git("branch", "renamed", renamed[-1], folder=copy)
        git("fetch", "--quiet", str(copy), "renamed", folder=root)
    words = ["git", "merge-recursive", renamed[0], "--", "HEAD", renamed[1]]
    done = subprocess.run(words, cwd=root, check=False)
    if done.returncode > 1 or (done.returncode == 1 and not git("ls-files", "--unmerged", folder=root)):
        sys.exit("error: nothing was merged, for the reason above: fix it, and run the command again.")
    head = root / git("rev-parse", "--git-path", "MERGE_HEAD", folder=root).strip()
    head.write_text(f"{commit_id}\n")
    print("Resolve the conflicts, and then: git commit" if done.returncode else "Look at it, and then: git commit")


def main() -> None:
    root = Path(git("rev-parse", "--show-toplevel", folder=Path.cwd()).strip())
    if git("status", "--porcelain", "--untracked-files=no", folder=root):
        sys.exit("error: there are uncommitted changes: commit them first.")
    match sys.argv[1:]:
        case ["--merge", commit]:
            merge(root, commit)
        case [name] if not name.startswith("-"):
            check_name(root, name)
            rename(root, name)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
