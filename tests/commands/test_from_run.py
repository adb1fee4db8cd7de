"""from_run and from_wandb: the config of an earlier run with the overrides of today, and the same numbers again."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from conftest import command, composed, summary_of, tiny_train
from wandb_server import WandbServer

from alexlab.commands import from_run
from alexlab.engine import config as configs
from alexlab.engine import naming
from alexlab.engine.config import flat
from alexlab.engine.errors import UserError
from alexlab.engine.overrides import put, remove
from alexlab.loggers import wandb_api

FOLDER = "data=folder data.root={data}"
SHUFFLE = f"{FOLDER} model=torchvision model.name=shufflenet_v2_x0_5"


# -- the config, without training


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    for name in ("photos", "other"):
        (tmp_path / name).mkdir()
    return {"data": str(tmp_path / "photos"), "other": str(tmp_path / "other"), "run": str(tmp_path / "runs/then")}


def plain(words: str, folders: dict[str, str]) -> dict[str, Any]:
    """What a plain command line composes."""
    return composed(*words.format(**folders).split())


def save_run(words: str, folders: dict[str, str], change: dict[str, Any] | None = None) -> None:
    """Write the config.yaml of a run with these overrides; None in `change` removes a key."""
    config = plain(words, folders) | {"run_dir": folders["run"]}
    for key, value in (change or {}).items():
        put(config, key, value)
        if value is None:
            remove(config, key)
    Path(folders["run"]).mkdir(parents=True, exist_ok=True)
    configs.save(config, Path(folders["run"], "config.yaml"))


def repeat(words: str, folders: dict[str, str]) -> from_run.Repeated:
    repeated = from_run.repeat(plain(f"from_run={{run}} {words}", folders))
    assert repeated is not None
    return repeated


def settings(config: dict[str, Any]) -> dict[str, Any]:
    own = {"run_dir", "overrides", "paths", "repeats", "from_run", "from_wandb"}
    return {key: value for key, value in flat(config).items() if key.split(".")[0] not in own}


@pytest.mark.parametrize(
    ("words", "more"),
    [
        (SHUFFLE, "++model.pretrained=true model.name=resnet18"),  # model.net.pretrained and model.net.name follow
        (f"{SHUFFLE} model.net.pretrained=false", "++model.pretrained=true"),  # this one was given itself
        (f"{FOLDER} scheduler=plateau optimizer=adamw",
         "monitor=val/loss optimizer=adamw optimizer.betas=[0.8,0.9] ~trainer.tf32 +model.bias_lr_factor=4"),
        (FOLDER + " trainer.max_epochs=2 callbacks=[early_stopping,grad_norm]",
         "callbacks.early_stopping=3 trainer={{max_epochs:3,precision:32-true}}"),
        ("experiment=fashion_mnist debug=limit logger=csv", "experiment=fashion_mnist trainer.max_epochs=7 +my.note=x"),
        (f"{FOLDER} logger=wandb callbacks=grad_norm",  # a list of one option
         "~logger.wandb data.root={other} callbacks=[grad_norm] callbacks.figures=false"),
    ],
)  # fmt: skip
def test_overrides_have_the_same_effect_as_at_the_end_of_the_runs_own_command_line(
    words: str, more: str, folders: dict[str, str]
) -> None:
    save_run(words, folders)
    assert settings(repeat(more, folders).config) == settings(plain(f"{words} {more}", folders))


def test_the_runs_values_count_and_not_the_defaults_of_today(folders: dict[str, str]) -> None:
    """As if conf/ had other values when the run started; a reference is followed all the same."""
    save_run(SHUFFLE, folders, {"optimizer.lr": 0.125, "monitor": "val/acc5"})
    repeated = repeat("model.name=resnet18", folders)
    follows = " (the run has shufflenet_v2_x0_5)"
    changes = f"model.name=resnet18{follows}, model.net.name=resnet18{follows}"
    assert repeated.notes == [f"repeats {folders['run']}, with {changes}"]
    found = repeated.config
    assert (found["optimizer"]["lr"], found["monitor"], found["data"]["root"]) == (0.125, "val/acc5", folders["data"])
    assert (found["repeats"], found["from_run"]) == (folders["run"], None)


def test_overrides_of_the_run_stay_in_its_list_unless_they_are_given_again(folders: dict[str, str]) -> None:
    save_run(f"{SHUFFLE} seed=7 trainer.max_epochs=2", folders)
    made = repeat("seed=8", folders).config["overrides"]
    expected = f"{SHUFFLE} trainer.max_epochs=2 from_run={{run}} seed=8".format(**folders)
    assert made == expected.split()


def test_an_older_run_keeps_its_values_and_gets_no_defaults_of_conf(folders: dict[str, str]) -> None:
    save_run(FOLDER, folders, {"data.num_classes": 5, "model.mean": [0.1, 0.2, 0.3], "data.crop_on": None})
    saved = configs.load(Path(folders["run"], "config.yaml"))
    repeated = repeat("", folders)
    assert settings(repeated.config) == settings(saved)
    assert repeated.notes == [f"repeats {folders['run']}"]


@pytest.mark.parametrize(
    ("words", "more", "message"),
    [
        (FOLDER, "model=alexnet_bn", r"model=alexnet_bn: from_run=\S+ keeps the options of that run \(model=alexnet\)"),
        (FOLDER, "debug=fast", r"debug=fast: .*\(debug=null\). Set single keys instead, as in debug.KEY=VALUE, or"),
        (f"{FOLDER} optimizer=adamw", "optimizer.momentum=0.5",
         r"optimizer.momentum=0.5: \S+ has no optimizer.momentum; \+optimizer.momentum=0.5 adds it"),
        (FOLDER, "resume.run=latest", r"starts a new run, and resume=latest continues one: remove one of them"),
        (FOLDER, "from_wandb=a/b/c", r"from_run=\S+ and from_wandb=a/b/c: only one run can be repeated"),
        (FOLDER, "optimizer.lr=${{seed}}", r"with from_run=\S+ an override cannot refer to another key: give the"),
        (f"{FOLDER} +my.note=x", "my.note={{a:1}}", "has no my.note.a; "),
    ],
)  # fmt: skip
def test_overrides_that_do_not_fit_the_run_are_refused(
    words: str, more: str, message: str, folders: dict[str, str]
) -> None:
    save_run(words, folders)
    today = plain("from_run={run}", folders)
    for text in more.format(**folders).split():
        key, _, value = text.partition("=")
        today["overrides"].append(text)
        if key in ("resume.run", "from_wandb"):
            put(today, key, value)
    with pytest.raises(UserError, match=message):
        from_run.repeat(today)


def test_secrets_of_the_run_are_asked_for(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A config from somebody else gets nothing of this machine's environment."""
    monkeypatch.setenv("MY_TOKEN", "hunter2hunter2")
    save_run(FOLDER, folders)
    path = Path(folders["run"], "config.yaml")
    config = yaml.safe_load(path.read_text())
    config["logger"]["wandb"]["notes"] = "${oc.env:MY_TOKEN}"
    config["my"] = {"c": "see ${oc.env:MY_TOKEN}"}
    path.write_text(yaml.safe_dump(config))
    asked = r"are not saved with a run: add logger.wandb.notes=\.\.\. \(the run has \$\{oc.env:MY_TOKEN\}\), my.c="
    with pytest.raises(UserError, match=asked):
        repeat("", folders)
    repeated = repeat("logger.wandb.notes=mine +my.c=z", folders)
    assert repeated.config["my"] == {"c": "z"}


