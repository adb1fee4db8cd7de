"""The directory of a run: it holds one run, and its summary.json says how that ended."""

import json
import logging
import os
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

from alexlab.analysis import gallery
from alexlab.callbacks.media import Media
from alexlab.engine import checkpoint_io as checkpoint
from alexlab.engine import config as configs
from alexlab.engine import files
from alexlab.engine import run_dir as rundir
from alexlab.engine.errors import UserError


def test_a_directory_holds_one_run(tmp_path: Path) -> None:
    config = {"run_dir": str(tmp_path / "run"), "seed": 3}
    rundir.create(tmp_path / "run", config)
    assert configs.read(tmp_path / "run/config.yaml") == config
    why = "run holds a run already: remove hydra.run.dir, choose another directory, or resume the run with resume="
    with pytest.raises(UserError, match=why):
        rundir.create(tmp_path / "run", {})


def test_mark_keeps_the_status_that_a_rank_wrote(tmp_path: Path) -> None:
    rundir.mark(tmp_path, "failed", "no run has started here")
    assert not (tmp_path / "summary.json").exists()
    (tmp_path / "config.yaml").touch()
    rundir.mark(tmp_path, "failed", "rank 1 was killed")
    assert json.loads((tmp_path / "summary.json").read_text()) == {"status": "failed", "error": "rank 1 was killed"}
    rundir.write_json(tmp_path / "summary.json", {"status": "preempted"})
    rundir.mark(tmp_path, "failed", "later")
    assert rundir.read_summary(tmp_path) == {"status": "preempted"}
    rundir.write_json(tmp_path / "summary.json", {"status": "finished", "seconds": 3})
    rundir.mark(tmp_path, "failed", "another rank did not finish")
    assert rundir.read_summary(tmp_path)["status"] == "failed"


def test_nothing_is_written_through_links(tmp_path: Path) -> None:
    precious, folder = tmp_path / "precious", tmp_path / "elsewhere"
    precious.write_text("mine")
    folder.mkdir()
    path = tmp_path / "out.txt"
    for link in (path, path.with_name(f".out.txt.{os.getpid()}.tmp")):
        link.symlink_to(precious)
    with pytest.raises(ValueError, match="I/O operation on closed file"), files.atomic_write(path, "x") as file:
        (file.close(), file.write("x"))
    assert path.is_symlink(), "half a file takes no place"
    with files.atomic_write(path, "x") as file:
        file.write("whole")
    assert (path.read_text(), path.is_symlink(), precious.read_text()) == ("whole", False, "mine")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["elsewhere", "out.txt", "precious"]
    (tmp_path / "figures").symlink_to(folder)
    with pytest.raises(UserError, match=r"figures is a link, and the files of a run are not written through one: rem"):
        files.make_folder(tmp_path, "figures")
    with pytest.raises(UserError, match=r"figures is a link"):
        Media(tmp_path / "figures")._write("mistakes", Image.new("RGB", (1, 1)))
    assert not list(folder.iterdir())


def test_pictures_and_tables_take_the_place_of_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "figures").mkdir()
    temporary = [f".{name}.{os.getpid()}.tmp" for name in ("metrics.csv", "SHA256SUMS", "x.ckpt")]
    for name in ("figures/mistakes.png", "figures/curves.png", *temporary):
        (tmp_path / name).symlink_to(precious)
    picture = Image.new("RGB", (1, 1))
    Media(tmp_path / "figures")._write("mistakes", picture)
    monkeypatch.setattr(gallery.loading, "load", lambda *args, **kwargs: None)
    monkeypatch.setattr(gallery, "pictures", lambda *given: [("curves", picture)])
    gallery.draw(tmp_path, None, "val/acc1")  # type: ignore[arg-type]
    files.write_csv(tmp_path / "metrics.csv", ["step"], [{"step": "1"}])
    checkpoint.AtomicCheckpointIO().save_checkpoint({}, tmp_path / "x.ckpt")
    assert precious.read_text() == "mine"
    assert Image.open(tmp_path / "figures/curves.png").size == (1, 1)


@pytest.mark.parametrize("text", ["[]", "null", "[" * 100_000, '{"best": []}', '{"x": ', "\xff", "1" * 5000])
def test_a_file_that_is_no_summary_counts_as_empty(text: str, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(text, encoding="latin-1")
    (tmp_path / "config.yaml").touch()
    assert rundir.read_summary(tmp_path) == {}
    rundir.mark(tmp_path, "failed", "x")
    assert rundir.read_summary(tmp_path) == {"status": "failed", "error": "x"}
    os.truncate(tmp_path / "summary.json", 2**26)
    assert rundir.read_summary(tmp_path) == {}


def test_a_run_is_named_by_its_directory_or_by_sweep_and_job() -> None:
    assert rundir.name_of(Path("logs/train/runs/2026-11-24_10-00-00_000")) == "2026-11-24_10-00-00_000"
    assert rundir.name_of(Path("logs/train/multiruns/sweep/3")) == "sweep/3"


def test_only_rank_0_writes_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALEXLAB_RANKS", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        rundir.set_up_logging(tmp_path, lambda text: text)
        logging.getLogger("alexlab").info("from rank %s", rank)
    assert "from rank 0" in (tmp_path / "train.log").read_text()
    assert "from rank 1" not in (tmp_path / "train.log").read_text()
    for handler in list(logging.getLogger("alexlab").handlers):
        logging.getLogger("alexlab").removeHandler(handler)
        handler.close()


def test_a_path_is_shown_relative_to_a_folder_above_it_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PWD", str(tmp_path))
    assert rundir.shown(tmp_path / "a/b") == "a/b"
    assert rundir.shown(tmp_path) == str(tmp_path)
    assert rundir.shown(tmp_path.parent) == str(tmp_path.parent)
    monkeypatch.setenv("PWD", str(ROOT))
    assert rundir.shown(tmp_path / "a/b") == f"{tmp_path}/a/b", "the user's shell is elsewhere"


def test_the_log_has_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("alexlab")
    for name, value in {"handlers": [], "propagate": True}.items():  # restored after the test
        monkeypatch.setattr(logger, name, value)
    rundir.set_up_logging(tmp_path, str)
    logger.info("/caf\udce9\x1b[2J and\nmore")
    assert capsys.readouterr().out == "/caf\\xe9\\x1b[2J and\nmore\n"
    assert "/caf\\xe9\\x1b[2J" in (tmp_path / "train.log").read_text()
    assert rundir.shown(Path("/caf\udce9")) == r"/caf\xe9"


def test_a_folder_that_was_removed_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"/gone does not exist \(any more\), so metrics.csv cannot be written."):
        files.write_csv(tmp_path / "gone/metrics.csv", ["a"], [{"a": "1"}])


def test_a_closed_log_gets_nothing_of_the_next_run(tmp_path: Path) -> None:
    """Such as the next job of a sweep in this process, before it has a log of its own."""
    rundir.set_up_logging(tmp_path, str)
    log = logging.getLogger("alexlab")
    log.info("of this run", extra={"file_only": True})
    rundir.close_log()
    log.info("of the next run", extra={"file_only": True})
    assert (tmp_path / "train.log").read_text().endswith("of this run\n")
