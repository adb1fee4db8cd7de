"""Readable names of classes: "n01440764" is a tench."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from alexlab.engine.errors import UserError
from alexlab.engine.text import printable

# the synsets of ILSVRC-2012 with torchvision's names, and the classes of Fashion-MNIST
SHIPPED = {name: Path(__file__).with_name(f"{name}_classes.tsv") for name in ("imagenet", "fashion_mnist")}


def read(source: str) -> dict[str, str]:
    """Read {folder: name} from "imagenet", "fashion_mnist" or a file of lines "folder, tab, name"."""
    path = SHIPPED.get(source, Path(source).expanduser())
    if not path.is_file():
        raise UserError(f"data.class_names={source} is not a file: give one, or imagenet, or fashion_mnist, or null.")
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError:
        raise UserError(f"data.class_names={source} is not UTF-8 text: save it in that encoding.") from None
    names: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        folder, _, name = map(str.strip, line.partition("\t"))
        if folder and name:
            names[folder] = name
        elif line.strip():
            raise UserError(f"{path}, line {number}: {line[:80]!r} must be a folder, a tab and a name.")
    return names


def readable(folders: Sequence[str], source: str | None) -> list[str]:
    """Return the readable names of class folders, printable. Folders with the same name have the folder added to it.

    Args:
        source: see `read`. Folders that the source does not name keep their own name; None keeps all.
    """
    known = read(source) if source is not None else {}
    if source is not None and not known.keys() & set(folders):
        raise UserError(
            f"data.class_names={source} names none of the class folders ({', '.join(folders[:3])}, ...): give a file "
            "that does, or null."
        )
    names = [printable(known.get(folder, folder)) for folder in folders]
    times = Counter(names)
    return [
        name if times[name] == 1 else f"{name} ({printable(folder)})"
        for name, folder in zip(names, folders, strict=True)
    ]
