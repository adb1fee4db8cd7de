"""Names of folders are made fit to print."""

import os

import pytest

from alexlab.engine.text import is_text, printable, shorten


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("two words, ü, 犬, חתול, می\u200cخواهم".encode(), "two words, ü, 犬, חתול, می\u200cخواهم"),
        (b"caf\xe9", r"caf\xe9"),  # Latin-1, from a Windows zip
        (b"cat\nfish\t\x1b[2J\x7f", r"cat\nfish\t\x1b[2J\x7f"),
        ("a\u202eb\u2028".encode(), r"a\u202eb\u2028"),  # reverses the rest of a line; another end of a line
    ],
)
def test_what_is_no_text_is_escaped(raw: bytes, shown: str) -> None:
    text = os.fsdecode(raw)
    assert printable(text) == shown
    assert printable(shown) == shown
    assert is_text(text) == (raw != b"caf\xe9")
    assert printable("a\n\x1b", "\n") == "a\n\\x1b"


@pytest.mark.parametrize("most", [5, 64, 128])
def test_a_long_name_keeps_its_start_and_its_end(most: int) -> None:
    name = "start" + "x" * 200 + "end"
    short = shorten(name, most)
    assert (len(short), short[0], short[-1]) == (most, "s", "d")
    assert shorten(name[:most], most) == name[:most]
