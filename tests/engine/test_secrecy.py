"""Canaries: what must not be found in a run's directory, on W&B, or in what is printed."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TINY, command, tiny_train
from omegaconf import OmegaConf
from wandb_server import KEY, WandbServer, wandb_server

from alexlab.engine import config as configs
from alexlab.engine import secrecy
from alexlab.engine.errors import UserError

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
    assert command("eval.py", f"run={tmp_path / 'run'}").returncode == 0, "it needs no secret"
    without = command("train.py", f"resume={tmp_path / 'run'}", "trainer.max_epochs=3")
    assert without.returncode == 2
    assert "config.yaml needs the environment variable HF_TOKEN, a secret that the run was given: set" in without.stderr


def test_no_canary_in_what_a_failed_run_leaves(shapes: Path, tmp_path: Path) -> None:
    """Also in a job of a sweep, whose directory is made when it fails."""
    words = ["data.root='/no/${oc.env:AWS_SECRET_ACCESS_KEY}'", "data=folder", f"paths.logs={tmp_path / 'logs'}"]
    for code, *more in ((2,), (2, "-m", "seed=1,2"), (1, "-m", "seed=1,2", "sweep.keep_going=true")):
        done = command("train.py", *words, *map(str, more), env=CANARIES)
        assert done.returncode == code
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
    for name, value in {
        **CANARIES,
        "DATA_KEY": str(tmp_path),
        "SHORT_TOKEN": "false",
        "PLAIN": "canary-of-no-secret1",
    }.items():
        monkeypatch.setenv(name, value)
    token = CANARIES["HF_TOKEN"]
    nested = {
        "a": [f"x{token}y", 3],
        "overrides": [f"b={token}"],
        "b": {"api-key": "abcdefgh", "password2": 123456},
        token: 1,
    }
    assert secrecy.hidden(nested) == {
        "a": ["x${oc.env:HF_TOKEN}y", 3], "overrides": ["b=${oc.env:HF_TOKEN}"],
        "b": {"api-key": "***", "password2": "***"}, "${oc.env:HF_TOKEN}": 1,
    }  # fmt: skip
    assert secrecy.hidden({"n": "http://me:x@proxy, false"}) == {"n": "http://me:***@proxy, false"}
    assert secrecy.masked(f"{tmp_path} false canary-of-no-secret1") == f"{tmp_path} false canary-of-no-secret1"
    harmless = {
        "class_token": "learnable", "token": "first-last", "url": "https://host/a:b@c", "key": "x" * 9,
        "n": "canary-of-no-secret1",
        "url2": "https://me@host/x", "global_pool": "token", "use_token": True, "tokens": 196,
    }  # fmt: skip
    assert secrecy.mistakes(harmless) == []
    assert secrecy.hidden(harmless) == harmless
    assert secrecy.mistakes({"api_key": token}) == [], "from the environment"


@pytest.mark.parametrize(
    "word",
    [
        "+a.api_key=abcdefgh", "+a.secret_key=abcdefgh", "+a.private_key=abcdefgh", "+a.passphrase=abcdefgh",
        "+a.token=abcdefgh12345678", "+a={password: hunter22, x: 1}", "+a.b={c: {api-key: abcdefgh}}",
        "data.root=redis://:passw0rd99@host", "data.root=https://ghp_0123456789abcdef@github.com/x",
        "data.root=https://host/x?token=0123456789abcdef", "hydra.job.env_set={WANDB_API_KEY: 0123456789abcdef}",
        "+a.api_keys=[abcdefgh]", "+a.Authorization=abcdefgh", "+a.password=12345678",
        "+a.password='[abcdefgh]'", "+a.password='a,b,cdefgh'", "+a.password='{abcdefgh}'", "+a.password=abcdefgh,b",
        "data.root=https://me:p@ss/w0rd@host/x", "data.root=https://me:pa/ssw0rd1@host/x",
        "data.root=https://host/x?password=hunter22", "data.root=https://host/x?apikey=0123456789abcdef",
        "data.root=https://host/x?X-Amz-Signature=0123456789abcdef", "+a.wandb_key=0123456789abcdef0123",
        "+a.HF_TOKEN=hf_abcdefghijklmnopqrst", "+a.pass=hunter22", "+a.pwd=hunter22", "+a.passcode=hunter22",
        "+a.access_key_id=AKIA0123456789abcdef", "+a.apiKey=abcdefgh", "+a.password=1234567.5",
    ],
)  # fmt: skip
def test_words_with_secrets(word: str) -> None:
    (told,) = secrecy.mistakes_in([word])
    assert "a secret on the command line is seen by all" in told
    assert not re.search(r"abcdefgh|passw0rd99|0123456789abcdef|12345678|hunter22", told)


@pytest.mark.parametrize(
    "word",
    [
        "+a.api_key=${oc.env:MINE}", "+a.token='Bearer ${oc.env:MY_TOKEN}'", "model.net.class_token=true", "a.b={c: 1}",
        "data.root=/data/key:1/x", "optimizer.lr=0.1", "trainer.devices=[0,1]",
        "logger.wandb.notes='see: password reset'", "+model.net.compat=torchvision_0_13_plus",
        "+model.net.cls_token=learnable_embedding_v2", "+a.notes='lr 0.1, password: see wiki'", "+a.key_dim=64",
        "logger.wandb.notes='first try, secret: none'", "+a.num_keys=3", "+a.compass=northwest",
        "data.root=https://host:8080/a:b@c", "data.root=https://host/x?page=0123456789abcdef",
    ],
)  # fmt: skip
def test_words_without(word: str) -> None:
    assert secrecy.mistakes_in([word]) == []


def test_secrets_of_other_forms() -> None:
    for plain, shown in (
        ({"url": "https://me:p@ss@host/x"}, {"url": "https://me:***@host/x"}),
        ({"url": "https://me:pa/ss@host/x"}, {"url": "https://me:***@host/x"}),
        ({"url": "postgres://u:pw@h1,https://a:b@c"}, {"url": "postgres://u:***@h1,https://a:***@c"}),
        ({"url": "https://host/x?password=hunter22&y=1"}, {"url": "https://host/x?password=***&y=1"}),
        ({"password": 1234567.5}, {"password": "***"}),
        ({"password": {"value": "abcdefgh"}}, {"password": {"value": "***"}}),
    ):
        assert secrecy.hidden(plain) == shown
        assert len(secrecy.mistakes(plain)) == 1
    words = {"overrides": ["+a.password='[abcdefgh]'", "seed=1"]}
    assert secrecy.hidden(words) == {"overrides": ["+a.password=***", "seed=1"]}
    assert secrecy.hidden({"per_class_acc1": {"password": 0.1234}}) == {"per_class_acc1": {"password": 0.1234}}


NAMED = {"PGPASSWORD": "canarycanary77pg", "MY_TOKENS": "pluralcanarysecret", "MY_PASSWORD": "correcthorsebatt",
         "B_TOKEN": "innernodigitssecret", "SHORT_TOKEN": "tok1234"}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("see ${oc.env:PGPASSWORD}", "PGPASSWORD"),
        ("${oc.env:MY_TOKENS}", "MY_TOKENS"),
        ('${oc.env:"MY_PASSWORD"}', "MY_PASSWORD"),
        ("${oc.env:NOPE_X,${oc.env:B_TOKEN}}", "B_TOKEN"),
        ("a ${oc.env: SHORT_TOKEN, x}", "SHORT_TOKEN"),
    ],
)
def test_references_of_any_form(text: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(secrecy, "used", set())
    monkeypatch.setattr(secrecy, "places", {})
    for each, value in NAMED.items():
        monkeypatch.setenv(each, value)
    config = OmegaConf.create({"notes": text, "model": {"name": "${notes}", "other": f"{NAMED[name]}-1"}})
    secrecy.note(OmegaConf.to_container(config))
    configs.save(config, tmp_path / "config.yaml")
    kept = OmegaConf.to_container(OmegaConf.load(tmp_path / "config.yaml"))
    assert kept["notes"] == kept["model"]["name"]  # type: ignore[index, call-overload]
    assert f"${{oc.env:{name}}}" in kept["notes"]  # type: ignore[operator, call-overload, index]
    assert NAMED[name] not in kept["notes"]  # type: ignore[operator, call-overload, index]
    assert kept["model"]["other"] == f"{NAMED[name]}-1", "not referred to there"  # type: ignore[index, call-overload]
    assert NAMED[name] not in secrecy.masked(f"in a log {NAMED[name]}")
    assert [word.split("=")[0] for word in configs.withheld(config)] == ["model.name"]


def test_a_setting_that_a_variable_has_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays in the config, in its words and in the log, whose reader needs it, and may be given."""
    name = "shufflenet_v2_x0_5"
    monkeypatch.setenv("EXPERIMENT_KEY", name)
    monkeypatch.setenv("MODEL_TOKEN", f"{name}_a1b2c3d4e5f6g7")
    plain = {
        "model": {"name": name, "net": {"name": name, "tag": f"{name}_a1b2c3d4e5f6g7"}}, "logger": {"name": name},
        "overrides": [f"model.name={name}"], "data": {"root": f"/x/{name}"},
    }  # fmt: skip
    assert secrecy.hidden(plain) == plain
    assert secrecy.hidden({"config": plain, "classes": [f"{name}_a1b2c3d4e5f6g7"]}) == {
        "config": plain, "classes": [f"{name}_a1b2c3d4e5f6g7"],
    }  # fmt: skip
    assert configs.told(configs.create(plain).model) == plain["model"]
    assert secrecy.masked(f"training {name}") == f"training {name}"
    assert secrecy.mistakes_in([f"model.name={name}"]) == []


