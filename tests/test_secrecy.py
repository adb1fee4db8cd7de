"""Canaries: what must not be found in a run's directory, on W&B, or in what is printed."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import command, tiny_train
from omegaconf import OmegaConf
from wandb_server import KEY, WandbServer, wandb_server

from alexlab import config as configs
from alexlab import secrecy
from alexlab.errors import UserError

CANARIES = {
    "HF_TOKEN": "canary-of-the-environment-1",  # comes into the config
    "AWS_SECRET_ACCESS_KEY": "canary/of+an=error2",  # comes into an error's text
    "WANDB_API_KEY": KEY,
}
ON_THE_LINE = ("canary-on-the-line-3", "canary-in-an-address-4")


def bytes_below(folder: Path) -> Iterator[tuple[Path, bytes]]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield path, path.read_bytes()


def hits(folder: Path) -> list[str]:
    wanted = [*CANARIES.values(), *ON_THE_LINE]
    return [f"{path}: {c}" for path, raw in bytes_below(folder) for c in wanted if c.encode() in raw]


def sent_to(server: WandbServer) -> str:
    runs = [(run.fields, run.history, run.summary) for run in server.runs.values()]
    return repr(runs) + repr(server.files) + repr(server.artifacts) + repr(server.unknown)


def test_no_canary_is_kept_or_sent(shapes: Path, tmp_path: Path) -> None:
    words = [
        "logger=wandb", "logger.wandb.notes='see ${oc.env:HF_TOKEN}'", "logger.wandb.tags=['${oc.env:HF_TOKEN}']",
        "+trainer.default_root_dir=null", f"paths.logs={tmp_path / 'logs'}",
    ]  # fmt: skip
    words = [word for word in words if "default_root_dir" not in word]
    with wandb_server() as server:
        env = {**server.env(), **CANARIES}
        done = tiny_train(shapes, tmp_path / "run", *words, env=env)
        assert done.returncode == 0, done.stderr
        more = command("train.py", f"resume={tmp_path / 'run'}", "trainer.max_epochs=2", env=env)
        assert more.returncode == 0, more.stderr
        told = sent_to(server)
    assert "see ${oc.env:HF_TOKEN}" in told, "it was sent by its name"
    assert not [canary for canary in CANARIES.values() if canary in told]
    assert hits(tmp_path) == []
    assert not [
        canary for canary in CANARIES.values() if canary in done.stdout + done.stderr + more.stdout + more.stderr
    ]
    assert "see ${oc.env:HF_TOKEN}" in (tmp_path / "run/config.yaml").read_text()
    without = command("eval.py", f"run={tmp_path / 'run'}")
    assert without.returncode == 2
    assert (
        "config.yaml needs the environment variable HF_TOKEN, a secret that the run was given: set it" in without.stderr
    )
    assert command("eval.py", f"run={tmp_path / 'run'}", env={"HF_TOKEN": "anything"}).returncode == 0


def test_no_canary_in_what_a_failed_run_leaves(shapes: Path, tmp_path: Path) -> None:
    """Also in a job of a sweep, whose directory is made when it fails."""
    words = ["data.root='/no/${oc.env:AWS_SECRET_ACCESS_KEY}'", "data=folder", f"paths.logs={tmp_path / 'logs'}"]
    for more in ([], ["-m", "seed=1,2"]):
        done = command("train.py", *words, *more, env=CANARIES)
        assert done.returncode == 2
        assert "/no/${oc.env:AWS_SECRET_ACCESS_KEY} does not exist" in done.stderr
        assert CANARIES["AWS_SECRET_ACCESS_KEY"] not in done.stdout + done.stderr
    assert list((tmp_path / "logs").rglob("config.yaml"))
    assert hits(tmp_path) == []


@pytest.mark.parametrize(
    ("word", "key"),
    [
        (f"+model.net.api_key={ON_THE_LINE[0]}", "model.net.api_key"),
        (f"data.class_names=https://me:{ON_THE_LINE[1]}@host/names.tsv", "data.class_names"),
    ],
)
def test_secrets_on_the_command_line_are_refused(word: str, key: str, shapes: Path, tmp_path: Path) -> None:
    for more in ([], ["-m", "seed=1,2"]):
        logs = f"paths.logs={tmp_path / 'logs'}"
        done = command("train.py", "data=folder", f"data.root={shapes}", word, logs, *more)
        assert done.returncode == 2
        assert f"{key}: a secret on the command line is seen by all on this machine" in done.stderr
        assert f"give {key}='${{oc.env:ITS_NAME}}'." in done.stderr
        assert not [canary for canary in ON_THE_LINE if canary in done.stderr]
    assert hits(tmp_path) == []


def test_what_is_a_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DATA_KEY", str(tmp_path))  # a folder that is there
    monkeypatch.setenv("SHORT_TOKEN", "false")
    monkeypatch.setenv("PLAIN", "canary-of-no-secret")
    assert not {str(tmp_path), "false", "canary-of-no-secret"} & set(secrecy.known())
    nested = {
        "a": [f"x{CANARIES['HF_TOKEN']}y", 3],
        "overrides": ["b=" + ON_THE_LINE[0]],
        "b": {"token": ON_THE_LINE[0]},
    }
    assert secrecy.hidden(nested) == {"a": ["x${oc.env:HF_TOKEN}y", 3], "overrides": ["b=***"], "b": {"token": "***"}}
    harmless = {"class_token": True, "token": "avg", "tokens": "x" * 9, "url": "https://host/a:b@c", "key": "x" * 9}
    assert secrecy.mistakes(harmless) == []
    assert secrecy.mistakes({"api_key": CANARIES["HF_TOKEN"]}) == [], "from the environment"


def test_a_saved_config_finds_its_secrets_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARIES["HF_TOKEN"])
    configs.save(OmegaConf.create({"a": CANARIES["HF_TOKEN"]}), tmp_path / "config.yaml")
    assert (tmp_path / "config.yaml").read_text() == "a: ${oc.env:HF_TOKEN}\n"
    assert configs.load(tmp_path / "config.yaml").a == CANARIES["HF_TOKEN"]
    (tmp_path / "config.yaml").write_text("a: ${nothing}\n")
    with pytest.raises(
        UserError, match=re.escape(f"{tmp_path / 'config.yaml'}: Interpolation key 'nothing' not found")
    ):
        configs.load(tmp_path / "config.yaml")
