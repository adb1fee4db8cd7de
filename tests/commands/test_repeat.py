"""from_run and from_wandb: a run anew, number by number, and what is told where it cannot be."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from conftest import ROOT, command, summary_of, tiny_train
from wandb_server import WandbServer, wandb_server

from alexlab.engine.errors import UserError
from alexlab.loggers import wandb_api as fetch

SETTINGS = [
    "seed=7", "augment=strong", "optimizer=adamw", "optimizer.lr=0.002", "trainer.max_epochs=2",
    "trainer.limit_val_batches=1.0", "trainer.log_every_n_steps=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[WandbServer]:
    with wandb_server() as running:
        yield running


@pytest.fixture(scope="module")
def first(server: WandbServer, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with other settings than the defaults, in W&B as well."""
    run_dir = tmp_path_factory.mktemp("logs") / "train/runs/first"
    done = tiny_train(shapes, run_dir, *SETTINGS, "logger=wandb", "ema.decay=0.9", env=server.env())
    assert done.returncode == 0, done.stderr
    return run_dir


def logs_of(run_dir: Path) -> str:
    return f"paths.logs={run_dir.parents[2]}"


def config_of(run_dir: Path) -> dict[str, Any]:
    return yaml.safe_load((run_dir / "config.yaml").read_text())


def equal(a: Path, b: Path) -> str:
    done = command("compare.py", f"runs=[{a},{b}]", "equal=true")
    return done.stdout + done.stderr if done.returncode else "equal"


def test_a_run_is_repeated_number_by_number(first: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    done = command("train.py", "from_run=first", logs_of(first), f"hydra.run.dir={again}")
    assert done.returncode == 0, done.stderr
    assert f"as {first}\n" in done.stdout
    assert "warning: " not in done.stdout
    assert equal(first, again) == "equal"
    a, b = summary_of(first), summary_of(again)
    assert (a["best"], a["test"]) == (b["best"], b["test"])
    there, here = config_of(first), config_of(again)
    own = ("run_dir", "overrides", "paths", "repeats")
    assert {k: v for k, v in here.items() if k not in own} == {k: v for k, v in there.items() if k not in own}
    assert here["repeats"] == str(first)
    assert f"as {first}" in (again / "train.log").read_text()
    assert json.loads((again / "repeats.json").read_text())["run"] == str(first)
    third = tmp_path / "third"  # of one that is a repetition itself
    done = command("train.py", f"from_run={again}", "seed=8", f"hydra.run.dir={third}", logs_of(first))
    assert done.returncode == 0, done.stderr
    assert f"as {again}, but for seed=8 (there 7)\n" in done.stdout
    assert "differ first at step" in equal(first, third)


def test_a_run_of_wandb_is_repeated_number_by_number(
    server: WandbServer, first: Path, shapes: Path, tmp_path: Path
) -> None:
    again, name = tmp_path / "again", server.run_of("first").name
    words = [f"from_wandb=tester/alexlab/{name}", "logger=csv", f"hydra.run.dir={again}", f"data.root={shapes}"]
    done = command("train.py", *words, env=server.env())
    assert done.returncode == 0, done.stderr
    assert f"as tester/alexlab/{name}, but for logger=csv (there wandb)\n" in done.stdout
    assert "warning: " not in done.stdout
    assert equal(first, again) == "equal"
    there, here = config_of(first), config_of(again)
    own = ("run_dir", "overrides", "paths", "repeats", "logger", "choices")
    assert {k: v for k, v in here.items() if k not in own} == {k: v for k, v in there.items() if k not in own}
    assert isinstance(here["trainer"]["limit_val_batches"], float), "all of it, and not one batch"
    assert {line.partition(":")[0] for line in server.unknown} <= {"ServerFeaturesQuery"}


def test_the_images_of_a_run_of_wandb_are_looked_for_by_name(
    server: WandbServer, first: Path, shapes: Path, tmp_path: Path
) -> None:
    words = [f"from_wandb=tester/alexlab/{server.run_of('first').name}", "logger=csv", "dry_run=true"]
    done = command("train.py", *words, f"paths.data={tmp_path}", env=server.env())
    assert done.returncode == 2
    assert f"its images were in a folder shapes, and {tmp_path} has none of that name" in done.stderr
    assert "data.root=PATH" in done.stderr
    done = command("train.py", *words, f"paths.data={shapes.parent}", env=server.env())
    assert done.returncode == 0, done.stderr


def test_words_given_now_change_it_and_are_told(first: Path, tmp_path: Path) -> None:
    words = [f"from_run={first}", "dry_run=true", logs_of(first), f"hydra.run.dir={tmp_path}/x"]
    for given, told in (
        (["optimizer.lr=0.1"], "but for optimizer.lr=0.1 (there 0.002)\n"),
        (["optimizer.lr=0.002"], f"as {first}\n"),
        (["~trainer.tf32"], "but for ~trainer.tf32 (there true)\n"),
        # what both options set alike stays the run's, and what differs is the new one's
        (["trainer=ddp_cpu", "logger=csv"],
         ("but for logger=csv (there wandb), trainer=ddp_cpu (there auto), trainer.devices=2 (there auto), "
          "trainer.strategy=ddp (there auto)\n")),
        # nor do words of the run's give way to a recipe, which has limits of its own
        (["debug=limit"], "but for debug=limit (there not set), trainer.limit_test_batches=5 (there null)\n"),
    ):  # fmt: skip
        done = command("train.py", *words, *given)
        assert done.returncode == 0, done.stderr
        assert told in done.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["from_run=nowhere"], "from_run=nowhere is not a run's directory"),
        (["from_run=first", "resume=latest"], "from_run=first trains anew, and resume=latest goes on"),
        (["from_run=first", "from_wandb=a/b/c"], "one run is repeated at a time"),
        (["from_run=first", "ckpt_path=first"], "ckpt_path=first is its own checkpoint: resume="),
        (["from_run=first", "optimizer.lr=-1"], "optimizer.lr=-1: must be a number above 0"),
        (
            ["from_run=first", "trainer={max_epochs:${data.batch_size}}"],
            "trainer={max_epochs:${data.batch_size}}: beside from_run=first its keys are given one by one",
        ),
        (["from_run=first", "experiment=finetune"], "experiment=finetune exchanges other groups' options"),
        (["from_run=first", "data.root=/nowhere"], "/nowhere does not exist"),
        (["from_wandb=b/c"], "must be ENTITY/PROJECT/RUN"),
        (["from_wandb=a/b/c"], "`from_wandb=a/b/c` needs an API key: run `wandb login`"),
    ],
)
def test_what_cannot_be_is_told(words: list[str], told: str, first: Path) -> None:
    done = command("train.py", *words, logs_of(first), "logger=csv")
    assert done.returncode == 2, done.stdout
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in first.parent.iterdir()] == ["first"]