def test_a_resumed_run_is_repeated_from_its_start(folders: dict[str, str]) -> None:
    own = {"ckpt_path": f"{folders['run']}/checkpoints/last.ckpt"}
    save_run(f"{FOLDER} init_from=/first.ckpt", folders, own)
    found = repeat("", folders).config
    assert (found["ckpt_path"], found["init_from"]) == (None, "/first.ckpt")
    save_run(f"{FOLDER} init_from=latest", folders, own)
    with pytest.raises(UserError, match=r"started from init_from=latest, which was another run then: use that one"):
        repeat("", folders)
    save_run(FOLDER, folders, own)
    moved = Path(folders["run"]).rename(folders["other"] + "/moved")
    folders["run"] = str(moved)
    assert repeat("", folders).config["ckpt_path"] is None


# -- from W&B, without a server


def from_wandb(
    logged: dict[str, Any], words: str, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """The config of from_wandb=a/b/c if W&B has `logged` of that run, as its JSON has it."""
    text = re.sub(r"(\d)\.0\b(?!\.)", r"\1", json.dumps(logged))
    monkeypatch.setattr(wandb_api, "fetch", lambda name: (json.loads(text), {}))
    repeated = from_run.repeat(plain(f"from_wandb=a/b/c {words}", folders))
    assert repeated is not None
    return repeated.config


def test_floats_come_back_from_wandb_as_floats(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = f"{FOLDER} augment.scale=[0.5,1.0] trainer.limit_val_batches=1.0 trainer.limit_train_batches=1"
    then = plain(words, folders) | {"run_dir": "/logs/then"}
    logged = naming.for_others(then)
    assert str(settings(from_wandb(logged, "data.root={data}", folders, monkeypatch))) == str(settings(then))
    logged["floats"] = ["trainer.limit_val_batches", "nowhere.0", "augment.scale.7", "seed.x", 3]
    made = from_wandb(logged, "data.root={data}", folders, monkeypatch)
    assert repr(made["trainer"]["limit_val_batches"]) == "1.0"
    assert made["augment"]["scale"] == [0.5, 1]
    del logged["floats"]
    with pytest.raises(UserError, match=r"one batch and all \(1.0\) alike: add trainer.limit_train_batches=\.\.\. "):
        from_wandb(logged, "data.root={data} trainer.limit_val_batches=1.0", folders, monkeypatch)


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ("init_from=/r/A/checkpoints/best.ckpt", r"add init_from=\.\.\. \(the run has A/best\.ckpt\)\."),
        ("data.class_names=/r/names.tsv", r"add data\.class_names=\.\.\. \(the run has names\.tsv\)\."),
        ("data.class_names=imagenet", None),
    ],
)
def test_paths_of_a_wandb_run_are_asked_for(
    words: str, asked: str | None, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logged = naming.for_others(composed(*f"{FOLDER} {words}".format(**folders).split()))
    with pytest.raises(UserError, match=r"add data.root=\.\.\. \(the run has photos\)"):
        from_wandb(logged, "", folders, monkeypatch)
    if asked is not None:
        with pytest.raises(UserError, match=asked):
            from_wandb(logged, "data.root={data}", folders, monkeypatch)
    key = words.partition("=")[0]
    given = f"{key}={{other}}" if asked is not None else ""
    made = from_wandb(logged, f"data.root={{data}} {given}", folders, monkeypatch)
    assert flat(made)[key] == (folders["other"] if asked is not None else "imagenet")


def test_a_resumed_wandb_run_is_repeated_from_its_start(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed(*FOLDER.format(**folders).split())
    for last in ("last.ckpt", "previous.ckpt"):
        config["ckpt_path"], config["resume"]["run"] = f"{config['run_dir']}/checkpoints/{last}", "latest"
        assert from_wandb(naming.for_others(config), "data.root={data}", folders, monkeypatch)["ckpt_path"] is None


def test_a_server_that_does_not_answer_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B's client raises the same error for a wrong key and for no answer."""

    def api(timeout: float) -> None:
        raise wandb.errors.AuthenticationError("no")

    monkeypatch.setattr(wandb, "Api", api)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    message = r"`from_wandb=a/b/c`: the server did not answer or refused the API key \(no\): run `wandb login`, or try"
    with pytest.raises(UserError, match=message):
        wandb_api.fetch("a/b/c")


# -- the whole command


SETTINGS = [
    "seed=7", "augment=strong", "optimizer=adamw", "optimizer.lr=0.002", "trainer.max_epochs=2",
    "trainer.limit_val_batches=1.0", "trainer.log_every_n_steps=1",
]  # fmt: skip


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
    done = command("compare", f"runs=[{a},{b}]", "equal=true")
    return done.stdout + done.stderr if done.returncode else "equal"


def test_a_repeated_run_has_the_same_numbers(first: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    done = command("train.py", "from_run=first", logs_of(first), f"hydra.run.dir={again}")
    assert done.returncode == 0, done.stderr
    assert f"repeats {first}\n" in done.stdout
    assert "warning: " not in done.stdout
    assert equal(first, again) == "equal"
    a, b = summary_of(first), summary_of(again)
    assert (a["best"], a["test"]) == (b["best"], b["test"])
    assert settings(config_of(first)) == settings(config_of(again))
    assert config_of(again)["repeats"] == str(first)
    assert f"repeats {first}" in (again / "train.log").read_text()
    third = tmp_path / "third"  # repeats a repetition
    done = command("train.py", f"from_run={again}", "seed=8", f"hydra.run.dir={third}", logs_of(first))
    assert done.returncode == 0, done.stderr
    assert f"repeats {again}, with seed=8 (the run has 7)\n" in done.stdout
    assert "differ first at step" in equal(first, third)


def test_a_resumed_run_keeps_where_it_started(first: Path, shapes: Path, tmp_path: Path) -> None:
    """Also if a yaml named it, and not the command line."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/starts.yaml").write_text(f"# @package _global_\ninit_from: {first}\n")
    run_dir, further = tmp_path / "run", ["--config-dir", str(tmp_path)]
    done = tiny_train(shapes, run_dir, *further, "experiment=starts", "trainer.max_epochs=1")
    assert done.returncode == 0, done.stderr
    start = config_of(run_dir)["init_from"]
    assert start == str(first / "checkpoints/best.ckpt")
    done = command("train.py", f"resume={run_dir}", "trainer.max_epochs=2")
    assert done.returncode == 0, done.stderr
    assert "initial weights: " not in done.stdout, "the checkpoint has them"
    assert config_of(run_dir)["init_from"] == start
    again = command("train.py", f"from_run={run_dir}", "dry_run=true", logs_of(first))
    assert again.returncode == 0, again.stderr
    assert f"initial weights: {start}" in again.stdout

    # ckpt_path of another run
    (tmp_path / "experiment/starts.yaml").write_text(f"# @package _global_\nckpt_path: {run_dir}\n")
    second, words = tmp_path / "second", ["experiment=starts", "trainer.max_epochs=3"]
    done = tiny_train(shapes, second, *further, *words)
    assert done.returncode == 0, done.stderr
    done = command("train.py", f"resume={second}", "trainer.max_epochs=4")
    assert done.returncode == 0, done.stderr
    assert f"ckpt_path={run_dir}/checkpoints/last.ckpt" in config_of(second)["overrides"]
    done = command("train.py", f"resume={second}", "trainer.max_epochs=5", "dry_run=true")
    assert done.returncode == 0, done.stderr


def test_a_repeated_wandb_run_has_the_same_numbers(
    server: WandbServer, first: Path, shapes: Path, tmp_path: Path
) -> None:
    again, name = tmp_path / "again", server.run_of("first").name
    words = [f"from_wandb=tester/alexlab/{name}", "~logger.wandb", f"hydra.run.dir={again}", f"data.root={shapes}"]
    done = command("train.py", *words, env=server.env())
    assert done.returncode == 0, done.stderr
    assert f"repeats tester/alexlab/{name}, with " in done.stdout
    assert "warning: " not in done.stdout
    assert equal(first, again) == "equal"
    then, now = (
        {k: v for k, v in settings(config_of(run)).items() if "logger" not in k.split(".")[0]} for run in (first, again)
    )
    assert now == then
    assert isinstance(now["trainer.limit_val_batches"], float), "all batches, and not one"
    assert {line.partition(":")[0] for line in server.unknown} <= {"ServerFeaturesQuery"}
    done = command("train.py", "from_wandb=tester/alexlab/none", f"hydra.run.dir={tmp_path}/x", env=server.env())
    assert done.returncode == 2, done.stdout
    assert "`from_wandb=tester/alexlab/none`: the server did not return that run (Could not find run" in done.stderr
    assert "from_run=DIRECTORY" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["from_run=nowhere"], "`from_run=nowhere` is not a run's directory"),
        (["from_run=first", "data.root=/nowhere"], "`data.root=/nowhere` does not exist"),
        (["from_run=first", "model=alexnet_bn"], "model=alexnet_bn: from_run=first keeps the options of that run"),
        (["from_wandb=a/b/c"], "`from_wandb=a/b/c` needs an API key: run `wandb login`"),
    ],
)
def test_mistakes_leave_no_directory(words: list[str], message: str, first: Path) -> None:
    done = command("train.py", *words, logs_of(first))
    assert done.returncode == 2, done.stdout
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in first.parent.iterdir()] == ["first"]


def test_other_images_and_other_code_are_reported(first: Path, shapes: Path, tmp_path: Path) -> None:
    less = tmp_path / "less"
    shutil.copytree(shapes, less)
    next((less / "train").glob("*/*.jpg")).unlink()
    other = tmp_path / "other"
    shutil.copytree(first, other, ignore=shutil.ignore_patterns("wandb"))
    commit = "0123456789abcdef" * 2 + "01234567"
    code = {"commit": commit, "dirty": True, "patch_sha256": "1" * 64, "left_out": None}
    (other / "code.json").write_text(json.dumps(code))
    done = command("train.py", f"from_run={other}", f"data.root={less}", "dry_run=true", f"hydra.run.dir={tmp_path}/x")
    assert done.returncode == 0, done.stderr
    differ = f"warning: the images differ from those of {other}: train 39 images with another fingerprint."
    assert differ in done.stdout
    assert f"warning: the code cannot be compared with that of {other} (commit {commit}): " in done.stdout
    assert f"`git checkout {commit}` and `git apply {other}/code.patch`" in done.stdout


def test_a_sweep_around_a_run_and_one_of_its_jobs_again(first: Path, tmp_path: Path) -> None:
    """resume=auto starts that repetition, and finds it finished the second time."""
    sweep = tmp_path / "train/multiruns/s"
    done = command(
        "train.py", "-m", f"from_run={first}", "optimizer.lr=0.01,0.02", "~logger.wandb", "trainer.max_epochs=1",
        "test=false", f"hydra.sweep.dir={sweep}", f"paths.logs={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"repeats {first}, with ") == 2
    assert [config_of(sweep / job)["optimizer"]["lr"] for job in ("0", "1")] == [0.01, 0.02]
    words = ["from_run=s/1", "resume=auto", "test=false", f"paths.logs={tmp_path}", f"hydra.run.dir={tmp_path}/one"]
    done = command("train.py", *words)
    assert done.returncode == 0, done.stderr
    assert equal(sweep / "1", tmp_path / "one") == "equal"
    done = command("train.py", *words)
    assert (done.returncode, "is finished" in done.stdout) == (0, True), done.stderr
