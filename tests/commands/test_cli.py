"""The command line: help, composed configs, values that Hydra's grammar cannot read, how a command ends."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, clean_env, command, composed, summary_of
from hydra.core.override_parser.overrides_parser import OverridesParser

from alexlab.commands import cli
from alexlab.commands.cli import COMMANDS, to_overrides
from alexlab.engine.config import flat
from alexlab.engine.errors import UserError, mistake
from alexlab.engine.schema import TrainConfig, describe
from alexlab.engine.validation import FILLED_IN


def test_commands_work_from_any_directory(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "train.py"), "--cfg", "job", "--resolve"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"root: {ROOT}/data/demo" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_code_of_a_run_knows_hydras_folders_and_an_empty_one_is_removed(tmp_path: Path) -> None:
    code = (
        "import sys, hydra; from alexlab.commands import cli; from hydra.core.hydra_config import HydraConfig\n"
        "output_dir = lambda: HydraConfig.get().runtime.output_dir\n"
        "cli.Command.load = lambda _: lambda _: print(hydra.utils.get_original_cwd(), output_dir())\n"
        "cli.run('compare')"
    )
    done = command("-c", code, f"hydra.run.dir={tmp_path}/run")
    assert done.stdout.split() == [str(ROOT), f"{tmp_path}/run"], done.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_lists_each_group_with_its_options_and_each_key_with_its_meaning(tmp_path: Path) -> None:
    configs = tmp_path / "a (b), c='d'"
    (configs / "model").mkdir(parents=True)
    (configs / "model/mynet.yaml").write_text("name: mynet\n")
    done = command("train.py", "--help", "--config-dir", str(configs), "augment=paper")
    assert (done.returncode, done.stderr) == (0, "")
    for folder in (path for path in (ROOT / "conf").iterdir() if path.is_dir()):
        names = {path.stem for path in folder.glob("[!_]*.yaml")} | ({"mynet"} if folder.name == "model" else set())
        listed = f"  {folder.name:11} {', '.join(sorted(names))}\n"
        assert (listed in done.stdout) == (folder.name not in ("hydra", "paths", "dashboard")), folder.name
    meanings = describe(TrainConfig)
    for key, value in flat(composed("augment=paper")).items():
        name = key.rpartition(".")[2]
        if key in meanings and "${" not in str(value) and key not in (*FILLED_IN, "data.root"):
            assert re.search(rf"^ *{re.escape(name)}: .* # {re.escape(meanings[key])}$", done.stdout, re.M), key
    assert re.search(r"^    norm: lrn +# lrn, bn or none$", done.stdout, re.M), "keys of an option, from its yaml"
    for part in ("crop_ratio: 0.875", "--multirun", "--config-dir DIR"):
        assert part in done.stdout


@pytest.mark.parametrize("verb", ["eval", "compare", "predict", "export"])
def test_help_of_a_command_without_groups_has_its_keys_only(verb: str) -> None:
    printed = command("-m", "alexlab", verb, "--help").stdout
    assert re.search(r"^(ckpt|runs): .* # .+$", printed, re.M)
    assert not re.search("Groups|hydra:|filled in", printed, re.I)


def test_help_of_benchmark_has_the_groups_of_a_training() -> None:
    printed = command("-m", "alexlab", "benchmark", "--help").stdout
    assert re.search(r"^  model +alexnet, ", printed, re.M)
    assert "override" not in printed.partition("Flags")[0]


def test_configs_are_printed_without_heavy_imports() -> None:
    """test_house.py checks --help."""
    code = (
        "import sys, runpy; sys.argv = ['train.py', '--cfg', 'job']\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
        "heavy = {'torch', 'torchvision', 'pytorch_lightning', 'torchmetrics', 'wandb', 'numpy', 'optuna', 'PIL'}\n"
        "sys.exit(f'heavy: {heavy & set(sys.modules)}' if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def value_of(*words: str, command: str = "train") -> object:
    """Return the value that Hydra reads from the last override of a command line."""
    text = to_overrides([*words], COMMANDS[command])[-1]
    return OverridesParser.create().parse_override(text).value()


@pytest.mark.parametrize("key", ["data.root", "hydra.run.dir", "+my.note"])
@pytest.mark.parametrize(
    "value",
    ["/a b/c", "/a[1]", "[a", "/a=b", "/a(1)", "/a{b}", "/ü/ñ/图", "/a'b", '/a"b', "/a:b", "a@b", "/a#b", "back\\slash",
     "/100%", "/a&b", "/a;b", "it's", "/end\\"],
)  # fmt: skip
def test_a_value_that_hydras_grammar_cannot_read_is_a_text(key: str, value: str) -> None:
    assert value_of(f"{key}={value}") == value


@pytest.mark.parametrize(
    ("word", "read"),
    [
        ("init_from=1e5", "1e5"),
        ("resume=2026", "2026"),
        ("from_run=007", "007"),
        ("paths.logs='26_20'", "26_20"),
        ("from_run=latest", "latest"),
        ("seed=26_20", 2620),
        ("optimizer.betas=[0.9,0.99]", [0.9, 0.99]),
        ("optimizer.lr=1e-3", 0.001),
        ("data.root='/a,b'", "/a,b"),
        ("data.root=null", None),
        ("data.root=", ""),
        ("data.root=~/x", str(Path.home() / "x")),
        ("data.root=a,b", "a,b"),
        ("data.root=[a]", "[a]"),
        ("hydra.run.dir=logs/${now:%Y-%m-%d}/${seed}", "logs/${now:%Y-%m-%d}/${seed}"),
    ],
)
def test_runs_named_by_digits_and_conditions_are_texts_and_numbers_stay_numbers(word: str, read: object) -> None:
    assert value_of(word) == read


TEXTS = ["2025_01_05", "2024", "1e3", "007", "1.50", "on", "true", "inf", "nan", "2026-01-02", "choice(1)", " x", "a b"]


@pytest.mark.parametrize("value", TEXTS)
@pytest.mark.parametrize(
    ("command", "keys"),
    [
        ("train", "data.columns.path data.columns.label data.separator"),
        ("train", "data.root data.class_names data.file paths.logs paths.data model.name ckpt_path init_from resume"),
        ("train", "hydra.run.dir hydra.sweep.dir hydra.sweep.subdir hydra.job.name hydra.sweeper.study_name"),
        ("train", "hydra.sweeper.storage from_run monitor trainer.max_time logger.wandb.group +logger.wandb.name"),
        ("predict", "run ckpt images out"),
        ("compare", "runs where sort out"),
        ("dashboard", "project entity name metric"),
    ],
)  # fmt: skip
def test_a_text_stays_the_text_that_was_typed(command: str, keys: str, value: str) -> None:
    for key in keys.split():
        assert value_of(f"{key}={value}", command=command) == value, key


@pytest.mark.parametrize(
    ("command", "word", "read"),
    [
        ("train", "logger.wandb.name=null", None),
        ("train", "hydra.sweeper.storage=null", None),
        ("train", "paths.logs=null", "null"),
        ("train", "logger.wandb.tags=[2025_01_05,on,'a,b']", ["2025_01_05", "on", "a,b"]),
        ("train", "allow=[mypkg]", ["mypkg"]),
        ("train", "data.classes=[01,1_0,1e3,on,null]", ["01", "1_0", "1e3", "on", "null"]),
        ("train", "data.columns.labels=null", None),
        ("train", "data.cache=null", None),
        ("train", "callbacks.progress=on", "on"),
        ("compare", "runs=[1,2.50,a[1],x]", ["1", "2.50", "a[1]", "x"]),
        ("compare", "where=optimizer.lr<0.1 and model.name=alexnet", "optimizer.lr<0.1 and model.name=alexnet"),
        ("compare", "where=seed=1", "seed=1"),
        ("compare", "where='a=\"b\"'", 'a="b"'),
    ],
)
def test_null_lists_and_conditions(command: str, word: str, read: object) -> None:
    assert value_of(word, command=command) == read


@pytest.mark.parametrize(
    ("word", "jobs"),
    [
        ("data.root=2024,2025_01_05,/a", ["'2024'", "'2025_01_05'", "/a"]),
        ("data.root=choice(2024,/ü[1])", ["'2024'", "'/ü[1]'"]),
        ("data.root='a,b',c", ["'a,b'", "c"]),
        ("logger.wandb.name=null,1e3", ["null", "'1e3'"]),
        ("optimizer.lr=1e-3,0.1", ["0.001", "0.1"]),
        ("hydra.sweep.dir=a,b", None),
        ("data.root=/a(1)", None),
    ],
)
def test_a_comma_separates_the_jobs_of_a_sweep(word: str, jobs: list[str] | None) -> None:
    flag, text = to_overrides([word, "-m"], COMMANDS["train"])
    override = OverridesParser.create().parse_override(text)
    assert flag == "-m"
    assert (list(override.sweep_string_iterator()) if override.is_sweep_override() else None) == jobs
    assert jobs is not None or override.value() == word.partition("=")[2]


def test_flags_may_be_anywhere_on_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x y").mkdir()
    words = ["seed=1", "--config-dir", "x y", "data=demo", "--cfg", "job", "--resolve"]
    flags = ["--config-dir=" + str(Path.cwd() / "x y"), "--cfg", "job", "--resolve"]
    assert to_overrides(words, COMMANDS["train"]) == [*flags, "seed=1", "data=demo"]
    assert to_overrides(["seed=1", "-c", "job", "-cd=/x"], COMMANDS["train"])[:2] == ["-c", "job"]


@pytest.mark.parametrize(
    ("words", "whole"),
    [
        (["run=my", "run", "[1]", "ckpt=last"], "'run=my run [1]'"),
        (["-m", "optimizer.lr=0.1,", "0.2"], "optimizer.lr=0.1,0.2"),
        (["data.image_size=[64,", "64]"], "'data.image_size=[64,64]'"),
    ],
)
def test_a_value_that_the_shell_has_divided_is_answered_with_the_words_to_type(words: list[str], whole: str) -> None:
    with pytest.raises(UserError, match="settings are written key=value") as refused:
        to_overrides(words, COMMANDS["train"])
    assert str(refused.value).endswith(f"write {whole}.")


def test_keys_that_the_options_do_not_set_get_a_plus_if_their_class_takes_them() -> None:
    words = [
        "-m",
        "optimizer=adamw,sgd",
        "optimizer.eps=1e-8",
        "trainer.max_time=00:00:01:00",
        "model.net.hidden=[9,9]",
    ]
    words += ["scheduler=onecycle", "scheduler.three_phase=true", "trainer.val_check_interval=2", "data.classes=[a]"]
    others = ["optimizer.lr=1", "optimizer.momentum=0.9", "optimizer.epss=1", "my.x=1", "trainer.plugins=x", "~seed"]
    added = cli.with_added_keys([*words, *others], COMMANDS["train"])
    changed = [
        "optimizer.eps",
        "trainer.max_time",
        "model.net.hidden",
        "scheduler.three_phase",
        "trainer.val_check_interval",
    ]
    assert [word for word in added if word.startswith("+")] == [
        f"+{word}" for word in words if word.partition("=")[0] in changed
    ]
    assert [word.lstrip("+") for word in added] == [*words, *others]
    assert (
        cli.with_added_keys(["scheduler=cosine", "scheduler.gamma=0.5"], COMMANDS["train"])[1] == "scheduler.gamma=0.5"
    )


def test_a_key_that_is_not_in_conf_works_without_a_plus(tmp_path: Path) -> None:
    words = ["data=demo", "logger=csv", "trainer.max_time=00:00:01:00", "model.net.hidden=[9,9]", "--cfg", "job"]
    done = command("train.py", *words, f"paths.logs={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "max_time: 00:00:01:00" in done.stdout
    assert re.search(r"hidden:\n +- 9\n +- 9\n", done.stdout)


def test_deleted_keys_of_closed_groups_have_the_default_of_the_schema() -> None:
    for key, value in {"resume": False, "checkpoint": 15, "trainer": None}.items():
        names = {"resume": "allow_changes", "checkpoint": "every_minutes", "trainer": "precision"}
        deleted = f"~{key}" if key != "trainer" else "~trainer.precision"
        assert composed(deleted)[key][names[key]] == (value if key != "trainer" else "auto")
    assert "momentum" not in composed("~optimizer.momentum")["optimizer"], "the class must not get it"


def test_relative_paths_of_images_are_made_absolute(shapes: Path, tmp_path: Path) -> None:
    words = [*TINY, "data=folder", f"data.root={os.path.relpath(shapes, ROOT)}", f"hydra.run.dir={tmp_path}/run"]
    done = command("train.py", *words, "dry_run=true")
    assert f"data                       {shapes}, " in done.stdout, done.stderr
    done = command("train.py", *words, "hydra.job.chdir=true")
    assert (done.returncode, list(tmp_path.iterdir())) == (2, [])
    assert "`hydra.job.chdir=true` is not supported: remove it." in done.stderr


def test_a_removed_working_directory_is_answered_with_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(FileNotFoundError) as removed:
        Path.cwd()
    assert mistake(removed.value) == "the working directory was removed: cd to another one."


def test_resume_is_a_short_form_and_flags_come_first() -> None:
    train = COMMANDS["train"]
    assert to_overrides(["resume=latest"], train) == ["resume.run=latest"]
    assert to_overrides(["resume.allow_changes=true"], train) == ["resume.allow_changes=true"]
    assert to_overrides(["seed=1,2", "--multirun"], train) == ["--multirun", "seed=1,2"]


@pytest.mark.parametrize(
    "code",
    [
        "sys.argv = ['train.py']; runpy.run_path('train.py', run_name='__main__')",
        "sys.argv = ['eval.py', 'run=latest']; runpy.run_path('eval.py', run_name='__main__')",
        "sys.argv = ['alexlab', '--help']; from alexlab.commands.cli import main; main()",
        "runpy.run_module('alexlab', run_name='__main__', alter_sys=True)",
        "import alexlab",
    ],
)
def test_windows_is_refused_in_one_line(code: str) -> None:
    """Python that says it is Windows, without the modules that Windows lacks: nobody has tried the real one."""
    lacks = "import runpy, sys; sys.platform = 'win32'; sys.modules |= dict.fromkeys(['fcntl', 'pwd', 'termios']); "
    done = command("-c", lacks + code)
    refused = "error: alexlab needs file locks and signals of Linux or macOS. On Windows, use WSL 2.\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", refused)


def test_ctrl_c_ends_the_imports_at_once() -> None:
    """torch's C code swallows KeyboardInterrupt where it imports numpy."""
    code = """
import gc, os, signal
from alexlab.engine.process import importing
before = signal.getsignal(signal.SIGINT)
with importing():
    assert not gc.isenabled()
assert gc.isenabled()
assert gc.get_freeze_count() > 0
assert signal.getsignal(signal.SIGINT) is before
with importing():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        print("swallowed")
print("not reached")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted.\n")


def test_a_run_continues_if_nobody_reads_its_output(shapes: Path, tmp_path: Path) -> None:
    words = [sys.executable, "train.py", *TINY, "data=folder", f"data.root={shapes}", "debug=fast"]
    run = subprocess.Popen(
        [*words, f"hydra.run.dir={tmp_path}/run"], cwd=ROOT, env=clean_env(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert run.stdout is not None
    assert run.stderr is not None
    assert run.stdout.readline().startswith("run directory: ")
    run.stdout.close()
    note = "note: the output was closed; the run continues, and train.log has the rest.\n"
    assert (run.stderr.read(), run.wait(240)) == (note, 0)
    assert summary_of(tmp_path / "run")["status"] == "finished"


LEAVING = """import atexit, sys, threading
from alexlab.engine.process import leave
atexit.register(lambda: print("at exit"))
ending = threading.Event()
threading.Thread(target=lambda: (ending.wait(), print("thread"))).start()
print("leaving")
ending.set()
leave(7)
"""


def test_leave_waits_for_threads_and_calls_exit_handlers() -> None:
    done = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines(), done.stderr) == (7, ["leaving", "thread", "at exit"], "")


def test_a_profiler_gets_its_process_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """`run` leaves the process after a command that has imported torch, unless something watches it."""
    left: list[int] = []
    monkeypatch.setattr(cli, "help_of", lambda command, words: "")
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    monkeypatch.setattr(cli, "leave", left.append)
    monkeypatch.setitem(sys.modules, "torch", sys)
    before = sys.getprofile()
    try:
        sys.setprofile(lambda *args: None)
        cli.run("train")
        assert left == []
    finally:
        sys.setprofile(before)
    monkeypatch.setattr(sys, "gettrace", lambda: None)  # of a measurement of coverage
    cli.run("train")
    assert left == [0]


def test_a_pipe_that_is_closed_early() -> None:
    """`| head -1`, of which Python would say that the pipe is broken."""
    for words in (["train.py", "--help"], ["eval.py", "--help"], ["-m", "alexlab", "dashboard", "dry_run=true"]):
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.close()
        _, errors = process.communicate(timeout=60)
        assert errors == b""