def test_other_commands_repeat_nothing() -> None:
    done = command("benchmark.py", "from_run=latest")
    assert done.returncode == 2, done.stdout
    assert "latest: from_run and from_wandb are for train.py alone" in done.stderr


def test_what_wandb_does_not_have_is_told(server: WandbServer, tmp_path: Path) -> None:
    done = command("train.py", "from_wandb=tester/alexlab/none", f"hydra.run.dir={tmp_path}/x", env=server.env())
    assert done.returncode == 2, done.stdout
    assert "`from_wandb=tester/alexlab/none`: the server did not return that run (Could not find run" in done.stderr
    assert "from_run=DIRECTORY" in done.stderr


def test_a_server_that_does_not_answer_is_not_reported_as_an_unknown_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def api(timeout: float) -> None:
        raise wandb.errors.AuthenticationError("no answer")

    monkeypatch.setattr(wandb, "Api", api)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with pytest.raises(UserError, match=r"did not answer or refused the API key \(no answer\): run `wandb "):
        fetch.fetch("a/b/c")


def copy_of(first: Path, to: Path, change: dict[str, Any]) -> Path:
    """A run's directory with other values in its config, as a run that never was."""
    shutil.copytree(first, to, ignore=shutil.ignore_patterns("wandb"))
    config = config_of(first)
    for key, value in change.items():
        node = config
        *folders, leaf = key.split(".")
        for part in folders:
            node = node[part]
        if value is None:
            del node[leaf]
        else:
            node[leaf] = value
    (to / "config.yaml").write_text(yaml.safe_dump(config))
    return to


def test_other_images_and_other_code_are_told(first: Path, shapes: Path, tmp_path: Path) -> None:
    less = tmp_path / "less"
    shutil.copytree(shapes, less)
    next((less / "train").glob("*/*.jpg")).unlink()
    other = copy_of(first, tmp_path / "other", {})
    commit = "0123456789abcdef" * 2 + "01234567"
    told = {"commit": commit, "dirty": True, "patch_sha256": "1" * 64, "left_out": None}
    (other / "code.json").write_text(json.dumps(told))
    done = command("train.py", f"from_run={other}", f"data.root={less}", "dry_run=true", f"hydra.run.dir={tmp_path}/x")
    assert done.returncode == 0, done.stderr
    then = summary_of(first)["dataset"]["fingerprint"]["train"]
    assert f"warning: the images differ from those of {other}: train 39 of fingerprint " in done.stdout
    assert f"(there 40 of {then})." in done.stdout
    assert f"warning: the code differs from that of {other}: commit {commit} with changes, now " in done.stdout
    assert f"`git checkout {commit}` and `git apply {other}/code.patch`" in done.stdout


