"""Readable names of classes: "n01440764" is a tench."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from alexlab.engine.errors import UserError

# ILSVRC-2012's synsets with torchvision's names, and Fashion-MNIST's
SHIPPED = {name: Path(__file__).with_name(f"{name}_classes.tsv") for name in ("imagenet", "fashion_mnist")}


def read(source: str) -> dict[str, str]:
    """Folder -> name, from "imagenet", "fashion_mnist" or a file with lines of a folder, a tab and a name.

    Raises:
        UserError: no such file, or a line of another form.
    """
    path = SHIPPED.get(source, Path(source).expanduser())
    if not path.is_file():
        raise UserError(f"data.class_names={source} is not a file: give one, or imagenet, or fashion_mnist, or null.")
    found: dict[str, str] = {}
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without the mark that some editors begin files with
    except UnicodeDecodeError:
        raise UserError(f"data.class_names={source} is not text in UTF-8: save it as that.") from None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        folder, tab, name = line.partition("\t")
        if not tab or not folder.strip() or not name.strip():
            raise UserError(f"{path}, line {number}: {line[:80]!r} must be a folder, a tab and its name.")
        found[folder.strip()] = name.strip()
    return found


def readable(folders: Sequence[str], source: str | None) -> list[str]:
    """The names for people of class folders, where `source` (see `read`) has them; of several the same, each with its
    folder."""
    known = read(source) if source is not None else {}
    if source is not None and not set(known) & set(folders):
        raise UserError(
            f"data.class_names={source} names none of the class folders ({', '.join(folders[:3])}, ...): give a file "
            "that does, or null."
        )
    told = [known.get(folder, folder) for folder in folders]
    times = Counter(told)
    return [name if times[name] == 1 else f"{name} ({folder})" for name, folder in zip(told, folders, strict=True)]
