"""W&B: online with a small server on loopback, offline without one, and training that continues whatever happens."""

import csv
import json
import logging
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wandb
from conftest import TINY, command, summary_of, tiny_train
from wandb_server import WandbServer, wandb_server

from alexlab.engine.errors import UserError
from alexlab.engine.launcher import free_port
from alexlab.loggers.wandb_logger import WandbLogger, choose_mode, code_alias

ALL = bool(os.environ.get("ALEXLAB_FAULTS"))
DATASET = {"fingerprint": {"train": "f"}, "images": {"train": 3, "val": 2}, "num_classes": 2}


MakeLogger = Callable[..., WandbLogger]


@pytest.fixture
def make_logger(server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeLogger]:
    """Make loggers in this process, online; `env` are environment variables."""
    for key, value in server.env().items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    wandb.teardown()

    def make(folder: str, env: dict[str, str] | None = None, **settings: Any) -> WandbLogger:
        for key, value in (env or {}).items():
            monkeypatch.setenv(key, value)
        logger = WandbLogger(str(tmp_path / folder), **settings)
        logger.log_config({"run": folder})
        return logger

    yield make
    wandb.teardown()


def log_artifacts(logger: WandbLogger, folder: Path, root: str = "/a/cats") -> None:
    """Log images, code and a checkpoint, as a run does."""
    (folder / "code.json").write_text(json.dumps({"commit": "c" * 40, "patch_sha256": "d" * 64}))
    (folder / "code.patch").write_text("x")
    (folder / "best.ckpt").write_text("x")
    logger.log_dataset({"name": "folder", "root": root}, DATASET, ["a", "b"])
    logger.log_code(folder)
    logger.log_checkpoint(folder / "best.ckpt", {})


# -- a whole run