def test_a_known_secret_that_the_shell_put_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary0123456789abcdef")
    monkeypatch.setenv("MY_PASSWORD", "correcthorsebatt")
    for word, name in (
        ('logger.wandb.notes="see hf_canary0123456789abcdef"', "HF_TOKEN"),
        ("data.root=/x/hf_canary0123456789abcdef", "HF_TOKEN"),
        ("logger.wandb.notes='see correcthorsebatt'", "MY_PASSWORD"),
    ):
        (told,) = secrecy.mistakes_in([word])
        assert f"it holds the value of the environment's {name}: a secret on the command line is seen by all" in told
        assert f"give {word.split('=')[0]}='${{oc.env:{name}}}'" in told
        assert "canary" not in told
    assert secrecy.mistakes_in(["data.root=/data/correcthorsebatt"]) == []


def test_words_that_refer_to_other_keys(tmp_path: Path) -> None:
    """As they were given they are kept, and not resolved where the list of words lies."""
    word = "model.net.name=${..name}"
    done = command("train.py", *TINY, word, f"hydra.run.dir={tmp_path / 'run'}", "data=folder", "data.root=/nowhere")
    assert done.returncode == 2
    assert done.stderr == "error: /nowhere does not exist: give the folder of the images with data.root=PATH.\n"
    plain = {"overrides": [word, "a=\\\\${b}", "${oc.env:HOME}"]}
    configs.save(configs.create(plain), tmp_path / "config.yaml")
    assert configs.plain(configs.load(tmp_path / "config.yaml")) == plain


