"""`make results`: the tables of docs/results.md come from runs."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT
from scipy import stats


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return docs/results.py as a module that trains into, and writes to, a temporary folder."""
    spec = importlib.util.spec_from_file_location("results_page", ROOT / "docs/results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "results_page", module)  # for its dataclass
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "LOGS", tmp_path / "train")
    monkeypatch.setattr(module, "PAGE", tmp_path / "results.md")
    return module


def test_a_table_is_written_from_runs_that_are_trained_once(
    shapes: Path, results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = "data=folder data.root=PHOTOS data.image_size=64 data.batch_size=8 model.net.hidden=[8,8] logger=csv"
    more = f"callbacks.figures=false trainer.max_epochs=1 seed=0,1 trainer.accelerator=cpu paths.logs={tmp_path}"
    mirrored = ("split=val crops=2", "eval-val-2crops.json", ("loss_2crops",))
    first = f"model=alexnet_half {small} {more}"
    monkeypatch.setattr(
        results, "SOURCES", {"TINY": first.replace("PHOTOS", str(shapes)).replace("seed=0,1", "seed=2")}
    )
    study = results.Study(first, ("", "model.net.dropout=0.0 init_from=TINY"), tested=mirrored)
    results.train("tiny", study, str(shapes))
    written = sorted((tmp_path / "train").rglob("summary.json"))
    assert len(written) == 5, "two of each variant, and the source"
    before = [path.stat().st_mtime_ns for path in written]
    results.train("tiny", study, str(shapes))
    assert [path.stat().st_mtime_ns for path in written] == before, "finished jobs are not trained again"

    results.test("tiny", study)
    page = "text\n<!-- results tiny -->\nold\n<!-- end -->\nmore\n<!-- results other -->\nkept\n<!-- end -->\n"
    (tmp_path / "results.md").write_text(page)
    results.write("tiny", results.table("tiny", study))
    text = (tmp_path / "results.md").read_text()
    assert text.startswith("text\n<!-- results tiny -->\n`python train.py -m model=alexnet_half ")
    assert text.endswith("<!-- end -->\nmore\n<!-- results other -->\nkept\n<!-- end -->\n")
    assert "\nold\n" not in text
    head, _, first, second = [line for line in text.splitlines() if line.startswith("|")]
    assert head.startswith("|  | runs | val/acc1 | 95 % interval |")
    assert head.endswith("| last/val/acc1 | val/loss | loss_2crops |")
    assert first.startswith("| the command | 2 | "), "the reference"
    assert second.startswith("| `model.net.dropout=0.0 init_from=TINY` | 2 | ")
    runs = results.read(results.find([str(tmp_path / "train/multiruns")], tmp_path)[0])[0]
    scores = [[r.metrics["val/acc1"] for r in runs if r.settings["model.net.dropout"] == d] for d in (0.5, 0.0)]
    assert f"{sum(scores[0]) / 2:.4f}±" in first
    mirrored_losses = [
        json.loads((run.path / "eval-val-2crops.json").read_text())["loss_2crops"]
        for run in runs
        if run.settings["model.net.dropout"] == 0.5
    ]
    assert first.endswith(f"| {sum(mirrored_losses) / 2:.4f}±{stats.tstd(mirrored_losses):.4f} |")
    if all(stats.tvar(each) for each in scores):
        p = stats.ttest_ind(*scores, equal_var=False).pvalue
        assert f"p={p:.2g} |" in second


def test_each_study_has_its_place_on_the_page(results: ModuleType) -> None:
    text = (ROOT / "docs/results.md").read_text()
    names = [*results.STUDIES, "imagenet"]
    assert [text.count(f"<!-- results {name} -->\n") for name in names] == [1] * len(names)
    assert text.count("<!-- end -->") == len(names)


def test_the_costs_of_the_imagenet_recipes(results: ModuleType) -> None:
    """Multiply-accumulates of the paper's layers, from its shapes. The backward pass takes twice as many."""
    convolutions = [(55, 96, 363), (27, 256, 1200), (13, 384, 2304), (13, 384, 1728), (13, 256, 1728)]
    macs = sum(side**2 * maps * inputs for side, maps, inputs in convolutions) + 9216 * 4096 + 4096**2 + 4096 * 1000
    paper = results.costs()[2].split(" | ")
    images = 90 * 1_281_167
    assert paper[:4] == ["| `imagenet_alexnet`", "1", "128", f"{images // 90 // 128 * 90:,}"]
    assert float(paper[4]) == pytest.approx(6 * macs * images, rel=0.02)


def test_what_the_backward_pass_keeps(results: ModuleType) -> None:
    """A linear layer keeps its input in bf16, and the weights."""
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 4, 5))
    assert results.kept(net, 6, 4) - results.kept(net, 2, 4) == pytest.approx(4 * (48 * 2 + 5 * 4), abs=4 * 5 * 4)


def test_a_study_that_does_not_exist_is_answered(results: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["results.py", "rate"])
    with pytest.raises(SystemExit, match=r"^rate: unknown. Choose from defaults, rates, .*, imagenet, and photos=FO"):
        results.main()
