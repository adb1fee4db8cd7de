"""MLflow, TensorBoard, and loggers of a user's own: what they get, and that none of them can stop a run."""

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import command, config_of, summary_of, tiny_train
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import (
    SESSION_END_INFO_TAG,
    SESSION_START_INFO_TAG,
    parse_session_start_info_plugin_data,
)

from alexlab.commands import build
from alexlab.engine import config as configs
from alexlab.engine.errors import UserError
from alexlab.engine.files import read_csv
from alexlab.loggers.mlflow_logger import ID_FILE, MlflowLogger
from alexlab.loggers.tracker import Tracker

TOKEN = "canary-of-a-logger"
PARTS = '''
import hashlib, json
from pathlib import Path

from pytorch_lightning.loggers.logger import Logger


class JsonLines(Logger):
    """Appends a line of JSON for each call. Fails on purpose in the methods that `fails` names."""

    name = version = "jsonl"

    def __init__(self, save_dir, version, purge_step, token="", fails=()):
        super().__init__()
        self.path, self.fails = Path(save_dir, "log.jsonl"), fails
        self.first = {"version": version, "purge_step": purge_step, "token": hashlib.sha256(token.encode()).hexdigest()}

    def write(self, method, **line):
        with self.path.open("a") as file:
            file.write(json.dumps({"method": method, **line}) + "\\n")
        if method in self.fails:
            raise ConnectionError(f"no answer to {method}\\nand a second line")

    def log_hyperparams(self, params):
        self.write("log_hyperparams", config=params, **self.first)

    def log_metrics(self, metrics, step=None):
        self.write("log_metrics", step=step, metrics=metrics)

    def log_image(self, key, images, step=None):
        self.write("log_image", step=step, key=key, size=images[0].size)

    def finalize(self, status):
        self.write("finalize", status=status)


class Refuses(JsonLines):
    def __init__(self):
        raise ValueError("`project` must not be empty.")
'''
FIGURES = ["filters", "curves", "top5", "neighbours", "confusion_matrix", "per_class", "mistakes"]
MINE = "+logger.mine={_target_: mypkg.parts.JsonLines, token: '${oc.env:MY_TOKEN}'}"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the user's package, and an option logger=mine."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "mypkg").mkdir()
    (folder / "mypkg/__init__.py").touch()
    (folder / "mypkg/parts.py").write_text(PARTS)
    (folder / "MYCONF/logger").mkdir(parents=True)
    entry = "mine:\n  _target_: mypkg.parts.JsonLines\n  token: ${oc.env:MY_TOKEN}\n"
    (folder / "MYCONF/logger/mine.yaml").write_text(entry)
    (folder / "path.py").write_text(f"import sys; sys.path.append({str(folder)!r})\n")
    return folder


Train = Callable[..., Any]


@pytest.fixture(scope="module")
def train(package: Path, shapes: Path) -> Train:
    """Train as `tiny_train`, with the package on the path and the runs' folder next to the run."""

    def run(run_dir: Path, *words: str, **more: Any) -> Any:
        env = {"MY_TOKEN": TOKEN, **more.pop("env", {})}
        logs = f"paths.logs={run_dir.parent}"
        return tiny_train(shapes, run_dir, logs, *words, env=env, before=package / "path.py", **more)

    return run


@pytest.fixture(scope="module")
def whole(train: Train, package: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run with three loggers, and what it printed."""
    run_dir = tmp_path_factory.mktemp("logs") / "whole"
    words = ["--config-dir", str(package / "MYCONF"), "logger=[tensorboard,mlflow,mine]", "callbacks.figures=true"]
    done = train(run_dir, *words)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return run_dir, done.stdout


def lines_of(run_dir: Path, method: str = "") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if method in ("", line["method"])]


def mlflow_run(run_dir: Path, logs: Path | None = None) -> Any:
    """Return the run in MLflow, and a client."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{logs or run_dir.parent}/mlflow.db")
    return client.get_run((run_dir / ID_FILE).read_text().strip()), client


def last_row(run_dir: Path, key: str) -> float:
    return [float(row[key]) for row in read_csv(run_dir / "metrics.csv")[1] if row.get(key)][-1]


# -- what each logger gets