def test_a_run_that_goes_on_gets_no_secret_for_its_callbacks(shapes: Path, tmp_path: Path) -> None:
    run_dir, out = tmp_path / "run", tmp_path / "out"
    done = tiny_train(shapes, run_dir, "test=false")
    assert done.returncode == 0, done.stderr
    config = OmegaConf.load(run_dir / "config.yaml")
    target = "pytorch_lightning.callbacks.ModelCheckpoint"
    config.callbacks.mc = {"_target_": target, "dirpath": f"{out}/${{oc.env:AWS_SECRET_ACCESS_KEY}}"}
    OmegaConf.save(config, run_dir / "config.yaml")
    words = ["train.py", f"resume={run_dir}", "trainer.max_epochs=2"]
    done = command(*words, env=CANARIES)
    assert done.returncode == 2
    assert f"callbacks.mc.dirpath of {run_dir} refers to the environment: a run that may come from" in done.stderr
    assert "give it again: 'callbacks.mc.dirpath=${oc.env:AWS_SECRET_ACCESS_KEY}'" in done.stderr
    assert not out.exists()
    done = command(*words, f"+callbacks.mc.dirpath='{out}/${{oc.env:HF_TOKEN}}'", env=CANARIES)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in out.iterdir()] == [CANARIES["HF_TOKEN"]]
    assert CANARIES["HF_TOKEN"] not in (run_dir / "config.yaml").read_text()


def test_harmless_values_that_a_variable_has_too_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATASET_KEY", "shufflenet_v2_x0_5")
    monkeypatch.setenv("DB_PASSWORD", "alice1234")
    plain = {"model": {"name": "shufflenet"}, "data": {"root": "/home1/alice1234/photos"}}
    assert secrecy.hidden(plain) == plain


