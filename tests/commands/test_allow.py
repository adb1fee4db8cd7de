"""Consent: which packages the config of a run may name, and where that is written."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, clean_env, command, summary_of

import alexlab
from alexlab.engine.errors import UserError

PARTS = """
import torch
from pytorch_lightning import Callback


class Net(torch.nn.Module):
    def __init__(self, num_classes, width=4):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, width, 3, 2)
        self.head = torch.nn.Linear(width, num_classes)

    def forward(self, images):
        return self.head(self.conv(images).relu().mean((2, 3)))


class Sgd(torch.optim.SGD):
    pass


class Count(Callback):
    def on_train_batch_end(self, trainer, *_):
        print("counted", trainer.global_step, flush=True)
"""
# Tells which process has imported the package.
INIT = (
    "import os\nfrom pathlib import Path\nPath(__file__).with_name('imported').open('a').write(f'{os.getpid()}\\n')\n"
)
OPTIONS = {
    "model/mine.yaml": "name: mine\nmean: [0.5, 0.5, 0.5]\nstd: [0.5, 0.5, 0.5]\n"
    "net: {_target_: mypkg.parts.Net, width: 3}\n",
    "optimizer/mine.yaml": "_target_: mypkg.parts.Sgd\nlr: 0.01\n",
    "callbacks/mine.yaml": "count: {_target_: mypkg.parts.Count}\n",
}
OWN = ["model=mine", "optimizer=mine", "callbacks=[early_stopping,mine]"]
SMALL = ["data=folder", "data.image_size=64", "data.batch_size=8", "data.num_workers=0", "logger=csv"]
SMALL += ["trainer.accelerator=cpu", "trainer.max_epochs=1", "trainer.limit_train_batches=2", "callbacks.figures=false"]
REFUSED = (
    r"_target_=mypkg.parts.\w+ is not allowed: in a config that is loaded from a run, .* If you trust this run and "
    r"mypkg, add allow=\[mypkg\], here or in conf/allow.yaml"
)


class Home:
    """A folder outside of the repository with a package, options, and runs that were trained with them."""

    def __init__(self, path: Path, shapes: Path) -> None:
        self.path, self.runs, self.conf = path, path / "logs/train/runs", path / "MYCONF"
        self.imported, self.image = path / "mypkg/imported", next((shapes / "val").rglob("*.jpg"))
        self.job = [*SMALL, f"data.root={shapes}", "--config-dir", str(self.conf), *OWN]
        for name, text in OPTIONS.items():
            (self.conf / name).parent.mkdir(parents=True)
            (self.conf / name).write_text(text)
        (path / "mypkg").mkdir()
        (path / "mypkg/__init__.py").write_text(INIT)
        (path / "mypkg/parts.py").write_text(PARTS)
        (path / "on_path.py").write_text(f"import sys\nsys.path.append({str(path)!r})\n")

    def command(self, *words: str, ranks: int = 0) -> subprocess.CompletedProcess:
        """Run a command with the package on the path, as with PYTHONPATH, in a fork of a process that has torch."""
        return command(*words, f"paths.logs={self.path}/logs", before=self.path / "on_path.py", ranks=ranks)

    def state(self) -> dict[str, tuple[int, int]]:
        """Every file, with size and time."""
        found = (path for path in self.path.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in found}

    def assert_refused(self, done: subprocess.CompletedProcess, before: dict[str, tuple[int, int]]) -> None:
        assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
        assert re.search(REFUSED, done.stderr), done.stderr
        assert self.state() == before, "nothing is written, and the package is not imported"


@pytest.fixture(scope="module")
def home(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Home:
    """The run `mine` was trained with PYTHONPATH as a user does, without any consent."""
    path = tmp_path_factory.mktemp("outside")
    home, more = Home(path, shapes), {"PYTHONPATH": str(path)}
    words = ["train.py", *home.job, f"paths.logs={path}/logs", f"hydra.run.dir={home.runs}/mine"]
    done = command(*words, env=more)
    assert done.returncode == 0, done.stderr
    assert "counted 2\n" in done.stdout
    assert summary_of(home.runs / "mine")["status"] == "finished"
    return home


@pytest.fixture
def mine(home: Home, request: pytest.FixtureRequest) -> Path:
    """A copy of the run `mine`."""
    name = re.sub(r"\W", "_", request.node.name)[5:]
    return shutil.copytree(home.runs / "mine", home.runs / name)


def test_the_same_command_line_trains_and_resumes_without_consent(home: Home, mine: Path) -> None:
    words = ["train.py", *home.job, "resume=auto", "trainer.max_epochs=2", f"hydra.run.dir={mine}"]
    done = home.command(*words)
    assert done.returncode == 0, done.stderr
    assert "counted 4\n" in done.stdout
    assert yaml.safe_load((mine / "config.yaml").read_text())["callbacks"]["count"] == {"_target_": "mypkg.parts.Count"}


def test_the_same_options_start_from_the_weights_of_such_a_run_without_consent(home: Home, mine: Path) -> None:
    done = home.command("train.py", *home.job, f"init_from={mine}", "dry_run=true")
    assert done.returncode == 0, done.stderr
    assert "initial weights: " in done.stdout


COMMANDS = [
    ["train.py", "resume={run}", "trainer.max_epochs=2"],
    ["train.py", "from_run={run}", "hydra.run.dir={run}-again"],
    ["eval.py", "run={run}"],
    ["predict", "run={run}", "images={image}"],
    ["figures", "run={run}", "among=0"],
    ["export", "run={run}", "format=torch_export"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: f"{words[0]} {words[1].split('=')[0]}")
def test_a_command_that_loads_the_run_needs_consent(words: list[str], home: Home, mine: Path) -> None:
    """The run's own config.yaml cannot give it: anybody may have written that."""
    config = yaml.safe_load((mine / "config.yaml").read_text())
    (mine / "config.yaml").write_text(yaml.safe_dump(config | {"allow": ["mypkg"]}, sort_keys=False))
    words = [word.format(run=mine, image=home.image) for word in words]
    before = home.state()
    for more in ([], ["allow=[otherpkg]"]):
        home.assert_refused(home.command(*words, *more), before)
    done = home.command(*words, "allow=[mypkg]")
    assert done.returncode == 0, done.stderr
    assert home.imported.read_text().count("\n") > before[str(home.imported)][0] // 12


