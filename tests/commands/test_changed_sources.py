"""A network whose source file was edited after the training: its weights still fit, so every command must warn."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, command, summary_of

import alexlab
import alexlab.models
from alexlab.engine import provenance

NET = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes: int) -> None:
        features = [nn.Conv2d(3, 8, 5, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        super().__init__(*features, nn.Linear(32, num_classes))
"""
OPTION = """
name: edited
mean: auto
std: auto
pretrained: false
net:
  _target_: alexlab.models.edited_net.Net
"""
# runs a command with a folder of further networks, as if they were files of src/alexlab/models/
WRAPPER = """
import runpy, sys
import alexlab.models
alexlab.models.__path__.append({folder!r})
sys.path[0] = {root!r}
if sys.argv[1].endswith(".py"):
    sys.argv = sys.argv[1:]
    runpy.run_path({root!r} + "/" + sys.argv[0], run_name="__main__")
else:
    runpy.run_module("alexlab", run_name="__main__", alter_sys=True)
"""
FILE = "alexlab/models/edited_net.py"


def test_every_use_of_a_network_with_edited_source_warns_once(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    net, run_dir = tmp_path / "models/edited_net.py", tmp_path / "logs/train/runs/edited"
    (tmp_path / "conf/model").mkdir(parents=True)
    (tmp_path / "conf/model/edited.yaml").write_text(OPTION)
    net.parent.mkdir()
    net.write_text(NET)
    (tmp_path / "wrapper.py").write_text(WRAPPER.format(folder=str(net.parent), root=str(ROOT)))

    def run(*words: str) -> str:
        done = command(str(tmp_path / "wrapper.py"), *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    job = ["--config-dir", str(tmp_path / "conf"), *(word for word in TINY if not word.startswith("model"))]
    job += ["model=edited", "data=folder", f"data.root={shapes}", "data.batch_size=8", "debug=fast"]
    evaluate = ("eval.py", f"run={run_dir}", f"paths.logs={tmp_path / 'logs'}")
    run("train.py", *job, f"hydra.run.dir={run_dir}")
    ckpt = run_dir / "checkpoints/best.ckpt"
    sources = torch.load(ckpt, weights_only=True)["alexlab"]["sources"]
    assert sources.keys() == {FILE}
    assert "warning" not in run(*evaluate)

    net.write_text(NET.replace("nn.ReLU()", "nn.GELU()"))
    warning = f"warning: {FILE} changed since {ckpt} was trained: the network may compute something else than in train"
    restore = f"`git checkout {summary_of(run_dir)['git']['commit']}`"
    images = next((shapes / "val").glob("*/*.jpg"))
    for words in (
        evaluate,
        ("export", f"run={run_dir}", "format=torch_export", f"images={images}"),
        ("train.py", *job, f"init_from={run_dir}", "dry_run=true", f"hydra.run.dir={tmp_path / 'new'}"),
    ):
        printed = run(*words)
        assert printed.count(warning) == 1, (words[0], printed)
        assert restore in printed

    monkeypatch.setattr(alexlab.models, "__path__", [*alexlab.models.__path__, str(net.parent)])
    alexlab.load(run_dir)
    printed = capsys.readouterr().out
    assert printed.count(warning) == 1
    assert restore in printed
    monkeypatch.delitem(sys.modules, "alexlab.models.edited_net")
    older = torch.load(ckpt, weights_only=True)
    del older["alexlab"]["sources"]
    torch.save(older, ckpt)
    alexlab.load(run_dir)
    assert capsys.readouterr().out == ""
    rebuilt = importlib.import_module("alexlab.models.edited_net").Net(2)
    assert provenance.changed_sources(sources, rebuilt) == [FILE]
    monkeypatch.delitem(sys.modules, "alexlab.models.edited_net")
