"""Overrides of a command line, and nested dicts by dotted keys."""

import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

from alexlab.engine import overrides
from alexlab.engine.errors import UserError


def test_an_override_is_read_as_hydra_reads_it() -> None:
    texts = ["optimizer.lr=1e-3", "optimizer.betas=[0.9,${a.b}]", "++my.note='x y'", "~ema.decay", "model=alexnet_bn"]
    lr, betas, fresh, gone, option, several = overrides.parse([*texts, "trainer={max_epochs:2,devices:[0,1]}"])
    assert (lr.key, lr.value, lr.leaves) == ("optimizer.lr", 0.001, {"optimizer.lr": 0.001})
    assert betas.value == [0.9, "${a.b}"]
    assert (fresh.key, fresh.value, fresh.adds, fresh.deletes) == ("my.note", "x y", True, False)
    assert (gone.key, gone.deletes, gone.adds) == ("ema.decay", True, False)
    assert (option.chooses, option.value, lr.chooses) == (True, "alexnet_bn", False)
    assert several.leaves == {"trainer.max_epochs": 2, "trainer.devices": [0, 1]}
    assert not several.chooses, "a mapping sets keys of the group"


def test_an_override_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(UserError, match=r"optimizer.lr=\[1: cannot be read as key=value \(no viable alternative"):
        overrides.parse(["optimizer.lr=[1"])


def test_the_last_override_of_a_key_counts() -> None:
    assert overrides.by_key(["+a.b=1", "c=2", "a.b=3"]) == {"a.b": "a.b=3", "c": "c=2"}


def test_keys_of_nested_dicts_are_read_set_and_removed() -> None:
    node = {"a": {"b": None}, "c": 1}
    assert (overrides.get(node, "a.b"), overrides.has(node, "a.b"), overrides.has(node, "a.x")) == (None, True, False)
    assert overrides.get(node, "c.d.e") is None
    overrides.put(node, "a.x.y", 2)
    overrides.put(node, "c.d", 3)
    overrides.remove(node, "a.b")
    overrides.remove(node, "no.such.key")
    overrides.remove(node, "c.e")
    assert node == {"a": {"x": {"y": 2}}, "c": {"d": 3}}


@pytest.mark.parametrize(("value", "text"), [(True, "true"), (None, "null"), (0.5, "0.5"), ("x", "x"), ([1], "[1]")])
def test_values_are_shown_as_yaml_has_them(value: object, text: str) -> None:
    assert overrides.shown(value) == text


@pytest.mark.parametrize(
    "name", ["my run [1]", "a=b, (c)", "it's #1", "$HOME `x` \\", "ü 图", '"q"', "a;b&|d", "~", "*"]
)
def test_a_printed_command_can_be_pasted_into_a_shell(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    printed = overrides.command_line("eval", f"run={name}", "ckpt=last")
    assert shlex.split(printed) == ["python", "eval.py", f"run={name}", "ckpt=last"]
    read = subprocess.run(["sh", "-c", f"printf '%s|' {printed}"], capture_output=True, text=True, check=True).stdout
    assert read == f"python|eval.py|run={name}|ckpt=last|"


def test_a_printed_command_works_where_the_user_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()  # of another project
    assert overrides.command_line("train", "resume=x") == "alexlab train resume=x"
    assert overrides.command_line("compare") == "alexlab compare"


@pytest.mark.parametrize("text", ["a'b", "a\\", "a\\'", "\\\\'\\", "a,b [c] {d} (e) = #", "'", ""])
def test_a_text_in_quotes_is_read_as_it_is(text: str) -> None:
    (each,) = overrides.parse([f"key={overrides.in_quotes(text)}"])
    assert each.value == text