def test_mlflow_gets_config_metrics_figures_and_status(whole: tuple[Path, str]) -> None:
    run_dir, _ = whole
    run, client = mlflow_run(run_dir)
    assert (run.info.status, client.get_experiment(run.info.experiment_id).name) == ("FINISHED", "alexlab")
    assert run.info.run_name.startswith("shufflenet_v2_x0_5-px64")
    params = run.data.params
    assert (params["optimizer.lr"], params["data.root"]) == ("0.02", "shapes"), "no folder of this machine"
    assert params["logger.mine.token"] == "${oc.env:MY_TOKEN}"
    for key in ("val/acc1", "train/loss", "test/loss"):
        assert run.data.metrics[key] == pytest.approx(last_row(run_dir, key)), key
    assert client.get_metric_history(run.info.run_id, "val/loss")[0].step == 1
    artifacts = {
        file.path for folder in ("", "images", "figures") for file in client.list_artifacts(run.info.run_id, folder)
    }
    assert artifacts == {"config.yaml", "images", "figures", "images/train.png"} | {
        f"figures/{name}.png" for name in FIGURES
    }
    stored = Path(client.download_artifacts(run.info.run_id, "figures/confusion_matrix.png"))
    with Image.open(stored) as theirs, Image.open(run_dir / "figures/confusion_matrix.png") as ours:
        assert theirs.tobytes() == ours.tobytes()


def test_tensorboard_gets_config_metrics_figures_and_status(whole: tuple[Path, str]) -> None:
    run_dir, printed = whole
    read = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    content = read.summary_metadata[SESSION_START_INFO_TAG].plugin_data.content
    assert parse_session_start_info_plugin_data(content).hparams["optimizer.lr"].number_value == 0.02
    assert SESSION_END_INFO_TAG in read.summary_metadata
    assert read.Scalars("val/acc1")[-1].value == pytest.approx(last_row(run_dir, "val/acc1"))
    assert {*read.Tags()["images"]} == {"images/train", *(f"figures/{name}" for name in FIGURES)}
    assert [event.tensor_proto.string_val for event in read.Tensors("status/text_summary")] == [[b"success"]]
    with Image.open(run_dir / "figures/top5.png") as picture:
        logged = read.Images("figures/top5")[0]
        assert (logged.width, logged.height) == picture.size
    assert "look at it:  tensorboard --logdir" in printed, "the first logger that has a view"


def test_a_logger_of_ones_own_gets_config_metrics_figures_and_status(whole: tuple[Path, str]) -> None:
    run_dir, _ = whole
    [first] = lines_of(run_dir, "log_hyperparams")
    assert (first["version"], first["purge_step"]) == ("whole", None)
    assert first["token"] == hashlib.sha256(TOKEN.encode()).hexdigest(), "the logger itself gets the secret"
    assert (first["config"]["optimizer.lr"], first["config"]["logger.mine.token"]) == (0.02, "${oc.env:MY_TOKEN}")
    rows = read_csv(run_dir / "metrics.csv")[1]
    logged = lines_of(run_dir, "log_metrics")
    assert [str(line["step"]) for line in logged] == [row["step"] for row in rows]
    assert [line["metrics"]["val/loss"] for line in logged if "val/loss" in line["metrics"]] == [
        last_row(run_dir, "val/loss")
    ]
    assert [line["key"] for line in lines_of(run_dir, "log_image")] == [
        "images/train",
        *(f"figures/{name}" for name in FIGURES),
    ]
    assert [line["status"] for line in lines_of(run_dir, "finalize")] == ["success"], "once, and at the end"
    assert lines_of(run_dir)[-1]["method"] == "finalize"


def test_a_secret_of_a_logger_is_in_no_file(whole: tuple[Path, str]) -> None:
    files = [path for path in whole[0].parent.rglob("*") if path.is_file()]
    assert {"mlflow.db", "config.yaml", "hparams.yaml", "log.jsonl", "train.log"} <= {path.name for path in files}
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []


@pytest.mark.parametrize("how", ["signal", "error"])
def test_how_a_run_ended(how: str, train: Train, tmp_path: Path) -> None:
    run_dir, sent = tmp_path / "run", []

    def watch(pid: int) -> None:
        log = run_dir / "train.log"
        if not sent and log.is_file() and "epoch 1/" in log.read_text():
            sent.append(os.kill(pid, signal.SIGTERM))

    words = {
        "signal": ["trainer.max_epochs=500", "trainer.limit_train_batches=1"],
        "error": ["+callbacks.stop={_target_: pytorch_lightning.callbacks.EarlyStopping, monitor: none}"],
    }[how]
    done = train(run_dir, "logger=[mlflow,tensorboard]", MINE, *words, watch=watch if how == "signal" else None)
    assert done.returncode == {"signal": 143, "error": 1}[how], done.stderr
    status = {"signal": "preempted", "error": "failed"}[how]
    assert [line["status"] for line in lines_of(run_dir, "finalize")] == [summary_of(run_dir)["status"]] == [status]
    assert mlflow_run(run_dir)[0].info.status == {"signal": "KILLED", "error": "FAILED"}[how]
    read = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert [event.tensor_proto.string_val for event in read.Tensors("status/text_summary")] == [[status.encode()]]
    assert SESSION_END_INFO_TAG not in read.summary_metadata