def test_a_run_of_an_older_version_gets_todays_defaults(first: Path, tmp_path: Path) -> None:
    """Of keys of groups, and of others; not of those that its command line took out."""
    older = copy_of(
        first, tmp_path / "older", {
            "data.crop_on": None, "label_smoothing": None, "optimizer.lr_reference_batch": None,
            "overrides": ["~optimizer.lr_reference_batch"],
        },
    )  # fmt: skip
    done = command("train.py", f"from_run={older}", "dry_run=true", f"hydra.run.dir={tmp_path}/x")
    assert done.returncode == 0, done.stderr
    assert f"note: {older} has no label_smoothing=0.0, data.crop_on=auto: today's defaults.\n" in done.stdout


def test_secrets_are_asked_for(first: Path, tmp_path: Path) -> None:
    """A config from elsewhere must not be given what this machine's environment holds."""
    secret = copy_of(first, tmp_path / "secret", {"logger.wandb.notes": "${oc.env:MY_TOKEN}"})
    done = command("train.py", f"from_run={secret}", f"hydra.run.dir={tmp_path}/x", env={"MY_TOKEN": "hunter2hunter2"})
    assert done.returncode == 2, done.stdout
    assert "secrets are not kept with a run: give logger.wandb.notes=... (there ${oc.env:MY_TOKEN})." in done.stderr


def test_a_run_that_had_gone_on_is_repeated_from_its_start(first: Path, tmp_path: Path) -> None:
    """Its config has its own checkpoint then."""
    other = copy_of(first, tmp_path / "other", {})
    own = str(other / "checkpoints/last.ckpt")
    for words, told in (([], f"as {other}\n"), (["init_from=latest"], "was begun with init_from=latest")):
        change = {"ckpt_path": own, "overrides": ["resume.run=latest", *words]}
        (other / "config.yaml").write_text(yaml.safe_dump({**config_of(first), **change}))
        done = command("train.py", f"from_run={other}", "dry_run=true", f"hydra.run.dir={tmp_path}/x")
        assert told in done.stdout + done.stderr
        assert done.returncode == (2 if words else 0), done.stderr
    gone = {"run_dir": "/gone/run", "ckpt_path": "/gone/run/checkpoints/last.ckpt", "overrides": []}  # it was moved
    (other / "config.yaml").write_text(yaml.safe_dump({**config_of(first), **gone}))
    done = command("train.py", f"from_run={other}", "dry_run=true", f"hydra.run.dir={tmp_path}/x")
    assert (done.returncode, f"as {other}\n" in done.stdout) == (0, True), done.stderr


def test_options_of_another_folder_are_refused(first: Path, tmp_path: Path) -> None:
    (tmp_path / "optimizer").mkdir()
    text = (ROOT / "conf/optimizer/sgd.yaml").read_text()
    (tmp_path / "optimizer/mine.yaml").write_text(text)
    done = command("train.py", "--config-dir", str(tmp_path), f"from_run={first}", "optimizer=mine", "dry_run=true")
    assert done.returncode == 2, done.stdout
    assert "optimizer=mine: conf/optimizer/ has no mine, and what another folder's option sets is not" in done.stderr
    done = command("train.py", "--config-dir", str(tmp_path), "experiment=null", "dry_run=true")
    assert "experiment=null: choose an option by its name: demo, " in done.stderr


def test_sweeps_and_schedulers(first: Path, tmp_path: Path) -> None:
    """A sweep around a run; one job of it again by itself; resume=auto begins that, and goes on with it."""
    sweep = tmp_path / "train/multiruns/s"
    done = command(
        "train.py", "-m", f"from_run={first}", "optimizer.lr=0.01,0.02", "logger=csv", "trainer.max_epochs=1",
        "test=false", f"hydra.sweep.dir={sweep}", f"paths.logs={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"as {first}, but for ") == 2
    assert [config_of(sweep / job)["optimizer"]["lr"] for job in ("0", "1")] == [0.01, 0.02]
    words = ["from_run=s/1", "resume=auto", "test=false", f"paths.logs={tmp_path}", f"hydra.run.dir={tmp_path}/one"]
    done = command("train.py", *words)
    assert done.returncode == 0, done.stderr
    assert equal(sweep / "1", tmp_path / "one") == "equal"
    done = command("train.py", *words)
    assert (done.returncode, "is finished" in done.stdout) == (0, True), done.stderr
