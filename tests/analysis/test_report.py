"""The numbers of a report, checked against scikit-learn and torchmetrics, and the page."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn import metrics
from torchmetrics.functional.classification import multiclass_calibration_error

from alexlab.analysis import report
from alexlab.analysis.calibration import Calibration, Outputs, calibration_error, fit_temperature, reliability

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NAMES = ["a", "b", "c", "d", "e"]


def outputs(factor: float = 1.0, number: int = 400, absent: int | None = None) -> Outputs:
    """Return logits of which, times 1 / `factor`, the softmax is the distribution of the targets."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(number, len(NAMES), generator=generator)
    targets = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    if absent is not None:
        targets[targets == absent] = (absent + 1) % len(NAMES)
    return Outputs(factor * logits, targets)


@pytest.mark.parametrize("absent", [None, 2])
def test_the_table_of_classes_is_scikit_learns(absent: int | None) -> None:
    found = outputs(absent=absent)
    table = report.class_table(found, NAMES)
    predicted = found.logits.argmax(1)
    expected = metrics.precision_recall_fscore_support(
        found.targets, predicted, labels=range(len(NAMES)), zero_division=np.nan
    )
    present = [k for k in range(len(NAMES)) if k != absent]
    for column, values in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        assert table[column].to_numpy()[present] == pytest.approx(values[present])
    for k in present:
        area = metrics.average_precision_score(found.targets == k, found.logits.softmax(1)[:, k])
        assert table["average_precision"].iloc[k] == pytest.approx(area, abs=1e-6)
    if absent is not None:
        assert table.loc[NAMES[absent], ["recall", "f1", "average_precision"]].isna().all()
        assert table.loc[NAMES[absent], "support"] == 0


def test_the_most_frequent_mistakes_are_those_of_the_confusion_matrix() -> None:
    found = outputs()
    matrix = metrics.confusion_matrix(found.targets, found.logits.argmax(1))
    np.fill_diagonal(matrix, 0)
    rows = report.confusions(found, NAMES, most=4)
    assert [count for _, _, count in rows] == sorted(matrix.ravel(), reverse=True)[:4]
    assert all(matrix[NAMES.index(a), NAMES.index(b)] == count for a, b, count in rows)


def test_the_curves_are_scikit_learns() -> None:
    found = outputs()
    figures = dict(report.figures(found, NAMES, None, "test, best.ckpt"))
    assert list(figures) == ["precision_recall", "roc", "reliability"]
    probabilities = found.logits.softmax(1)
    for k, name in enumerate(NAMES):
        right = found.targets == k
        for key, (y, x) in {
            "precision_recall": metrics.precision_recall_curve(right, probabilities[:, k])[:2],
            "roc": metrics.roc_curve(right, probabilities[:, k])[1::-1],
        }.items():
            line = next(line for line in figures[key].axes[0].lines if line.get_label() == f" {name}")
            drawn = pd.DataFrame(np.asarray(line.get_xydata())).drop_duplicates().to_numpy()
            for point in np.stack([x, y], 1):
                assert np.abs(drawn - point).max(1).min() < 1e-6, f"{key} of {name} lacks {point}"


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_calibration_error_is_torchmetrics(temperature: float) -> None:
    found = outputs(factor=2)
    probabilities = (found.logits / temperature).softmax(1)
    expected = multiclass_calibration_error(probabilities, found.targets, len(NAMES), n_bins=15, norm="l1")
    assert calibration_error(found, temperature) == pytest.approx(float(expected), abs=1e-6)


def test_the_reliability_of_one_range() -> None:
    """Two images with confidences of 0.7 and 0.72, of which one is right: the range from 10 / 15 to 11 / 15."""
    logits = torch.tensor([[0.7, 0.3], [0.72, 0.28]]).log()
    confidence, accuracy, counts = reliability(Outputs(logits, torch.tensor([0, 1])))
    assert counts.tolist() == [0] * 10 + [2] + [0] * 4
    assert (confidence[10], accuracy[10]) == pytest.approx((0.71, 0.5))
    assert np.isnan(accuracy[9])


@pytest.mark.parametrize("factor", [0.5, 1.0, 4.0])
def test_the_temperature_is_the_factor_by_which_logits_are_too_large(factor: float) -> None:
    found = outputs(factor, number=20_000)
    assert fit_temperature(found) == pytest.approx(factor, rel=0.03)
    assert calibration_error(found, fit_temperature(found)) < 0.01
    exact = Outputs(found.logits * (found.logits.argmax(1) == found.targets)[:, None], found.targets)
    assert 0.02 <= fit_temperature(exact) <= 50


def test_hundreds_of_classes_are_drawn_as_their_mean() -> None:
    names = [f"class {k}" for k in range(300)]
    found = Outputs(torch.randn(900, 300), torch.arange(900) % 300)
    for name, figure in report.figures(found, names, None, "val, last.ckpt"):
        if name != "reliability":
            assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["mean of 300 classes"]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's package chromium)")
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    """Names cannot be code; nothing is fetched; the page is as wide as a telephone, and dark if that is wanted."""
    nasty = "<script>document.title='no'</script>"
    found = outputs()
    table = report.class_table(found, [nasty, *NAMES[1:]])
    picture = report.as_png(Image.new("RGB", (1200, 300)))
    calibration = Calibration(2.0, 0.1, 0.05, optimistic=False)
    figures = {name: report.as_png(each) for name, each in report.figures(found, NAMES, calibration, "test")}
    config = {"model": {"name": nasty}, "data": {"root": "/" + "long" * 100}}
    text = report.page(
        nasty, {"run": nasty}, table, [(nasty, "b", 3)], {"wide": picture, **figures}, config, ["a note"]
    )
    assert not re.search(r'(src|href)="(?!data:)', text)
    script = """<script>
        const page = document.documentElement, all = [...document.images];
        document.body.dataset.found = JSON.stringify([page.scrollWidth <= page.clientWidth,
            getComputedStyle(document.body).backgroundColor, all.length, all.every((image) => image.naturalWidth > 0),
            document.querySelectorAll("script").length]);
        </script>"""
    page = tmp_path / "report.html"
    page.write_text(text.replace("</body>", f"{script}</body>"))
    seen = []
    for width, scheme in ((500, 1), (1400, 0)):
        words = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
        words += [f"--blink-settings=preferredColorScheme={scheme}", f"--user-data-dir={tmp_path / str(width)}"]
        done = subprocess.run([*words, "--dump-dom", page.as_uri()], capture_output=True, text=True, check=True)
        found_in_page = re.search(r'data-found="([^"]*)"', done.stdout)
        assert found_in_page
        seen.append(found_in_page[1].replace("&quot;", '"'))
    assert seen == ['[true,"rgb(255, 255, 255)",4,true,1]', '[true,"rgb(20, 24, 29)",4,true,1]']