def test_only_rank_0_logs(train: Train, tmp_path: Path) -> None:
    done = train(tmp_path / "run", "logger=csv", MINE, "trainer=ddp_cpu", "test=false")
    assert done.returncode == 0, done.stderr
    assert [len(lines_of(tmp_path / "run", method)) for method in ("log_hyperparams", "finalize")] == [1, 1]


def test_lightnings_loggers_get_what_they_name(tmp_path: Path) -> None:
    config = config_of(
        "logger=csv", "+logger.lines={_target_: pytorch_lightning.loggers.CSVLogger, version: mine}",
        "optimizer.lr=0.3", f"paths.logs={tmp_path}", run_dir=tmp_path / "run",
    )  # fmt: skip
    [tracker] = build.build_trackers(config, trusted=None)
    tracker.start({"optimizer": {"lr": 0.3}})
    tracker.logger.log_metrics({"a": 1.0}, 1)
    tracker.finish("finished")
    [file] = tmp_path.rglob("metrics.csv")
    assert file.relative_to(tmp_path / "run").parts[1:] == ("mine", "metrics.csv"), "run directory, name, version"
    assert "a,step" in file.read_text()
    assert "optimizer.lr: 0.3" in (file.parent / "hparams.yaml").read_text()


# -- resumed runs, and runs of somebody else


@pytest.fixture
def copied(whole: tuple[Path, str], tmp_path: Path) -> Path:
    shutil.copytree(whole[0].parent, tmp_path / "logs", dirs_exist_ok=True)
    return tmp_path / "logs/whole"


def test_a_resumed_run_continues_its_run_in_mlflow(copied: Path, whole: tuple[Path, str], package: Path) -> None:
    words = ["train.py", f"resume={copied}", "trainer.max_epochs=2", f"paths.logs={copied.parent}"]
    more = ["--config-dir", str(package / "MYCONF"), "logger=[tensorboard,mlflow,mine]"]
    done = command(*words, *more, env={"MY_TOKEN": TOKEN}, before=package / "path.py")
    assert done.returncode == 0, done.stderr
    assert (copied / ID_FILE).read_text() == (whole[0] / ID_FILE).read_text()
    run, client = mlflow_run(copied)
    assert run.info.status == "FINISHED"
    assert len(client.search_runs([run.info.experiment_id])) == 1
    assert [point.step for point in client.get_metric_history(run.info.run_id, "val/loss")] == [1, 3]
    assert run.data.params["trainer.max_epochs"] == "1", "MLflow keeps the first value"
    assert "max_epochs: 2" in Path(client.download_artifacts(run.info.run_id, "config.yaml")).read_text()
    assert [line["purge_step"] for line in lines_of(copied, "log_hyperparams")] == [None, 2]
    assert [line["status"] for line in lines_of(copied, "finalize")] == ["success", "success"]


def test_a_run_of_somebody_else_names_loggers_only_with_consent(
    copied: Path, package: Path, shapes: Path, tmp_path: Path
) -> None:
    """Evaluation builds no logger, so it needs no consent."""
    resume = ["train.py", f"resume={copied}", "trainer.max_epochs=2"]
    env, before = {"MY_TOKEN": TOKEN}, package / "path.py"
    refused = command(*resume, "allow=[mypkg]", env=env, before=before)
    assert refused.returncode == 2
    assert "logger.mine.token of" in refused.stderr
    again = MINE.replace("'${oc.env:MY_TOKEN}'", "${oc.env:MY_TOKEN}")
    assert f"If the run is your own, repeat the setting: '{again}'." in refused.stderr

    config = configs.read(copied / "config.yaml")
    config["logger"] = {"mine": {"_target_": "mypkg.parts.JsonLines", "token": "x"}}
    configs.save(config, copied / "config.yaml")
    for words in (resume, ["train.py", f"from_run={copied}", f"hydra.run.dir={tmp_path / 'new'}"]):
        refused = command(*words, env=env, before=before)
        assert refused.returncode == 2
        assert "_target_=mypkg.parts.JsonLines is not allowed" in refused.stderr
        assert "add allow=[mypkg], here or in conf/allow.yaml" in refused.stderr
    assert not (tmp_path / "new").exists()
    assert [line["status"] for line in lines_of(copied, "finalize")] == ["success"], "it was not built"
    done = command(*resume, "allow=[mypkg]", env=env, before=before)
    assert done.returncode == 0, done.stderr
    tested = command("eval.py", f"run={copied}")
    assert tested.returncode == 0, tested.stderr


