"""The files of VS Code: what they start exists and runs. Only our own configurations are judged."""

import json
from pathlib import Path

from conftest import ROOT, command, config_of

FOLDER = ROOT / ".vscode"
TRAIN, DEBUG, TEST = "train", "train: two batches, in one process and one thread", "test: the open file"


def words_of(name: str) -> list[str]:
    """Return the words after `python` of what a configuration starts, with a short test as the open file."""
    configurations = json.loads((FOLDER / "launch.json").read_text())["configurations"]
    (found,) = (each for each in configurations if each["name"] == name)
    assert (found["type"], found["request"]) == ("debugpy", "launch")
    words = [*(("-m", found["module"]) if "module" in found else (found["program"],)), *found["args"]]
    places = (("${workspaceFolder}", ROOT), ("${file}", ROOT / "tests/engine/test_text.py"))
    for variable, place in places:
        words = [word.replace(variable, str(place)) for word in words]
    return words


def test_what_the_configurations_start_runs(shapes: Path) -> None:
    for name in (TRAIN, DEBUG):
        done = command(*words_of(name), "data=folder", f"data.root={shapes}", "dry_run=true")
        assert (done.returncode, done.stdout.splitlines()[0]) == (0, "dry run"), done.stderr
    done = command(*words_of(TEST))
    assert done.returncode == 0, done.stderr
    assert " passed" in done.stdout


def test_a_breakpoint_is_hit_wherever_it_is() -> None:
    config = config_of(*words_of(DEBUG)[1:])
    assert (config.trainer.devices, config.data.num_workers, config.compile) == (1, 0, False)
    assert config.trainer.limit_train_batches == 2


def test_the_settings_name_what_exists() -> None:
    settings = json.loads((FOLDER / "settings.json").read_text())
    (folder,) = (
        line.split(":=")[1].strip() for line in (ROOT / "Makefile").read_text().splitlines() if "VENV :=" in line
    )
    assert settings["python.defaultInterpreterPath"] == f"${{workspaceFolder}}/{folder}/bin/python"
    for word in settings["python.testing.pytestArgs"]:
        option, _, path = word.partition("=")
        assert option == "--ignore"
        assert (ROOT / path).is_dir()
    assert json.loads((FOLDER / "extensions.json").read_text())["recommendations"]