def test_consent_for_one_command_is_none_for_the_next(home: Home, mine: Path) -> None:
    """A resumed run records `allow`, and its config.yaml still allows nothing."""
    done = home.command("train.py", f"resume={mine}", "trainer.max_epochs=2", "allow=[mypkg]")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((mine / "config.yaml").read_text())["allow"] == ["mypkg"]
    before = home.state()
    home.assert_refused(home.command("train.py", f"resume={mine}", "trainer.max_epochs=3"), before)
    home.assert_refused(home.command("train.py", f"from_run={mine}", f"hydra.run.dir={mine}-again"), before)


def test_a_checkpoint_can_name_no_more_than_the_config_of_its_run(home: Home) -> None:
    """Whatever both say themselves."""
    run = home.runs / "plain"
    words = ["train.py", *home.job, "model=torchvision", "model.name=shufflenet_v2_x0_5", "optimizer=sgd"]
    done = home.command(*words, "callbacks=default", f"hydra.run.dir={run}")
    assert done.returncode == 0, done.stderr
    last = run / "checkpoints/last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["alexlab"]["config"]["model"]["net"] = {"_target_": "mypkg.parts.Net"}
    torch.save(checkpoint, last)
    (run / "checkpoints/SHA256SUMS").unlink()
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"allow": ["mypkg"]}, sort_keys=False))
    home.assert_refused(home.command("train.py", f"resume={run}", "trainer.max_epochs=2"), home.state())


def test_load_needs_consent(home: Home, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(home.path))
    before = home.state()
    with pytest.raises(UserError, match=REFUSED):
        alexlab.load(mine)
    assert home.state() == before
    try:
        net, transform, classes = alexlab.load(mine, allow=["mypkg"])
    finally:
        for name in ("mypkg", "mypkg.parts"):
            sys.modules.pop(name, None)
    assert net(transform(home.image)[None]).shape == (1, len(classes))


