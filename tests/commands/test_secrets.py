"""A secret in an environment variable: a bare ${oc.env:X} in `logger` or `callbacks` stays a reference."""

from pathlib import Path

import pytest
import yaml
from conftest import command, composed, summary_of, tiny_train
from wandb_server import wandb_server

REFERENCE = "${oc.env:CANARY}"
CANARY = "17:05:43:21"  # a text that Lightning's Timer takes as a duration
NOTES = f"logger.wandb.notes={REFERENCE}"
TIMER = f"+callbacks.timer={{_target_: pytorch_lightning.callbacks.Timer, duration: '{REFERENCE}'}}"
STOPPING = f"+callbacks.stop={{_target_: pytorch_lightning.callbacks.EarlyStopping, monitor: '{REFERENCE}'}}"


def files_with(canary: str, folder: Path) -> list[str]:
    """List the files that hold the canary. Checkpoints and W&B's files are not compressed."""
    return [str(path) for path in folder.rglob("*") if path.is_file() and canary.encode() in path.read_bytes()]


def test_a_secret_reaches_the_callback_and_no_file_and_no_server(shapes: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with wandb_server() as server:
        env = {**server.env(), "CANARY": CANARY}
        done = tiny_train(shapes, run_dir, "logger=wandb", NOTES, TIMER, env=env)
        assert done.returncode == 0, done.stderr  # Timer refuses the reference itself
        # without the callback the run counts as somebody else's
        resumed = command("train.py", f"resume={run_dir}", "trainer.max_epochs=2", TIMER, env=env)
        assert resumed.returncode == 0, resumed.stderr
        runs = [(run.fields, run.history, run.summary) for run in server.runs.values()]
        received = repr(runs) + repr(server.files) + repr(server.artifacts) + repr(server.unknown)
    assert summary_of(run_dir)["status"] == "finished"
    saved = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert saved["logger"]["wandb"]["notes"] == saved["callbacks"]["timer"]["duration"] == REFERENCE
    assert {NOTES, TIMER} < {*saved["overrides"]}
    assert REFERENCE in received
    assert CANARY not in received
    assert CANARY not in done.stdout + done.stderr + resumed.stdout + resumed.stderr
    assert str(run_dir / "checkpoints/last.ckpt") in files_with(REFERENCE, run_dir), "the search reads checkpoints"
    assert files_with(CANARY, tmp_path) == []

    refused = command("train.py", f"resume={run_dir}", "trainer.max_epochs=3", env={"CANARY": CANARY})
    assert refused.returncode == 2
    assert f"the run is your own, repeat the setting: '{TIMER}'.".replace(f"'{REFERENCE}'", REFERENCE) in refused.stderr
    missing = command("train.py", f"resume={run_dir}", "trainer.max_epochs=3", TIMER)
    assert missing.returncode == 2
    assert "needs the environment variable CANARY, which is not set: set it." in missing.stderr


@pytest.mark.parametrize("trainer", ["cpu", "ddp_cpu"])
def test_a_secret_in_an_error_is_hidden(trainer: str, shapes: Path, tmp_path: Path) -> None:
    """Lightning's EarlyStopping names the metric that does not exist, which is the secret here."""
    env = {"CANARY": "canary-of-a-metric"}
    done = tiny_train(shapes, tmp_path / "run", "logger=wandb", STOPPING, f"trainer={trainer}", env=env)
    assert done.returncode == 1, done.stderr
    assert "Traceback" in done.stderr
    assert REFERENCE in done.stderr
    assert env["CANARY"] not in done.stdout + done.stderr
    assert REFERENCE in (tmp_path / "run/train.log").read_text()
    error = summary_of(tmp_path / "run")["error"]
    assert f"RuntimeError: Early stopping conditioned on metric `{REFERENCE}` which is not available." in error
    written = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert {"config.yaml", "train.log", "summary.json"} <= written
    assert files_with(env["CANARY"], tmp_path) == []


def test_a_secret_in_a_users_mistake_is_hidden(shapes: Path, tmp_path: Path) -> None:
    done = tiny_train(shapes, tmp_path / "run", TIMER, env={"CANARY": "canary-of-no-duration"})
    assert done.returncode == 2
    assert "Timer cannot be built from its settings" in done.stderr
    assert REFERENCE in done.stderr
    assert "canary-of-no-duration" not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


def test_references_with_a_default_and_those_of_other_sections_are_resolved_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CANARY", "value")
    monkeypatch.delenv("NOT_SET", raising=False)
    plain = composed(
        "logger=wandb", "logger.wandb.project=${oc.env:NOT_SET,fallback}", "logger.wandb.entity=${oc.env:CANARY}",
        "logger.wandb.notes='see ${oc.env:CANARY}'", "data.name=${oc.env:CANARY}", f"+callbacks.x.y=[{REFERENCE}]",
    )  # fmt: skip
    wandb = plain["logger"]["wandb"]
    assert (wandb["project"], wandb["entity"], wandb["notes"]) == ("fallback", REFERENCE, "see value")
    assert plain["data"]["name"] == "value"
    assert plain["callbacks"]["x"]["y"] == [REFERENCE]


@pytest.mark.parametrize("word", ["data.name=${oc.env:NOT_SET}", TIMER.replace("CANARY", "NOT_SET")])
def test_a_variable_that_is_not_set_is_named(word: str, shapes: Path, tmp_path: Path) -> None:
    done = tiny_train(shapes, tmp_path / "run", word)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "NOT_SET" in done.stderr
    assert not (tmp_path / "run").exists()
