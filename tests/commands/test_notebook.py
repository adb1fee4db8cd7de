"""Training in a process of one's own, as a notebook does; and the notebook of examples/, in a real kernel."""

import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, clean_env

import alexlab
from alexlab.engine.errors import UserError

nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")


def settings(shapes: Path, logs: Path) -> list[str]:
    words = [f"data.root={shapes}", "data=folder", "data.batch_size=8", "trainer.limit_train_batches=2"]
    return [*TINY, *words, "trainer.max_epochs=1", f"paths.logs={logs}"]


def test_the_notebook_runs_in_a_kernel(shapes: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(str(ROOT / "examples/notebook.ipynb"), as_version=4)
    [cell] = [cell for cell in notebook.cells if cell.source.startswith("import alexlab")]
    cell.source = f"import alexlab\n\nsettings = {settings(shapes, tmp_path / 'logs')!r}"
    env = clean_env({"IPYTHONDIR": str(tmp_path / "ipython")})
    client = nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=env)
    outputs = [cell.get("outputs", []) for cell in notebook.cells]
    kinds = [key for each in outputs for output in each for key in output.get("data", {})]
    assert "image/png" in kinds, "the curves"
    assert "text/html" in kinds, "the table of runs"
    assert "finished in" in json.dumps(outputs)
    assert len(list((tmp_path / "logs/train/runs").iterdir())) == 2


def test_a_mistake_is_an_exception_with_the_message_of_the_command_line(shapes: Path, tmp_path: Path) -> None:
    words, argv = settings(shapes, tmp_path), sys.argv
    for wrong, sentence in (
        (["data.bach_size=3"], r"`data.bach_size=3`: there is no such key. Did you mean `data.batch_size`"),
        (["model=nix"], r"`model=nix`|model=nix"),
        ([f"data.root={tmp_path}/none"], r"none` does not exist: give the folder of the images"),
        (["-m", "seed=1,2"], r"^-m: flags are for the command line. Call alexlab.train once per run"),
    ):
        with pytest.raises(UserError, match=sentence):
            alexlab.train(*words, *wrong)
    assert sys.argv is argv
    assert not (tmp_path / "train").exists() or not list((tmp_path / "train").rglob("config.yaml"))
