"""Make names fit to print: a folder's name may be no text, control a terminal, or be very long."""

import re

JOINERS = "\u00a0\u200c\u200d\u3000"  # not "printable" to Python, but parts of words: spaces and joiners of letters


def is_text(name: str) -> bool:
    """Check that a file's name can be encoded: libraries that are not written in Python cannot open any other."""
    return not re.search("[\ud800-\udfff]", name)


def printable(text: str, keep: str = "") -> str:
    r"""Escape bytes in no encoding (\xe9), and what breaks a line or moves a terminal's cursor (\n), except `keep`."""
    return text if text.isprintable() else "".join(c if c in keep else _escaped(c) for c in text)


def _escaped(letter: str) -> str:
    if letter.isprintable() or letter in JOINERS:
        return letter
    byte = ord(letter) - 0xDC00  # Python stands such a byte in by U+DC00 + byte
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else letter.encode("unicode_escape").decode()


def shorten(text: str, most: int) -> str:
    """Cut the middle of a text that has more than `most` letters: often the end is what distinguishes it."""
    end = min(30, most // 2)
    return text if len(text) <= most else f"{text[: most - end - 1]}…{text[-end:]}"
