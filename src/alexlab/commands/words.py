"""The command line's words, before Hydra reads them. Light."""

import difflib
import re
from collections.abc import Callable
from pathlib import Path

from alexlab.engine.errors import UserError
from alexlab.engine.launcher import external

FLAGS = (
    "--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run", "--multirun", "--info",
    "--shell-completion", "--config-path", "--config-name", "--config-dir", "--experimental-rerun",
)  # fmt: skip
# what other programs call our keys
SYNONYMS = {
    "epochs": "trainer.max_epochs", "epoch": "trainer.max_epochs", "num_epochs": "trainer.max_epochs",
    "gpus": "trainer.devices", "num_gpus": "trainer.devices", "workers": "data.num_workers",
    "resume_from": "resume.run", "checkpoint": "ckpt_path", "bs": "data.batch_size", "wd": "optimizer.weight_decay",
    "amp": "trainer.precision",
    "img_size": "data.image_size", "input_size": "data.image_size", "arch": "model.name", "opt": "optimizer._target_",
    "batch_size": "data.batch_size", "lr": "optimizer.lr", "data_dir": "data.root", "data_path": "data.root",
}  # fmt: skip

NAMING = ("run", "runs", "from_run", "resume.run", "init_from")
# 26_20, 1e5 and 1.50 are names of theirs
NUMBER = r"(?i)(^\[?\s*|,\s*)(\d[\d_]*(?:\.\d*)?(?:e[-+]?\d+)?)(?=\s*(?:,|\]?$))"


def tidied(words: list[str], keys: Callable[[], list[str]]) -> list[str]:
    """The command line as Hydra wants it.

    Args:
        keys: all that the command has.

    Raises:
        UserError: it has another program's form.
    """
    for number, word in enumerate(words):
        if word.startswith("--") and word.partition("=")[0] not in FLAGS:
            raise UserError(
                f"{word}: settings are written key=value, as in {_meant(word, words[number + 1 :], keys())}"
            )
    # a shell expands ~ at a word's start alone, and Hydra takes it for a deletion
    words = [re.sub(r"^\+{0,2}resume=", "resume.run=", word) for word in words]
    words = [re.sub(r"([=,\[])~(?=/)", lambda m: m[1] + str(Path.home()), word) for word in words]
    words = [_quoted(word) for word in words]
    flags = {"-m", "--multirun"} & set(words)
    if flags and external():
        raise UserError("a sweep starts the ranks of each of its jobs itself: run it without torchrun or srun.")
    return ["-m", *(word for word in words if word not in flags)] if flags else words  # it must come first


def _meant(word: str, after: list[str], keys: list[str]) -> str:
    """--max-epochs 3, of other programs, as ours has it."""
    name, sign, value = word.lstrip("-").partition("=")
    name = name.replace("-", "_")
    if not sign and after and not after[0].startswith("-") and "=" not in after[0]:
        value = after[0]
    if name == "data":
        return f"data=folder data.root={value or 'PATH'}"
    leaves = {key.rpartition(".")[2]: key for key in reversed(keys)}
    near = difflib.get_close_matches(name, leaves, n=1, cutoff=0.7)
    key = name if name in keys else SYNONYMS.get(name) or leaves.get(name) or (leaves[near[0]] if near else None)
    return f"{key}={value or '...'}" if key else f"optimizer.lr=0.01 (and none is called {name})"


def _quoted(word: str) -> str:
    """where=lr>0.01, whose signs Hydra's grammar does not know, as a text of its; and runs that are called like
    numbers, which Hydra would write otherwise."""
    key, sign, text = word.partition("=")
    if key in NAMING:
        return key + sign + re.sub(NUMBER, r"\1'\2'", text)
    if key != "where" or text in ("", "null") or (text[0] in "'\"" and text[-1] == text[0]):
        return word
    text = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"where='{text}'"


def unfit(text: str, cause: BaseException | None) -> str | None:
    """The answer to a value of Hydra's own settings that is of another kind; None of another error.

    Args:
        text: Hydra's, which names the word.
        cause: OmegaConf's error, which names the kind.
    """
    word = re.match(r"Error merging override (.+)", text)
    kind = re.search(r"could not be converted to (\w+)", str(cause))
    if word is None or kind is None:
        return None
    kinds = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}
    return f"{word[1]}: must be {kinds.get(kind[1], kind[1])}."