@pytest.fixture(scope="module")
def whole(server: WandbServer, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run with everything that is logged, and what it printed; the user's account has W&B upload the code."""
    run_dir = tmp_path_factory.mktemp("logs") / "whole"
    done = tiny_train(
        shapes, run_dir, "logger=wandb", "logger.wandb.log_model=true", "trainer.max_epochs=2", "seed=1",
        "trainer.log_every_n_steps=1", "callbacks.figures=true", env={**server.env(), "WANDB_SAVE_CODE": "true"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return run_dir, done.stdout


def test_a_run_logs_its_config_metrics_and_summary(whole: tuple[Path, str], server: WandbServer) -> None:
    run_dir, printed = whole
    run, summary = server.run_of("whole"), summary_of(run_dir)
    assert f"W&B: online (found an API key). {server.url}/tester/alexlab/runs/" in printed
    assert re.search(rf"look at it: +{server.url}/tester", printed)
    assert run.fields["displayName"] == "shufflenet_v2_x0_5-px64-shapes-bs8-ep2-limit_train_batches2-s1"
    group = r"shufflenet_v2_x0_5-shapes-bs8-px64-limit_train_batches2-ep2-[0-9a-f]{6}"
    assert re.fullmatch(group, run.fields["groupName"]), "the overrides, sorted, without the seed"
    assert (run.fields["jobType"], run.fields["tags"]) == ("train", ["shufflenet_v2_x0_5", "shapes"])
    assert (run.complete, run.exit_code, run.preempting) == (True, 0, False)
    assert run.config["optimizer"]["lr"] == 0.02
    assert run.config["data"]["num_classes"] is None, "the config as given; the summary has the number"
    assert run.summary["dataset"]["num_classes"] == 10
    assert str(run_dir.parent) not in json.dumps([run.config, run.summary]), "no folder of this machine"
    assert run.summary["val/acc1_best"] == pytest.approx(summary["best"]["val/acc1"])
    assert run.summary["test/acc1"] == pytest.approx(summary["test"]["test/acc1"])
    assert run.summary["dataset"]["fingerprint"] == summary["dataset"]["fingerprint"]
    assert run.summary["best"] == pytest.approx(summary["best"])
    for key in ("git", "parameters", "checkpoints", "status"):
        assert run.summary[key] == summary[key], key
    logged = {key for row in run.history for key in row}
    assert logged >= {
        "train/loss", "val/loss", "val/acc1", "val/acc5", "perf/images_per_second", "perf/data_wait", "lr/decay",
        "images/train", "test/mistakes", "trainer/global_step", "figures/filters", "figures/curves", "figures/top5",
        "figures/neighbours", "figures/per_class", "figures/confusion_matrix", "figures/mistakes",
    }  # fmt: skip
    accuracies = [row["val/acc1"] for row in run.history if "val/acc1" in row]
    assert accuracies[-1] == pytest.approx(summary["last"]["val/acc1"])
    assert any(name.startswith("media/images/images/train") for name in server.files)
    with (run_dir / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["perf/images"]]
    assert [row for row in rows if row["lr/decay"]] == [], "only W&B needs both in one row"
    assert len({(row["step"], row["perf/images"]) for row in rows}) == len({row["step"] for row in rows})


def test_images_code_and_checkpoint_are_artifacts(whole: tuple[Path, str], shapes: Path, server: WandbServer) -> None:
    run_dir, printed = whole
    assert "was not uploaded" not in printed
    run, summary, code = server.run_of("whole"), summary_of(run_dir), json.loads((run_dir / "code.json").read_text())
    dataset = json.loads(server.files["artifact/dataset.json"])
    for key in ("fingerprint", "images"):
        assert dataset[key] == summary["dataset"][key]
    assert dataset["classes"] == sorted(path.name for path in (shapes / "train").iterdir())
    saved = server.artifact_of("dataset-shapes")
    assert saved["artifactTypeName"] == "dataset"
    assert saved["metadata"]["fingerprint"] == summary["dataset"]["fingerprint"]
    assert [use["runName"] for use in server.uses] == [run.name], "an input of the run"
    saved = server.artifact_of("alexlab-code")
    assert json.loads(server.files["artifact/code.json"]) == code == saved["metadata"]
    assert code["commit"] == summary["git"]["commit"]
    assert code_alias(code) in saved["aliases"]
    assert ("artifact/code.patch" in server.files) == code["dirty"]
    saved = server.artifact_of(f"model-{run.name}")
    assert saved["aliases"] == {"best", "latest"}
    assert saved["metadata"].pop("test") == pytest.approx(summary["test"])
    assert saved["metadata"] == {
        "best": summary["best"], "epoch": summary["best_epoch"], "monitor": "val/acc1", "model": "shufflenet_v2_x0_5",
        "name": run.fields["displayName"], "num_classes": 10, "image_size": 64,
        "fingerprint": summary["dataset"]["fingerprint"],
    }  # fmt: skip
    assert server.files["artifact/best.ckpt"] == (run_dir / "checkpoints/best.ckpt").read_bytes()
    assert not any(name.endswith((".jpg", "diff.patch")) for name in server.files), "no image, and the code once"
    texts = [raw for name, raw in server.files.items() if "json" in name and "metadata" not in name]
    assert str(shapes.parent).encode() not in b"".join(texts)
    assert str(run_dir.parent) not in json.dumps([made["metadata"] for made in server.artifacts])


# -- what a logger logs


def test_any_metric_is_logged_over_the_steps(server: WandbServer, make_logger: MakeLogger) -> None:
    logger = make_logger("mine")
    logger.log_config({"whole": 1, "float": 0.5, "my": {"key": [1, "a"]}})
    logger.log_metrics({"mine/score": 0.5, "epoch": 1}, step=3)
    logger.learning_rate_axes = lambda: {"epoch": 2, "perf/images": 8}
    logger.log_metrics({"lr/decay": 0.1}, step=4)
    logger.log_image("mine/image", [torch.zeros(3, 4, 4)], step=5)
    logger.finish("finished")
    logger.finish("failed")  # a second call does nothing
    run = server.run_of("mine")
    rows = [{key: value for key, value in row.items() if not key.startswith("_")} for row in run.history]
    assert rows[0] == {"mine/score": 0.5, "epoch": 1, "trainer/global_step": 3}
    assert rows[1] == {"lr/decay": 0.1, "trainer/global_step": 4, "epoch": 2, "perf/images": 8}
    assert rows[2]["mine/image"]["_type"] == "images/separated"
    assert run.config == {"run": "mine", "whole": 1, "float": 0.5, "my": {"key": [1, "a"]}}
    metrics = json.loads(run.fields["config"])["_wandb"]["value"]["m"]
    assert {"1": "trainer/global_step"}.items() <= metrics[0].items()
    assert {"2": "*", "5": 1, "6": [1]}.items() <= metrics[1].items(), "all names; step metric 1, synchronized"
    assert (run.complete, run.exit_code) == (True, 0)


def test_runs_on_the_same_images_and_code_use_the_same_version(
    server: WandbServer, make_logger: MakeLogger, tmp_path: Path
) -> None:
    """And a resumed run is the same run."""
    known = len(server.artifacts)
    ids = []
    for folder, root in (("first", "/a/cats"), ("second", "/b/cats"), ("first", "/a/cats")):
        logger = make_logger(folder, log_code=folder == "first")
        ids.append(logger.version)
        log_artifacts(logger, tmp_path / folder, root)
        logger.finish("finished")
    assert ids[0] == ids[2] != ids[1]
    made = server.artifacts[known:]
    digests = {kind: [a["digest"] for a in made if a["artifactTypeName"] == kind] for kind in ("dataset", "code")}
    assert len(digests["dataset"]) == 3
    assert len(digests["code"]) == 2, "none with log_code=false"
    assert [len(set(each)) for each in digests.values()] == [1, 1]


def test_the_alias_of_unknown_code_is_not_that_of_the_commit() -> None:
    clean = {"commit": "c" * 40, "dirty": False, "patch_sha256": None, "left_out": None}
    assert code_alias(clean) == "c" * 12
    assert code_alias({**clean, "dirty": True, "patch_sha256": "d" * 64}) == f"{'c' * 12}-{'d' * 12}"
    assert code_alias({**clean, "dirty": None, "left_out": "git failed"}) == f"{'c' * 12}-unknown"


@pytest.mark.parametrize("ours", [True, False])
def test_wandbs_own_upload_of_code_is_off_if_ours_is_on(ours: bool, tmp_path: Path) -> None:
    """Otherwise W&B's own settings decide."""
    logger = WandbLogger(str(tmp_path), mode="offline", log_code=ours)
    assert logger.init_args["settings"].save_code is (False if ours else None)


# -- modes


@pytest.mark.parametrize(
    ("mode", "variable", "key", "expected"),
    [
        ("auto", None, True, ("online", "found an API key")),
        ("auto", None, False, ("offline", "no API key: `wandb login` stores one")),
        ("auto", "", False, ("offline", "no API key: `wandb login` stores one")),
        ("auto", "dryrun", True, ("offline", "WANDB_MODE=dryrun")),
        ("auto", "disabled", True, ("disabled", "WANDB_MODE=disabled")),
        ("offline", "online", False, ("offline", "logger.wandb.mode=offline")),
        ("online", "offline", True, ("online", "logger.wandb.mode=online")),
        ("auto", "run", False, "`WANDB_MODE=run` needs an API key: run `wandb login` or set WANDB_API_KEY, or use WAN"),
        ("online", None, False, "`logger.wandb.mode=online` needs an API key: .*or use logger.wandb.mode=offline"),
        ("auto", "shared", True, "`WANDB_MODE=shared` must be online, offline or disabled, or must not be set."),
        ("offline", " ", True, "`WANDB_MODE= ` must be online, offline or disabled, or must not be set."),
    ],
)
def test_the_mode_follows_from_config_environment_and_key(
    mode: str, variable: str | None, key: bool, expected: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.invalid")
    (tmp_path / "netrc").write_text(f"machine {'wandb.invalid' if key else 'other'} login user password 0123\n")
    if variable is not None:
        monkeypatch.setenv("WANDB_MODE", variable)
    if isinstance(expected, tuple):
        assert choose_mode(mode) == expected
        assert os.environ.get("WANDB_MODE") != "", "W&B would fail on it"
    else:
        with pytest.raises(UserError, match=expected):
            choose_mode(mode)


def test_a_mode_that_cannot_be_is_reported_before_the_run_directory_exists(shapes: Path, tmp_path: Path) -> None:
    done = tiny_train(shapes, tmp_path / "run", "logger=wandb", env={"WANDB_MODE": "ofline"})
    assert done.returncode == 2, done.stdout
    assert "error: `WANDB_MODE=ofline` must be online, offline or disabled" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_key_is_stored_for_a_later_upload(
    make_logger: MakeLogger, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, logger="alexlab"):
        logger = make_logger(
            "run", {"WANDB_API_KEY": "", "NETRC": "/nonexistent", "HOME": "/nonexistent"}, log_model=True
        )
        log_artifacts(logger, tmp_path / "run")
        logger.finish("finished")
    (line,) = [record.getMessage() for record in caplog.records if record.name == "alexlab"]
    assert line.startswith("W&B: offline (no API key: `wandb login` stores one). To upload the run later: `wandb sync")
    assert "WARNING" not in capfd.readouterr().err
    wandb.teardown()  # until then its process may still write
    (file,) = (tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb")
    for artifact in (b"dataset-cats", b"alexlab-code", b"model-"):
        assert artifact in file.read_bytes()


@pytest.mark.parametrize(
    ("env", "settings", "message"),
    [
        ({"WANDB_API_KEY": "x"}, {"mode": "online"}, r"W&B refuses the API key \(.*: run `wandb login` again, or"),
        ({}, {"project": "a/b"}, r"W&B does not accept the settings of logger\.wandb: "),
        ({"WANDB_TAGS": "x" * 65}, {}, r"W&B does not accept the settings of logger\.wandb: .*64"),
    ],
)
def test_what_wandb_refuses_is_a_users_mistake(env: Any, settings: Any, message: str, make_logger: MakeLogger) -> None:
    with pytest.raises(UserError, match=message):
        make_logger("run", env, **settings)


# -- how a run ended


@pytest.fixture(scope="module")
def sweep(server: WandbServer, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two jobs without test images; the validation images of the first are broken."""
    folder = tmp_path_factory.mktemp("jobs")
    for name in ("broken", "less"):
        shutil.copytree(shapes, folder / name, ignore=shutil.ignore_patterns("test"))
    for path in (folder / "broken/val").glob("*/*.jpg"):
        path.write_bytes(b"broken")
    done = command(
        "train.py", "-m", *TINY, "data=folder", f"data.root={folder}/broken,{folder}/less", "data.batch_size=8",
        "debug=fast", "logger=wandb", "logger.wandb.log_model=true", "callbacks.figures=true", "sweep.keep_going=true",
        f"hydra.sweep.dir={folder / 'sweep'}", env={**server.env(), "WANDB_RUN_ID": "one"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "cannot be read as an image" in done.stderr
    return folder / "sweep"


def test_each_job_of_a_sweep_has_its_run_and_a_failed_one_shows_as_failed(sweep: Path, server: WandbServer) -> None:
    runs = [run for run in server.runs.values() if run.fields.get("groupName") == "sweep"]
    assert [run.config["data"]["root"] for run in runs] == ["broken", "less"]
    assert [run.exit_code for run in runs] == [1, 0]
    assert [summary_of(sweep / job)["status"] for job in ("0", "1")] == ["failed", "finished"]


def test_without_test_images_no_test_result_is_logged(sweep: Path, server: WandbServer) -> None:
    """It is a second evaluation on val; the run's own summary has it."""
    run = server.run_of("sweep/1")
    logged = {key for row in [*run.history, run.summary] for key in row}
    assert {key for key in logged if key.startswith("test/")} == set()
    assert run.summary["test"] == {}
    assert {"val/acc1", "val/mistakes", "val/per_class", "val/confusion_matrix_table"} <= logged
    assert server.artifact_of(f"model-{run.name}")["metadata"]["test"] == {}
    assert "test/acc1" in summary_of(sweep / "1")["test"]


@pytest.mark.parametrize("devices", [1, 2] if ALL else [1])
def test_a_run_that_a_signal_ends_shows_as_preempted(
    devices: int, server: WandbServer, shapes: Path, tmp_path: Path
) -> None:
    run_dir, sent = tmp_path / f"ended-{devices}", []

    def watch(pid: int) -> None:
        log = run_dir / "train.log"
        if not sent and log.is_file() and "epoch 1/" in log.read_text():
            sent.append(os.kill(pid, signal.SIGTERM))

    done = tiny_train(
        shapes, run_dir, "trainer.max_epochs=500", "trainer.limit_train_batches=1", "logger=wandb",
        f"trainer.devices={devices}", env=server.env(), watch=watch,
    )  # fmt: skip
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "Traceback" not in done.stderr
    summary = summary_of(run_dir)
    assert summary["status"] == "preempted"
    assert "val/acc1" in summary["best"]
    assert "last" in summary["checkpoints"]
    run = server.run_of(run_dir.name)
    assert run.preempting
    assert run.exit_code != 0


@pytest.mark.parametrize(
    ("number", "agent", "marked"),
    [(signal.SIGTERM, False, True), (signal.SIGTERM, True, False), (signal.SIGUSR1, True, True), (None, True, True)],
)
def test_a_run_that_the_agent_was_to_stop_is_not_started_again(
    number: int | None, agent: bool, marked: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if agent:
        monkeypatch.setenv("WANDB_SWEEP_ID", "s")
        monkeypatch.setenv("WANDB_RUN_ID", "r")
    logger, done = WandbLogger(str(tmp_path), mode="offline"), []
    assert ("project" in logger.init_args) is not agent, "the agent's run is in its sweep's project"
    logger.run = SimpleNamespace(
        mark_preempting=lambda: done.append("marked"), finish=lambda exit_code: done.append(exit_code), dir="x/y"
    )
    logger.finish("preempted", number)
    assert done == (["marked", 1] if marked else [1])


# -- faults


AT_START: list[int | str] = [401, 429, 500, "close", "hang", "refused", "dead host", "short key"]
LATER = [(fault, moment) for fault in ("hang", "close", 401, 429, 500) for moment in ("history", "end")]
SHORT = {"WANDB_FINISH_TIMEOUT": "3"}


@pytest.mark.parametrize("fault", AT_START if ALL else ["hang", 401])
def test_a_server_that_fails_at_the_start_leaves_the_run_offline(fault: Any, shapes: Path, tmp_path: Path) -> None:
    with wandb_server() as server, socket.socket() as silent:
        server.fault, server.faulty_from = fault, "start"
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # accepts connections and never answers
        addresses = {
            "dead host": "http://wandb.invalid",  # RFC 2606: resolves nowhere
            "refused": f"http://127.0.0.1:{free_port(None)}",
            "hang": f"http://127.0.0.1:{silent.getsockname()[1]}",
        }
        env = {**server.env(), "WANDB_BASE_URL": addresses.get(str(fault), server.url)}
        env |= {"WANDB_API_KEY": "x"} if fault == "short key" else {}
        words = ["logger=wandb", "logger.wandb.init_timeout=2", "test=false"]
        done = tiny_train(shapes, tmp_path / "run", *words, env=env)
    assert done.returncode == 0, done.stderr
    printed = done.stdout + done.stderr
    assert printed.count("the run continues offline.") == 1, printed
    reason = "W&B refuses the API key (" if fault in (401, "short key") else "W&B: "
    assert reason in printed
    assert "W&B: offline (no answer). To upload the run later: `wandb sync " in printed
    assert summary_of(tmp_path / "run")["status"] == "finished"
    assert len(list((tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb"))) == 1


def test_a_refused_key_leaves_the_run_offline(make_logger: MakeLogger, caplog: pytest.LogCaptureFixture) -> None:
    logger = make_logger("run", {"WANDB_API_KEY": "x"})
    logger.finish("finished")
    assert (logger.mode, caplog.text.count("W&B: W&B refuses the API key (")) == ("offline", 1)
    assert caplog.text.count("the run continues offline.") == 1


LONGER = ["trainer.max_epochs=2", "trainer.limit_train_batches=null"]


@pytest.fixture(scope="module")
def weights_without_wandb(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    run_dir = tmp_path_factory.mktemp("without") / "run"
    assert tiny_train(shapes, run_dir, *LONGER).returncode == 0
    return torch.load(run_dir / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize(("fault", "moment"), LATER if ALL else [("hang", "history"), (401, "history")])
def test_a_server_that_fails_later_costs_only_its_metrics(
    fault: int | str, moment: str, shapes: Path, tmp_path: Path, weights_without_wandb: dict[str, torch.Tensor]
) -> None:
    """Without a timeout W&B waits for a server that hangs for more than six minutes at the end of a run."""
    with wandb_server() as server:
        server.fault, server.faulty_from = fault, moment
        words = ["logger=wandb", "logger.wandb.log_model=true"]  # uploaded when the server has failed
        done = tiny_train(shapes, tmp_path / "run", *LONGER, *words, env={**server.env(), **SHORT}, timeout=150)
    assert server.faulty
    assert done.returncode == 0, done.stderr
    weights = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, weights_without_wandb[key]) for key, value in weights.items())
    assert summary_of(tmp_path / "run")["status"] == "finished"
    printed = done.stdout + done.stderr
    warned = r"W&B: the server did not receive all metrics(?: within 3 s)?: upload them with `wandb sync (.*)`"
    found = re.findall(warned, printed)
    assert len(found) == 1, printed
    assert list(Path(found[0]).glob("run-*.wandb"))


def test_artifacts_that_a_server_refuses_cost_nothing_else(
    server: WandbServer, make_logger: MakeLogger, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """W&B refuses, for example, a name that another type of artifact has."""
    before = len(server.artifacts)
    logger = make_logger("refused", log_model=True)
    server.refuses = {"CreateArtifact": "no", "ArtifactType": "no"}
    log_artifacts(logger, tmp_path / "refused")
    logger.finish("finished")
    server.refuses = {}
    run = server.run_of("refused")
    assert (run.complete, run.exit_code, len(server.artifacts)) == (True, 0, before)
    for name in ("dataset-cats", "alexlab-code", f"model-{run.name}"):
        assert f"W&B: the artifact {name} was not uploaded (" in caplog.text


KILL = """
import logging, psutil, sys
from alexlab.loggers.wandb_logger import WandbLogger
logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stdout)
logger = WandbLogger(sys.argv[1], mode="offline")
logger.log_config({"run": "x"})
(core,) = [each for each in psutil.Process().children(recursive=True) if "wandb-core" in each.name()]
core.kill()
core.wait()
for step in range(20):
    logger.log_metrics({"val/acc1": 0.5}, step)
logger.log_summary({"status": "finished"})
logger.finish("finished")
print("finished")
"""


def test_training_continues_without_wandbs_process(tmp_path: Path) -> None:
    """The system may kill it, for example for its memory."""
    (tmp_path / "kill.py").write_text(KILL)
    done = command(str(tmp_path / "kill.py"), str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("finished\n")
    assert done.stdout.count("W&B failed (") == 1, done.stdout
    assert "no more metrics are sent to W&B. metrics.csv has all metrics." in done.stdout


# -- what a container lacks


def offline(monkeypatch: pytest.MonkeyPatch, folder: Path, **env: str) -> WandbLogger:
    """Open and close an offline run with an artifact in this process."""
    for name in ("DATA", "CACHE", "CONFIG"):  # restored after the test
        monkeypatch.setenv(f"WANDB_{name}_DIR", "")
        monkeypatch.delenv(f"WANDB_{name}_DIR")
    for key, value in {"WANDB_MODE": "offline", "TMPDIR": "/dev/null/x", **env}.items():
        monkeypatch.setenv(key, value)
    wandb.teardown()
    logger = WandbLogger(str(folder))
    logger.log_config({"a": 1})
    logger.log_dataset({"name": "folder", "root": "/a/caf\udce9"}, DATASET, [r"caf\xe9"])
    logger.log_metrics({"val/loss": 1.0}, 0)
    logger.finish("finished")
    wandb.teardown()
    return logger


def test_a_home_that_cannot_be_written_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "home").touch()
    monkeypatch.setattr(sys, "argv", ["train.py", "data.root=/a/caf\udce9"])
    logger = offline(monkeypatch, tmp_path / "run", HOME=str(tmp_path / "home"))
    assert logger.mode == "offline"
    assert list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert re.fullmatch(rf"W&B cannot write to {tmp_path}/home/.*, and uses {tmp_path}/run/wandb instead\.", warning)


def test_a_run_continues_without_wandb_if_that_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logger = offline(monkeypatch, tmp_path / "r\udce9n")
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warning == "W&B does not start (the path of the run is in no encoding): the run continues without W&B."
    assert logger.mode == "disabled"
