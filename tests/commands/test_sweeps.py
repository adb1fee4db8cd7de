"""Grids: the jobs are Hydra's, each is checked before the first one starts, and each rank has its job's values."""

import re
from pathlib import Path
from types import SimpleNamespace

import hydra
import pytest
import yaml
from conftest import ROOT, SMALL_NET, command, summary_of
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from alexlab.commands import sweep
from alexlab.engine.errors import UserError
from hydra_plugins.alexlab_sweepers import CheckedSweeper


@pytest.fixture
def sweeper(tmp_path: Path) -> CheckedSweeper:
    """A grid of train.py that records the jobs instead of running them."""
    GlobalHydra.instance().clear()
    made = CheckedSweeper(OmegaConf.create({"seed": "0,1", "optimizer.lr": 0.1}))
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        made.hydra_context = SimpleNamespace(config_loader=GlobalHydra.instance().config_loader())  # type: ignore[assignment]
    basic = {"launcher": {"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"}}
    made.config = OmegaConf.create({"sweep": {"keep_going": True}, "dry_run": False, "hydra": basic})
    made.folder = tmp_path
    jobs: list[list[str]] = []

    def launch(batch: list[list[str]], initial_job_idx: int) -> list[SimpleNamespace]:
        assert initial_job_idx == len(jobs)
        jobs.extend(batch)
        return [SimpleNamespace(return_value=sweep.End()) for _ in batch]

    made.launcher = SimpleNamespace(launch=launch, jobs=jobs)  # type: ignore[assignment]
    return made


@pytest.mark.parametrize(
    "overrides",
    [
        ["seed=3,4", "model=alexnet,vgg", "trainer.max_epochs=range(1,4)"],
        ["optimizer=glob(a*)", "data.root='a b'", "+my.key=x,null,true,[1,2],{a:1}"],
        ["optimizer.lr=range(0.1,0.4,step=0.1)", "label_smoothing=0.1", "label_smoothing=0.2", "debug=fast"],
        [],
    ],
)
def test_a_grid_has_the_jobs_of_hydras_basic_sweeper(sweeper: CheckedSweeper, overrides: list[str]) -> None:
    sweeper.sweep(overrides)
    loader = sweeper.hydra_context.config_loader
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(["seed=0,1", "optimizer.lr=0.1", *overrides])
    (expected,) = BasicSweeper.split_arguments(parsed, None)
    assert sweeper.launcher.jobs == expected  # type: ignore[attr-defined]
    assert (sweeper.folder / "multirun.yaml").is_file()