def test_a_secret_by_any_name_that_the_config_refers_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ITS_NAME", "abcdefgh")
    monkeypatch.setenv("DB_URL", "https://me:hunter22@host/x")
    monkeypatch.setattr(secrecy, "used", {"ITS_NAME", "DB_URL"})
    plain = {"a": {"api_key": "abcdefgh"}, "b": "see https://me:hunter22@host/x"}
    assert secrecy.mistakes(plain) == []
    assert secrecy.hidden(plain) == {"a": {"api_key": "${oc.env:ITS_NAME}"}, "b": "see ${oc.env:DB_URL}"}


def test_texts_in_which_a_secret_is_written_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", 'can\\ary-"back 1')
    monkeypatch.setenv("PEM_KEY", "-----BEGIN\nabcdefgh12\n-----END")
    for text in ('can\\ary-"back 1', repr('can\\ary-"back 1'), '"can\\\\ary-\\"back 1"', "can%5Cary-%22back%201"):
        assert "back" not in secrecy.masked(f"Error: {text}.")
    assert secrecy.masked("line abcdefgh12") == "line ${oc.env:PEM_KEY}"


def test_no_canary_in_a_traceback(shapes: Path, tmp_path: Path) -> None:
    """Of a mistake that is none of ours: Lightning's own, alone, on two ranks and in a sweep."""
    target = "pytorch_lightning.callbacks.ModelCheckpoint"
    words = f"+callbacks.mc={{_target_: {target}, dirpath: x, monitor: '${{oc.env:HF_TOKEN}}'}}"
    for more in ([], ["trainer=ddp_cpu"], ["-m", "seed=1,2"]):
        done = tiny_train(shapes, tmp_path / "run", words, f"paths.logs={tmp_path}", *more, env=CANARIES)
        assert done.returncode != 0
        assert "${oc.env:HF_TOKEN}" in done.stderr
        assert CANARIES["HF_TOKEN"] not in done.stdout + done.stderr
        assert hits(tmp_path) == []
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_a_saved_config_finds_its_secrets_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARIES["HF_TOKEN"])
    path = tmp_path / "config.yaml"
    configs.save(configs.create({"a": CANARIES["HF_TOKEN"], "b": {"c": CANARIES["HF_TOKEN"]}}), path)
    assert path.read_text() == "a: ${oc.env:HF_TOKEN}\nb:\n  c: ${oc.env:HF_TOKEN}\n"
    assert configs.plain(configs.load(path, secrets=lambda key: key == "a")) == {
        "a": CANARIES["HF_TOKEN"], "b": {"c": "${oc.env:HF_TOKEN}"},
    }  # fmt: skip
    monkeypatch.delenv("HF_TOKEN")
    assert configs.load(path).a == "${oc.env:HF_TOKEN}", "eval.py needs none"
    with pytest.raises(UserError, match=r"config.yaml needs the environment variable HF_TOKEN, a secret that the run"):
        configs.load(path, secrets=lambda key: True)


@pytest.mark.parametrize("value", ["a${b}c", "\\${b}", "\\\\${b}", "${", "${oc.env:HOME}", "plain"])
def test_texts_that_look_like_interpolations(value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a value, a secret's too, that has them by chance: nothing is resolved, however often it is copied."""
    config = configs.create({"a": value, "data": {"root": "/x"}})
    assert configs.plain(configs.resolved(configs.create(configs.plain(config))))["a"] == value
    monkeypatch.setenv("MY_TOKEN", f"abcdefgh{value}")
    monkeypatch.setattr(secrecy, "used", {"MY_TOKEN"})
    configs.save(configs.create({"a": f"abcdefgh{value}"}), tmp_path / "config.yaml")
    assert configs.load(tmp_path / "config.yaml", secrets=lambda key: True).a == f"abcdefgh{value}"


@pytest.mark.parametrize("text", ["${nothing}", "${oc.create:{_target_: x}}", "${made:/tmp/x}", "${oc.env:A,b}", "${a"])
def test_a_config_that_refers_to_other_things(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"a: '{text}'\n")
    with pytest.raises(UserError, match=r"config.yaml is not a run's config: \$\{.* is nothing that one refers to"):
        configs.load(tmp_path / "config.yaml")