def test_consent_in_the_folder_of_config_dir(home: Home, mine: Path) -> None:
    file = home.path / "consent/allow.yaml"
    file.parent.mkdir()
    words = ["eval.py", f"run={mine}", "--config-dir", str(file.parent)]
    file.write_text("allow: [otherpkg]\n")
    home.assert_refused(home.command(*words), home.state())
    for text in ("allow: mypkg\n", "# Nothing.\n"):
        file.write_text(text)
        before = home.state()
        done = home.command(*words)
        assert done.returncode == 2
        assert f"error: {file} must hold a list of packages, as in `allow: [mypkg]`." in done.stderr
        assert home.state() == before
    file.write_text("allow: [mypkg]\n")
    done = home.command(*words)
    assert done.returncode == 0, done.stderr


def test_consent_in_the_projects_conf(home: Home, mine: Path, tmp_path: Path) -> None:
    """For every command, and for notebooks. The project is a copy."""
    for name in ("src", "conf"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copy(ROOT / "eval.py", tmp_path)
    env = clean_env({"PYTHONPATH": f"{tmp_path}/src:{home.path}"})
    load = f"import alexlab; print(type(alexlab.load({str(mine)!r}).net).__name__)"
    commands = [["eval.py", f"run={mine}", f"paths.logs={home.path}/logs"], ["-c", load]]

    def run(words: list[str]) -> subprocess.CompletedProcess:
        words = [sys.executable, *words]
        return subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=200)

    before = home.state()
    for words in commands:
        done = run(words)
        assert done.returncode != 0
        assert re.search(REFUSED, done.stderr), done.stderr
        assert home.state() == before
    text = (tmp_path / "conf/allow.yaml").read_text()
    assert text.count("allow: []") == 1
    (tmp_path / "conf/allow.yaml").write_text(text.replace("allow: []", "allow: [mypkg]"))
    for words in commands:
        done = run(words)
        assert done.returncode == 0, done.stderr
    assert done.stdout == "Net\n"


def test_the_ranks_of_a_run_have_the_same_permission(home: Home, mine: Path) -> None:
    """Of processes that the run starts itself, with PYTHONPATH, and of those of torchrun."""
    env, logs = {"PYTHONPATH": str(home.path)}, f"paths.logs={home.path}/logs"
    two = ["trainer.devices=2", "trainer.strategy=ddp"]
    done = command("train.py", *home.job, *two, logs, f"hydra.run.dir={mine}-two", env=env)
    assert done.returncode == 0, done.stderr
    assert summary_of(Path(f"{mine}-two"))["world_size"] == 2
    words = ["train.py", f"resume={mine}-two", "trainer.max_epochs=2"]
    before = home.state()
    home.assert_refused(home.command(*words, ranks=2), before)
    done = command(*words, "allow=[mypkg]", env=env)
    assert done.returncode == 0, done.stderr
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", words[0], f"resume={mine}-two"]
    done = command(*torchrun, "trainer.max_epochs=3", "allow=[mypkg]", env=env)
    assert done.returncode == 0, done.stderr
    assert summary_of(Path(f"{mine}-two"))["status"] == "finished"


def test_comparing_never_imports_the_package(home: Home, mine: Path) -> None:
    before = home.imported.read_bytes()
    for words in (
        ["compare", f"runs={home.runs}"],
        ["compare", f"runs={home.runs}", "format=html"],
        ["dashboard", "dry_run=true"],
    ):
        done = home.command(*words, "--config-dir", str(home.conf))
        assert done.returncode == 0, done.stderr
        assert home.imported.read_bytes() == before
    code = f"import alexlab; assert len(alexlab.runs({str(home.runs)!r})) > 1"
    done = command("-c", code, env={"PYTHONPATH": str(home.path)})
    assert done.returncode == 0, done.stderr
    assert home.imported.read_bytes() == before
