"""W&B for real: online against a small server on loopback, and offline where no server answers."""

import csv
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, TINY, clean_env, command, summary_of, tiny_train
from wandb.proto import wandb_internal_pb2
from wandb_server import WandbServer, wandb_server

from alexlab.engine.errors import UserError
from alexlab.engine.launcher import free_port
from alexlab.loggers.wandb_logger import WandbLogger, check_environment


@pytest.fixture(scope="module")
def server() -> Iterator[WandbServer]:
    with wandb_server() as running:
        yield running


def test_a_run_is_told_whole(server: WandbServer, shapes: Path, tmp_path: Path) -> None:
    done = tiny_train(
        shapes, tmp_path / "told", "logger=wandb", "logger.wandb.log_model=true", "logger.wandb.tags=[a,b]",
        "trainer.max_epochs=2", "trainer.log_every_n_steps=1", "callbacks.figures=true", env=server.env(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"W&B: online (an API key is there). {server.url}/tester/alexlab/runs/" in done.stdout
    assert re.search(rf"look at it: +{server.url}/tester", done.stdout)
    run = server.run_of("told")
    fields = run.fields
    group = r"shufflenet_v2_x0_5-shapes-bs8-px64-limit_train_batches2-ep2-[0-9a-f]{6}"
    assert re.fullmatch(group, fields["groupName"]), "each word once, and sorted"
    assert fields["jobType"] == "train"
    assert fields["tags"] == ["a", "b"]
    ours = {key: value for key, value in json.loads(fields["config"]).items() if key != "_wandb"}  # W&B's own notes
    assert str(tmp_path) not in json.dumps([ours, run.summary]), "no folder of this machine"
    assert (run.complete, run.exit_code, run.preempting) == (True, 0, False)
    config = json.loads(run.fields["config"])
    assert config["optimizer"]["value"]["lr"] == 0.005
    assert config["data"]["value"]["num_classes"] == 10
    summary = json.loads((tmp_path / "told/summary.json").read_text())
    assert run.summary["val/acc1_best"] == pytest.approx(summary["best"]["val/acc1"])
    assert run.summary["test/acc1"] == pytest.approx(summary["test"]["test/acc1"])
    assert run.summary["git"]["commit"] == summary["git"]["commit"]
    assert run.summary["dataset"]["fingerprint"] == summary["dataset"]["fingerprint"]
    assert run.summary["parameters"] == summary["parameters"]
    assert run.summary["best"] == pytest.approx(summary["best"])
    assert run.summary["checkpoints"] == summary["checkpoints"]
    assert run.summary["status"] == "finished"
    logged = {key for row in run.history for key in row}
    assert logged >= {
        "train/loss", "val/loss", "val/acc1", "val/acc5", "perf/images_per_second", "perf/data_wait", "lr/decay",
        "images/train", "test/mistakes", "trainer/global_step", "figures/filters", "figures/curves", "figures/top5",
        "figures/neighbours", "figures/per_class", "figures/confusion_matrix", "figures/mistakes",
    }  # fmt: skip
    assert [row["val/acc1"] for row in run.history if "val/acc1" in row][-1] == pytest.approx(
        summary["last"]["val/acc1"]
    )
    with (tmp_path / "told/metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["perf/images"]]
    assert [row for row in rows if row["lr/decay"]] == [], "W&B alone needs both in one row"
    assert len({(row["step"], row["perf/images"]) for row in rows}) == len({row["step"] for row in rows})
    assert artifact_of(server, f"model-{run.name}")["metadata"]["test"] == pytest.approx(summary["test"])
    assert any(name.startswith("media/images/images/train") for name in server.files)
    assert "best.ckpt" in {name.rpartition("/")[2] for name in server.files if name.startswith("artifact/")}
    assert (tmp_path / "told/checkpoints/best.ckpt").read_bytes() == next(
        raw for name, raw in server.files.items() if name.endswith("best.ckpt")
    )


def test_a_sweep_has_a_run_a_job_and_a_failed_one_shows_as_failed(
    server: WandbServer, shapes: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(shapes, broken)
    for path in (broken / "val").glob("*/*.jpg"):
        path.write_bytes(b"broken")
    done = command(
        "train.py", "-m", *TINY, "data=folder", f"data.root={broken},{shapes}", "data.batch_size=8", "debug=fast",
        "logger=wandb", "sweep.keep_going=true", f"hydra.sweep.dir={tmp_path / 'sweep'}",
        "trainer=ddp_cpu", env=server.env(),
    )  # fmt: skip
    assert done.returncode == 1
    assert "cannot be read as an image" in done.stderr
    runs = [run for run in server.runs.values() if run.fields.get("groupName") == "sweep"]  # the sweep's own
    roots = [json.loads(run.fields["config"])["data"]["value"]["root"] for run in runs]
    assert roots == [broken.name, shapes.name]
    assert [run.exit_code for run in runs] == [1, 0]
    statuses = [json.loads((tmp_path / f"sweep/{job}/summary.json").read_text())["status"] for job in (0, 1)]
    assert statuses == ["failed", "finished"]


@pytest.mark.parametrize(("number", "devices"), [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_run_that_is_ended_shows_as_preempted(
    number: signal.Signals, devices: int, server: WandbServer, shapes: Path, tmp_path: Path
) -> None:
    name = f"ended-{number.name}-{devices}"
    words = [
        "train.py", *TINY, "data=folder", f"data.root={shapes}", "data.batch_size=8", "trainer.max_epochs=500",
        "trainer.limit_train_batches=1", "logger=wandb", f"hydra.run.dir={tmp_path / name}",
        f"trainer.devices={devices}",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=clean_env(server.env()), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's "&" would leave ignored
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            break
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    summary = json.loads((tmp_path / name / "summary.json").read_text())
    assert summary["status"] == "preempted"
    assert "val/acc1" in summary["best"], "what the run had reached is kept"
    assert "last" in summary["checkpoints"]
    run = server.run_of(name)
    assert run.fields["tags"] == ["shufflenet_v2_x0_5", "shapes"]
    assert run.preempting
    assert run.exit_code != 0


def test_a_server_that_hangs_or_refuses_leaves_the_run_offline(shapes: Path, tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # takes connections and never answers
        hangs = f"http://127.0.0.1:{silent.getsockname()[1]}"
        env = {"WANDB_BASE_URL": hangs, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": ""}
        done = tiny_train(
            shapes, tmp_path / "hangs", "logger=wandb", "logger.wandb.init_timeout=2", "test=false", env=env
        )
    assert done.returncode == 0, done.stderr
    assert "the server did not answer" in done.stdout
    assert "W&B: offline (no answer). upload later with `wandb sync" in done.stdout
    assert list((tmp_path / "hangs").glob("wandb/offline-run-*/run-*.wandb"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["logger.wandb.mode=online"], "W&B refuses the API key ("),
        (["logger.wandb.project=a/b"], "W&B does not take the settings of logger.wandb: "),
    ],
)
def test_what_wandb_refuses_is_told(
    words: list[str], told: str, server: WandbServer, shapes: Path, tmp_path: Path
) -> None:
    env = {**server.env(), **({"WANDB_API_KEY": "x"} if "online" in words[0] else {})}
    done = tiny_train(shapes, tmp_path / "run", "logger=wandb", "test=false", *words, env=env)
    assert done.returncode == 2, done.stdout
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_a_key_that_is_refused_leaves_a_run_offline_that_may_be(shapes: Path, tmp_path: Path) -> None:
    env = {"WANDB_API_KEY": "x", "WANDB_MODE": ""}
    done = tiny_train(shapes, tmp_path / "run", "logger=wandb", "test=false", env=env)
    assert done.returncode == 0, done.stderr
    assert "W&B: W&B refuses the API key (" in done.stdout
    assert list((tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb"))


def artifact_of(server: WandbServer, collection: str) -> dict:
    """The last of that name that was made, its metadata read."""
    found = [made for made in server.artifacts if made["artifactCollectionName"] == collection][-1]
    aliases = {each["alias"] for each in found["aliases"]}
    return {**found, "metadata": json.loads(found["metadata"]), "aliases": aliases}


def test_images_and_code_are_told_without_an_image_or_a_folder(shapes: Path, tmp_path: Path) -> None:
    """Also where the user's account has W&B save the code, which would be the same again."""
    with wandb_server() as server:
        env = {**server.env(), "WANDB_SAVE_CODE": "true"}
        for name in ("a", "b"):
            run_dir = tmp_path / name
            words = ["logger=wandb", "logger.wandb.log_model=true", "test=false", "seed=1" if name == "b" else "seed=0"]
            done = tiny_train(shapes, run_dir, *words, env=env)
            assert done.returncode == 0, done.stderr
        off = tiny_train(shapes, tmp_path / "off", "logger=wandb", "logger.wandb.log_code=false", env=server.env())
        assert off.returncode == 0, off.stderr
        assert "was not taken" not in done.stdout
    summary, code = summary_of(run_dir), json.loads((run_dir / "code.json").read_text())
    data, kept = artifact_of(server, "dataset-shapes"), artifact_of(server, "alexlab-code")
    assert (data["artifactTypeName"], kept["artifactTypeName"]) == ("dataset", "code")
    told = json.loads(server.files["artifact/dataset.json"])
    assert {key: told[key] for key in ("fingerprint", "images")} == {
        key: summary["dataset"][key] for key in ("fingerprint", "images")
    }
    assert told["classes"] == sorted(path.name for path in (shapes / "train").iterdir())
    assert data["metadata"]["fingerprint"] == summary["dataset"]["fingerprint"]
    assert json.loads(server.files["artifact/code.json"]) == code == kept["metadata"]
    assert code["commit"] == summary["git"]["commit"]
    assert f"{code['commit'][:12]}{'-' + code['patch_sha256'][:12] if code['patch_sha256'] else ''}" in kept["aliases"]
    assert ("artifact/code.patch" in server.files) == code["dirty"]
    assert not any(name.endswith((".jpg", "diff.patch")) for name in server.files)
    assert str(tmp_path) not in json.dumps([made["metadata"] for made in server.artifacts])
    assert str(shapes.parent).encode() not in b"".join(raw for name, raw in server.files.items() if "json" in name
                                                       and "metadata" not in name)  # fmt: skip
    digests = [
        [made["digest"] for made in server.artifacts if made["artifactTypeName"] == kind]
        for kind in ("dataset", "code")
    ]
    assert [(len(each), len(set(each))) for each in digests] == [(3, 1), (2, 1)], "one version for all runs"
    assert len(server.uses) == 3, "each run says what it was trained on"
    model = artifact_of(server, f"model-{server.run_of('b').name}")
    assert model["aliases"] == {"best", "latest"}
    assert model["metadata"] == {
        "best": summary["best"], "epoch": 1, "monitor": "val/acc1", "test": {}, "model": "shufflenet_v2_x0_5",
        "name": server.run_of("b").fields["displayName"], "num_classes": 10, "image_size": 64,
        "fingerprint": summary["dataset"]["fingerprint"],
    }  # fmt: skip


@pytest.mark.parametrize("ours", [True, False])
def test_wandbs_own_upload_of_code_is_off_where_ours_is_on(ours: bool, tmp_path: Path) -> None:
    """Without a word of ours W&B's own settings decide."""
    board = WandbLogger(str(tmp_path), mode="offline", log_code=ours)
    assert board._wandb_init["settings"].save_code is (False if ours else None)


def records_of(path: Path) -> Iterator[Any]:
    """Yield the records of an offline run's file: LevelDB's log format, blocks of 32 KiB with parts of records."""
    raw, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(raw):
        if 32768 - place % 32768 < 7:  # the rest of a block, too short for a part
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", raw, place)
        record += raw[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # the whole record, or its last part
            yield wandb_internal_pb2.Record.FromString(record)  # type: ignore[attr-defined]
            record = b""


def test_artifacts_of_a_run_without_a_server_are_kept_for_the_upload(shapes: Path, tmp_path: Path) -> None:
    """In its file, as all else that `wandb sync` uploads."""
    done = tiny_train(shapes, tmp_path / "run", "logger=wandb", "logger.wandb.log_model=true", "test=false")
    assert done.returncode == 0, done.stderr
    assert "was not taken" not in done.stdout + done.stderr
    (file,) = (tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb")
    records = list(records_of(file))
    made = [record.request.log_artifact.artifact for record in records if record.request.HasField("log_artifact")]
    made += [record.artifact for record in records if record.HasField("artifact")]
    assert {artifact.type: artifact.use_after_commit for artifact in made} == {
        "dataset": True, "code": False, "model": False
    }  # fmt: skip


def test_artifacts_that_a_server_does_not_take_cost_nothing_else(shapes: Path, tmp_path: Path) -> None:
    """Refused, as where a name is another type's; the run is told whole."""
    with wandb_server() as server:
        server.refuses = {"CreateArtifact": "no", "ArtifactType": "no"}
        done = tiny_train(shapes, tmp_path / "run", "logger=wandb", "logger.wandb.log_model=true", env=server.env())
        run = server.run_of("run")
    assert done.returncode == 0, done.stderr
    assert summary_of(tmp_path / "run")["status"] == "finished"
    assert (run.complete, run.exit_code, server.artifacts) == (True, 0, [])
    for name in ("dataset-shapes", "alexlab-code", f"model-{run.name}"):
        assert f"W&B: the artifact {name} was not taken (" in done.stdout


def test_without_images_to_test_with_no_test_is_told(server: WandbServer, shapes: Path, tmp_path: Path) -> None:
    """It would be val once more, in one column with others' tests; the run's own summary has it."""
    less = tmp_path / "less"
    shutil.copytree(shapes, less, ignore=shutil.ignore_patterns("test"))
    words = ["logger=wandb", "logger.wandb.log_model=true", "callbacks.figures=true"]
    done = tiny_train(less, tmp_path / "untested", *words, env=server.env())
    assert done.returncode == 0, done.stderr
    run = server.run_of("untested")
    told = {key for row in [*run.history, run.summary] for key in row}
    assert {key for key in told if key.startswith("test/")} == set()
    assert run.summary["test"] == {}
    assert {"val/acc1", "val/mistakes", "val/predictions", "val/per_class", "val/confusion_matrix_table"} <= told
    assert artifact_of(server, f"model-{run.name}")["metadata"]["test"] == {}
    assert "test/acc1" in summary_of(tmp_path / "untested")["test"]


@pytest.mark.parametrize("words", [["logger=wandb"], ["logger=wandb", "logger.wandb.mode=offline"]])
def test_a_mode_of_the_environment_is_looked_at_before_the_run(words: list[str], shapes: Path, tmp_path: Path) -> None:
    done = tiny_train(shapes, tmp_path / "run", *words, env={"WANDB_MODE": "ofline"})
    assert done.returncode == 2, done.stdout
    assert "error: WANDB_MODE=ofline: must be online, offline or disabled, or not be set." in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("asked", ["shared", " "])
def test_a_mode_that_fits_no_run_is_refused(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", asked)
    with pytest.raises(UserError, match=f"WANDB_MODE={asked}: must be online, offline or disabled, or not be set"):
        check_environment("auto")


def test_an_empty_mode_counts_as_none(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B's client would end in a traceback of its settings."""
    monkeypatch.setenv("WANDB_MODE", "")
    check_environment("auto")
    assert "WANDB_MODE" not in os.environ
    done = tiny_train(shapes, tmp_path / "run", "logger=wandb", "test=false", env={"WANDB_MODE": ""})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("asked", ["online", "run"])
def test_a_mode_of_the_environment_that_needs_a_key_is_named_before_the_run(
    asked: str, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = f"WANDB_MODE={asked} needs an API key: run `wandb login` or set WANDB_API_KEY, or take WANDB_MODE=offline"
    if asked == "online":
        done = tiny_train(shapes, tmp_path / "run", "logger=wandb", env={"WANDB_MODE": asked})
        assert done.returncode == 2, done.stdout
        assert f"error: {told}" in done.stderr
        assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WANDB_MODE", asked)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(UserError, match=told):
        check_environment("auto")
    check_environment("offline")  # which stands above it
    with pytest.raises(UserError, match=r"logger.wandb.mode=online needs an API key: .*take logger.wandb.mode=offline"):
        check_environment("online")


def test_a_run_without_a_key_says_how_to_get_one(shapes: Path, tmp_path: Path) -> None:
    done = tiny_train(shapes, tmp_path / "run", "logger=wandb", "test=false", env={"WANDB_MODE": ""})
    assert "W&B: offline (no API key: `wandb login` keeps one). upload later" in done.stdout


@pytest.mark.parametrize(
    ("number", "agent", "marked"),
    [(signal.SIGTERM, False, True), (signal.SIGTERM, True, False), (signal.SIGUSR1, True, True), (None, True, True)],
)
def test_what_an_agent_was_told_to_stop_is_not_to_be_given_out_again(
    number: int | None, agent: bool, marked: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if agent:
        monkeypatch.setenv("WANDB_SWEEP_ID", "s")
        monkeypatch.setenv("WANDB_RUN_ID", "r")
    board, done = WandbLogger(str(tmp_path), mode="offline"), []
    board._experiment = SimpleNamespace(  # type: ignore[assignment]
        mark_preempting=lambda: done.append("marked"),
        finish=lambda exit_code: done.append(exit_code),
        dir=f"{tmp_path}/x",
    )
    board.finish("preempted", number)
    assert done == (["marked", 1] if marked else [1])


ALL = bool(os.environ.get("ALEXLAB_FAULTS"))
FAULTS: list[tuple[int | str, str]] = [("hang", "history"), (401, "history")]
if ALL:
    FAULTS = [(fault, moment) for fault in ("hang", "close", 401, 429, 500) for moment in ("history", "end")]


@pytest.mark.parametrize("fault", [401, 429, 500, "close", "refused", "dead host"] if ALL else [500, "dead host"])
def test_a_server_that_fails_at_the_start_leaves_the_run_offline(
    fault: int | str, shapes: Path, tmp_path: Path
) -> None:
    with wandb_server() as server:
        server.fault, server.faulty_from = fault, "start"
        env = server.env()
        if fault == "dead host":
            env["WANDB_BASE_URL"] = "http://wandb.invalid"  # RFC 2606: resolves nowhere
        if fault == "refused":
            env["WANDB_BASE_URL"] = f"http://127.0.0.1:{free_port(None)}"
        words = ["logger=wandb", "logger.wandb.init_timeout=2", "test=false"]
        done = tiny_train(shapes, tmp_path / "run", *words, env=env)
    assert done.returncode == 0, done.stderr
    printed = done.stdout + done.stderr
    assert printed.count("the run goes on offline.") == 1, printed
    assert "W&B: offline (no answer). upload later with `wandb sync " in printed
    assert summary_of(tmp_path / "run")["status"] == "finished"
    assert len(list((tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb"))) == 1


@pytest.mark.parametrize(("fault", "moment"), FAULTS)
def test_a_server_that_fails_on_the_way_costs_nothing_but_its_numbers(
    fault: int | str, moment: str, shapes: Path, tmp_path: Path
) -> None:
    """W&B by itself waits for a server that hangs, for more than six minutes at a run's end."""
    words = ["trainer.max_epochs=2", "trainer.limit_train_batches=null"]
    with wandb_server() as server:
        server.fault, server.faulty_from = fault, moment
        more = ["logger=wandb", "logger.wandb.log_model=true"]  # which is sent when the server has failed
        with_it = tiny_train(shapes, tmp_path / "with", *words, *more, env=server.env(), timeout=150)
    without = tiny_train(shapes, tmp_path / "without", *words)
    assert server.faulty, "it has failed"
    assert (with_it.returncode, without.returncode) == (0, 0), with_it.stderr
    a, b = (torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("with", "without"))
    assert all(torch.equal(value, b["state_dict"][key]) for key, value in a["state_dict"].items())
    assert summary_of(tmp_path / "with")["status"] == "finished"
    printed = with_it.stdout + with_it.stderr
    warned = r"W&B: the server did not take all numbers(?: within 15 s)?: upload them with `wandb sync (.*)`"
    found = re.findall(warned, printed)
    assert len(found) == 1, printed
    assert list(Path(found[0]).glob("run-*.wandb"))