def test_an_override_with_a_plus_replaces_the_same_key_of_the_sweeps_file(sweeper: CheckedSweeper) -> None:
    sweeper.sweep(["++seed=7", "~logger"])
    assert sweeper.launcher.jobs == [["++seed=7", "optimizer.lr=0.1", "~logger"]]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=interval(0.1,1)", r"=interval\(0.1,1\): a grid needs single values. Add sweep=optuna"),
        ("optimizer=glob(x*)", r"optimizer=glob\(x\*\) stands for no value, so no job would start."),
    ],
)
def test_a_grid_refuses_what_has_no_values(sweeper: CheckedSweeper, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sweeper.sweep([override])


def test_a_grid_over_ddp_gives_each_job_its_own_values(shapes: Path, tmp_path: Path) -> None:
    """With keep_going, failed jobs are recorded; without it, the first failed job stops the sweep."""
    done = command(
        "train.py", "-m", *SMALL_NET, "data=folder", f"data.root={shapes}", "data.image_size=64", "test=false",
        "data.batch_size=8", "data.num_workers=0", "logger=csv", "trainer=ddp", "trainer.accelerator=cpu",
        "trainer.devices=2,1", "debug=fast", "optimizer.lr=0.5,-1", "sweep.keep_going=true", "callbacks.figures=false",
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "2 jobs of the sweep failed" in done.stderr
    assert "`optimizer.lr=-1` must be above 0" in done.stderr
    for job in ("1", "3"):  # these failed before a rank existed
        assert summary_of(tmp_path / "sweep" / job)["status"] == "failed"
        assert (tmp_path / "sweep" / job / "config.yaml").is_file()
    jobs = {job: summary_of(tmp_path / "sweep" / job) for job in ("0", "2")}
    assert {job: found["world_size"] for job, found in jobs.items()} == {"0": 2, "2": 1}
    assert all(found["effective_lr"] == 0.5 for found in jobs.values())
    config = yaml.safe_load((tmp_path / "sweep/0/config.yaml").read_text())
    assert config["choices"]["trainer"] == "ddp"
    assert not {"sweep", "hydra/sweeper"} & set(config["choices"])
    assert f"compare its jobs: alexlab compare runs={tmp_path / 'sweep'}" in done.stdout
    line = r"^finished in \d+ s, [\d.]+ images/s, val/acc1 [01]\.\d{4}, best epoch 1 of 1$"
    ends = re.findall(line, done.stdout, re.MULTILINE)
    assert len(ends) == 2, "one line for each job that trained, from a worker process or not"
    assert "evaluate it:" not in done.stdout
    not_images = f"data.root={shapes},{tmp_path / 'sweep'}"
    overrides = [*SMALL_NET, "data=folder", not_images, "dry_run=true", "logger=csv"]
    stopped = command("train.py", "seed=0,1", *overrides, f"hydra.sweep.dir={tmp_path / 'stopped'}", "-m")
    assert stopped.returncode == 2
    assert "job 0: " in stopped.stdout
    assert "Job 1 failed" in stopped.stderr
    assert "job 2: " not in stopped.stdout


def test_the_mistakes_of_all_jobs_are_reported_before_the_first_one_starts(tmp_path: Path) -> None:
    sweep = f"hydra.sweep.dir={tmp_path / 'sweep'}"
    done = command(
        "train.py", "-m", "optimizer.lr=0.003,abc,-1", "seed=1,x", "trainer.max_epochs=0", "logger=csv", sweep
    )
    assert (done.returncode, done.stdout) == (2, "")
    first, *lines = done.stderr.splitlines()
    assert first == (
        "error: 6 of the sweep's 6 jobs have wrong values, so no job was started (sweep.keep_going=true starts them, "
        "and records those that fail):"
    )
    assert {tuple(line.split("=")[0].split(": `")) for line in lines} == {
        ("  all jobs", "trainer.max_epochs"), ("  jobs 1, 3, 5", "seed"), ("  jobs 2, 3", "optimizer.lr"),
        ("  jobs 4, 5", "optimizer.lr"),
    }  # fmt: skip
    assert "  all jobs: `trainer.max_epochs=0` must be at least 1." in lines
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("script", "overrides", "message"),
    [
        ("train.py", ["sweep=seeds", "ema.decay=0.9,2"], "jobs 1, 3, 5, 7, 9: `ema.decay=2` must be below 1."),
        ("train.py", ["model.name=alexnet,vgg16"], "the network of that name use model=torchvision model.name=vgg16"),
        ("eval.py", ["run=x", "crops=1,3"], "job 1: `crops=3` must be 1, 2 or 10."),
        ("train.py", [f"seed={','.join('x' + str(n) for n in range(20))}"], "... and 8 more mistakes"),
        ("train.py", ["sweep=seeds", "sweep.n=2"], "`sweep.n=2`: there is no such key."),
    ],
)
def test_a_wrong_sweep_starts_no_job(script: str, overrides: list[str], message: str, tmp_path: Path) -> None:
    done = command(script, "-m", *overrides, f"paths.logs={tmp_path}")
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_a_sweep_leaves_no_file(shapes: Path, tmp_path: Path) -> None:
    overrides = [*SMALL_NET, "data=folder", f"data.root={shapes}", "data.image_size=64", "logger=csv", "trainer=cpu"]
    sweep = f"hydra.sweep.dir={tmp_path / 'sweep'}"
    done = command("train.py", "-m", *overrides, "seed=0,1", "dry_run=true", sweep)
    assert done.returncode == 0, done.stderr
    assert "job 1: " in done.stdout
    assert "compare" not in done.stdout
    assert not (tmp_path / "sweep").exists()
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/multirun.yaml").write_text("mine")
    deep = "hydra.sweep.subdir=a/${hydra.job.num}/b"
    done = command("train.py", "-m", *overrides, "seed=0,x", "dry_run=true", "sweep.keep_going=true", sweep, deep)
    assert done.returncode == 1, done.stderr
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {"multirun.yaml"}
    assert (tmp_path / "sweep/multirun.yaml").read_text() == "mine"


def test_jobs_write_to_places_of_their_own() -> None:
    assert sweep.places_of({"run": "a", "out": None, "format": "onnx"}) == {"out": "a onnx"}
    assert sweep.places_of({"run": "a", "crops": 10}) == {"run": "a 10"}
    assert sweep.places_of({"run": "a", "out": "b.csv"}) == sweep.places_of({"run": "c", "out": "b.csv"})
    assert sweep.places_of({"run_dir": "/x", "dry_run": False}) == {"hydra.sweep.subdir": "/x"}
    assert sweep.places_of({"run_dir": "/x", "dry_run": True}) == {}
