"""A fork: a user's package and configs in a folder outside of the project, and the commands run with them."""

import contextlib
import os
import re
import shlex
import signal
from pathlib import Path
from subprocess import CompletedProcess

from conftest import ROOT, TINY, command, photo
from resuming import rows_of

BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
SMALL = [
    *TINY,
    "data.batch_size=8",
    "trainer.max_epochs=2",
    "trainer.limit_train_batches=3",
    "trainer.log_every_n_steps=1",
]


def blocks_of(document: Path) -> dict[str, list[tuple[str, str]]]:
    """Return the blocks of each section of a document: (language, text) by heading."""
    sections = re.split(r"^##+ (.*)$", document.read_text(), flags=re.MULTILINE)
    return {name: BLOCK.findall(text) for name, text in zip(sections[1::2], sections[2::2], strict=True)}


class Fork:
    """Files of a user's in `folder`, and the images of docs/extending.md's introduction."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        lines, tags = ["path,label,split,group"], ["path,label,split"]
        for number in range(48):
            label, split = ("cat", "dog", "fox")[number % 3], ("train", "train", "train", "val")[number // 3 % 4]
            path = f"{label}/{number}.jpg"
            photo(folder / "IMAGES" / path, seed=number)
            lines.append(f"{path},{label},{split},{number // 6}")
            tags.append(f"{path},{label}{' wild' if number % 2 else ''},{split}")
        (folder / "labels.csv").write_text("\n".join(lines) + "\n")
        (folder / "tags.csv").write_text("\n".join(tags) + "\n")
        (folder / "before.py").write_text(
            f"import os, sys\nsys.path.insert(1, {str(folder)!r})\nos.chdir({str(folder)!r})\n"
        )

    def write(self, blocks: list[tuple[str, str]]) -> list[list[str]]:
        """Write the files of a section's blocks; return its commands without `python`."""
        commands = []
        for kind, text in blocks:
            first, _, rest = text.partition("\n")
            if kind == "bash":
                commands += [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("python ")]
            elif match := re.fullmatch(r"# ([\w./]+\.(?:py|yaml))", first):
                path = self.folder / match[1]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(rest)
        return commands

    def run(self, *words: str, **more: object) -> CompletedProcess:
        script = str(ROOT / words[0]) if words[0].endswith(".py") else words[0]
        return command(script, *words[1:], before=self.folder / "before.py", **more)  # type: ignore[arg-type]

    def train(self, name: str, *words: str, **more: object) -> CompletedProcess:
        has_net = any(word.startswith("model=") for word in words)
        small = [word for word in SMALL if not (has_net and word.startswith("model"))]
        places = [f"hydra.run.dir={self.folder / name}", f"paths.logs={self.folder / 'logs'}"]
        return self.run("train.py", *small, *places, *words, **more)

    def circle(self, *words: str, package: str = "mypkg", exact: bool = True) -> None:
        """Train without and with a kill, resume, evaluate, export and compare, as a user does."""
        whole = self.train("whole", *words)
        assert whole.returncode == 0, whole.stderr
        killed, last = self.folder / "killed", self.folder / "killed/checkpoints/last.ckpt"

        def kill(pid: int) -> None:
            if last.is_file():
                with contextlib.suppress(ProcessLookupError):  # it was killed before
                    os.kill(pid, signal.SIGKILL)

        stopped = self.train("killed", *words, "checkpoint.every_n_steps=1", watch=kill)
        assert stopped.returncode == -signal.SIGKILL, stopped.stderr
        resumed = self.train("killed", *words, "checkpoint.every_n_steps=1", "resume=auto")
        assert resumed.returncode == 0, resumed.stderr
        if exact:
            assert rows_of(killed) == rows_of(self.folder / "whole")
        uses_own = f"{package}." in (killed / "config.yaml").read_text()
        assert (f"allow=[{package}]" in whole.stdout) == uses_own, "in the command that evaluates it"
        for verb, more in (("eval.py", []), ("export", ["format=torch_export"])):
            if uses_own and verb == "eval.py":  # export builds the network only
                refused = self.run(verb, f"run={killed}", *more)
                assert (refused.returncode, f"allow=[{package}]" in refused.stderr) == (2, True), refused.stderr
            done = self.run(verb, f"run={killed}", f"allow=[{package}]", *more)
            assert done.returncode == 0, done.stderr
        compared = self.run("compare", f"runs=[{killed},{self.folder / 'whole'}]")
        assert compared.returncode == 0, compared.stderr
        assert "killed" in compared.stdout


EXTENDING = ROOT / "docs/extending.md"