def test_a_server_that_a_run_names_needs_consent(tmp_path: Path) -> None:
    """It would get MLFLOW_TRACKING_TOKEN."""
    config = config_of(
        "logger=mlflow", f"logger.mlflow.tracking_uri=sqlite:///{tmp_path}/x.db", run_dir=tmp_path / "run"
    )
    with pytest.raises(UserError, match=r"add allow=\[mlflow\], here or in conf/allow.yaml"):
        build.build_trackers(config, trusted=())
    assert not (tmp_path / "x.db").exists()
    for trusted in (None, ["mlflow"]):
        assert [tracker.key for tracker in build.build_trackers(config, trusted=trusted)] == ["mlflow"]


# -- failures


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ("mine={_target_: mypkg.parts.Refuses}", "`project` must not be empty. (mypkg.parts.Refuses)"),
        ("mine={_target_: mypkg.parts.Nothing}", "mypkg.parts contains no Nothing: check the name."),
        ("mine={_target_: no_such_package.Mine}", "the package no_such_package is not installed."),
        ("mine={_target_: pathlib.Path}", "logger.mine._target_=pathlib.Path builds a PosixPath, which is no logger"),
        ("mlflow={tracking_uri: 'nosql:///x'}", "cannot be built from its settings: "),
        (
            "mine={_target_: mypkg.parts.JsonLines, fails: [log_hyperparams]}",
            "logger.mine does not start: ConnectionError: no answer to log_hyperparams.",
        ),
    ],
)
def test_a_logger_that_does_not_start_is_one_error(
    entry: str, sentence: str, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(package)
    (tmp_path / "run").mkdir()
    config = config_of("logger=csv", f"+logger.{entry}", run_dir=tmp_path / "run")

    def start() -> None:
        for tracker in build.build_trackers(config, trusted=None):
            tracker.start({"monitor": "val/acc1"})

    with pytest.raises(UserError) as error:
        start()
    assert sentence in str(error.value)


def test_a_run_whose_logger_does_not_start_leaves_no_folder(train: Train, tmp_path: Path) -> None:
    nobody = "http://127.0.0.1:9"  # nobody listens
    done = train(tmp_path / "run", "logger=csv", f"+logger.mlflow={{tracking_uri: '{nobody}'}}")
    assert done.returncode == 2, done.stderr
    assert f"logger.mlflow does not start: MlflowException: API request to {nobody}/" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_extra_is_named(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "without.py").write_text("import sys; sys.modules['mlflow'] = None\n")
    done = tiny_train(shapes, tmp_path / "run", "logger=mlflow", before=tmp_path / "without.py")
    assert done.returncode == 2
    assert "logger=mlflow needs the extra: pip install 'alexlab[mlflow]'" in done.stderr


def test_a_logger_that_fails_later_does_not_stop_the_run(train: Train, whole: tuple[Path, str], tmp_path: Path) -> None:
    mine = "+logger.mine={_target_: mypkg.parts.JsonLines, fails: [log_metrics, log_image, finalize]}"
    done = train(tmp_path / "run", "logger=csv", mine, "callbacks.figures=true")
    assert done.returncode == 0, done.stderr
    for method in ("log_metrics", "log_image", "finalize"):
        warning = (
            f"logger.mine: {method} failed and is not called again (ConnectionError: no answer to {method}). "
            "metrics.csv has all metrics."
        )
        assert done.stdout.count(warning) == 1
        assert len(lines_of(tmp_path / "run", method)) == 1
    assert "second line" not in done.stdout
    assert summary_of(tmp_path / "run")["best"] == summary_of(whole[0])["best"]


@pytest.fixture
def mlflow_tracker(tmp_path: Path) -> Tracker:
    (tmp_path / "run").mkdir()
    return Tracker("mlflow", MlflowLogger(str(tmp_path / "run"), str(tmp_path), "a run"))


def test_mlflow_may_lose_its_file(mlflow_tracker: Tracker, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mlflow_tracker.start({"a": {"b/c, ö": 1, "none": None}, "monitor": "val/acc1"})
    mlflow_tracker.logger.log_metrics({"x": 1.0}, step=1)
    run, _ = mlflow_run(tmp_path / "run", tmp_path)
    assert (run.info.status, run.data.params) == ("RUNNING", {"a.b/c_ ö": "1", "a.none": "None", "monitor": "val/acc1"})
    assert run.data.metrics == {"x": 1.0}
    os.truncate(tmp_path / "mlflow.db", 0)
    for step in (2, 3):
        mlflow_tracker.logger.log_metrics({"x": 1.0}, step=step)
    mlflow_tracker.finish("finished")
    failed = [record.getMessage().partition(" (")[0] for record in caplog.records if record.name == "alexlab"]
    words = "logger.mlflow: {} failed and is not called again"
    assert failed == [words.format("log_metrics"), words.format("finalize")]
