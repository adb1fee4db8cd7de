"""Several options of one group: callbacks=[early_stopping,grad_norm]."""

import csv
from pathlib import Path

import pytest
import yaml
from conftest import command, composed, tiny_train

BOTH = "callbacks=[early_stopping,grad_norm]"


@pytest.mark.parametrize(
    ("words", "patience", "grad_norm", "choice"),
    [
        ([], None, False, "default"),
        (["callbacks=early_stopping"], 10, False, "early_stopping"),
        (["callbacks=[grad_norm]"], None, True, "grad_norm"),
        (["callbacks=[default,early_stopping,grad_norm]"], 10, True, ["default", "early_stopping", "grad_norm"]),
        ([BOTH, "callbacks.early_stopping=3"], 3, True, ["early_stopping", "grad_norm"]),
    ],
)
def test_each_option_adds_to_the_defaults(
    words: list[str], patience: int | None, grad_norm: bool, choice: str | list[str]
) -> None:
    plain = composed(*words, "callbacks.figures=false")  # a key of the defaults needs no +
    callbacks = plain["callbacks"]
    assert (callbacks["early_stopping"], callbacks["grad_norm"]) == (patience, grad_norm)
    assert (callbacks["progress"], callbacks["lr_monitor"], callbacks["figures"]) == ("auto", True, False)
    assert plain["choices"]["callbacks"] == choice
    assert plain["choices"]["logger"] == "wandb"


def test_an_option_that_extends_others_is_recorded_alone() -> None:
    choices = composed("logger=[csv,all]")["choices"]
    assert choices["logger"] == ["csv", "all"]


def test_a_run_with_several_options_is_trained_resumed_repeated_and_compared(shapes: Path, tmp_path: Path) -> None:
    """The list is in the yaml of an experiment outside of the repository."""
    conf, logs = tmp_path / "conf", tmp_path / "logs"
    (conf / "experiment").mkdir(parents=True)
    text = "# @package _global_\ndefaults: [override /callbacks: [early_stopping, grad_norm]]\n"
    (conf / "experiment/mine.yaml").write_text(text)
    first, second, third = (logs / f"train/runs/{name}" for name in ("first", "second", "third"))

    words = ["--config-dir", str(conf), "experiment=mine", "trainer.log_every_n_steps=1"]
    done = tiny_train(shapes, first, *words)
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load((first / "config.yaml").read_text())
    assert config["choices"]["callbacks"] == ["early_stopping", "grad_norm"]
    with (first / "metrics.csv").open() as file:
        assert [row["train/grad_norm"] for row in csv.DictReader(file) if float(row["train/grad_norm"] or 0) > 0]

    done = command("train.py", f"resume={first}", BOTH, "trainer.max_epochs=2")
    assert done.returncode == 0, done.stderr
    done = command("train.py", f"from_run={first}", BOTH, f"hydra.run.dir={second}", "callbacks.early_stopping=4")
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load((second / "config.yaml").read_text())
    assert config["choices"]["callbacks"] == ["early_stopping", "grad_norm"]
    assert (config["callbacks"]["early_stopping"], config["callbacks"]["grad_norm"]) == (4, True)

    done = tiny_train(shapes, third, "augment=[basic,none]")  # of another group, in which runs differ
    assert done.returncode == 0, done.stderr
    done = command("compare", f"runs={logs}/train", "format=json", "seeds=each")
    assert done.returncode == 0, done.stderr
    assert [word in done.stdout for word in ("first", "second", "third", "callbacks.early_stopping")] == [True] * 4


@pytest.mark.parametrize("words", ["callbacks=[default,early_stoping]", "callbacks=early_stoping"])
def test_an_option_that_does_not_exist_is_refused_with_the_nearest_one(words: str, tmp_path: Path) -> None:
    done = command("train.py", words, f"paths.logs={tmp_path}/logs")
    assert done.returncode == 2
    assert "`callbacks=early_stoping`: there is no such option. Did you mean `callbacks=early_stopping`?" in done.stderr
    assert not (tmp_path / "logs").exists()
