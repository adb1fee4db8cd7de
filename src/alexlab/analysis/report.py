"""The table of classes, the figures of the probabilities, and report.html, a page about one run."""

import base64
import html
import io
import json
import string
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from PIL import Image
from torchmetrics.functional.classification import multiclass_average_precision, multiclass_roc
from torchmetrics.functional.classification import multiclass_precision_recall_curve as pr_curve

from alexlab.analysis import plots
from alexlab.analysis.calibration import Calibration, Outputs, calibration_error, reliability
from alexlab.engine.config import Plain, flat
from alexlab.engine.text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONFUSIONS = 10
PAGE = Path(__file__).parent / "html/report.html"


def class_table(outputs: Outputs, names: Sequence[str]) -> pd.DataFrame:
    """Return precision, recall, f1, average precision and support (number of images) of each class.

    A precision without predictions, and the rest without images of the class, is NaN.
    """
    classes, predicted = len(names), outputs.logits.argmax(1)
    hits = outputs.targets[predicted == outputs.targets].bincount(minlength=classes).double()
    support = outputs.targets.bincount(minlength=classes)
    chosen = predicted.bincount(minlength=classes)
    probabilities = outputs.logits.double().softmax(1)
    areas = multiclass_average_precision(probabilities, outputs.targets, classes, average=None)
    table = {
        "precision": hits / chosen,
        "recall": hits / support,
        "f1": torch.where(support > 0, 2 * hits / (chosen + support), torch.nan),
        "average_precision": torch.where(support > 0, areas, torch.nan),
        "support": support,
    }
    return pd.DataFrame({key: column.numpy() for key, column in table.items()}, index=list(names))


def confusions(outputs: Outputs, names: Sequence[str], most: int = CONFUSIONS) -> list[tuple[str, str, int]]:
    """Return (class, predicted class, number of images) of the most frequent mistakes."""
    predicted, targets = outputs.logits.argmax(1), outputs.targets
    wrong = predicted != targets
    pairs, counts = torch.stack([targets[wrong], predicted[wrong]], 1).unique(dim=0, return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:most]
    rows = zip(pairs[order].tolist(), counts[order].tolist(), strict=True)
    return [(names[target], names[guess], count) for (target, guess), count in rows]


# -- figures


def figures(
    outputs: Outputs, names: Sequence[str], calibration: Calibration | None, of: str
) -> Iterator[tuple[str, "Figure"]]:
    """Yield the name and the figure of precision and recall, the ROC and the reliability diagram.

    Args:
        of: the images and weights, for the titles, such as "test, best.ckpt".
    """
    probabilities, targets, classes = outputs.logits.double().softmax(1), outputs.targets, len(names)
    precision, recall, _ = pr_curve(probabilities, targets, classes)
    false_positives, true_positives, _ = multiclass_roc(probabilities, targets, classes)
    present = targets.bincount(minlength=classes).nonzero().flatten().tolist()
    shown = [names[k] for k in present]
    # torchmetrics' recall falls, and a curve that is averaged must rise
    lines = [(recall[k].flip(0).numpy(), precision[k].flip(0).numpy()) for k in present]
    yield "precision_recall", plots.lines_of_classes(lines, shown, ("recall", "precision"), of)
    lines = [(false_positives[k].numpy(), true_positives[k].numpy()) for k in present]
    yield "roc", plots.lines_of_classes(lines, shown, ("false positive rate", "true positive rate"), of)
    error = calibration_error(outputs) if calibration is None else calibration.error
    panels = {f"ECE {error:.1%}": reliability(outputs)}
    if calibration is not None:
        title = f"ECE {calibration.error_calibrated:.1%} with temperature {calibration.temperature:.2f}"
        panels[f"{title}\n{calibration.source}"] = reliability(outputs, calibration.temperature)
    yield "reliability", plots.reliability(panels, of)


# -- the page


def page(
    title: str,
    facts: Mapping[str, Any],
    table: pd.DataFrame,
    mistakes: Sequence[tuple[str, str, int]],
    pictures: Mapping[str, bytes],
    config: Plain,
    notes: Sequence[str],
) -> str:
    """Return a self-contained HTML page, which fetches nothing.

    Args:
        facts: rows of the first table.
        table: of `class_table`.
        mistakes: of `confusions`.
        pictures: PNG files by caption.
        config: of the run.
    """
    settings = "".join(f"<tr><th>{_(key)}</th><td>{_(as_text(value))}</td></tr>" for key, value in flat(config).items())
    parts = {
        "title": _(title),
        "facts": "".join(f"<tr><th>{_(key)}</th><td>{_(value)}</td></tr>" for key, value in facts.items()),
        "classes": f"<h2>Classes</h2>{_scroll(_class_rows(table))}",
        "mistakes": f"<h2>Most frequent mistakes</h2>{_scroll(_mistake_rows(mistakes))}" if mistakes else "",
        "figures": "".join(
            f'<figure><figcaption>{_(caption.replace("_", " "))}</figcaption><img alt="{_(caption)}" '
            f'src="data:image/png;base64,{base64.b64encode(content).decode()}"></figure>'
            for caption, content in pictures.items()
        ),
        "settings": settings,
        "notes": "".join(f"<p>{_(note)}</p>" for note in notes),
        "time": time.strftime("%Y-%m-%d %H:%M"),
    }
    return string.Template(PAGE.read_text()).substitute(parts)


def as_png(picture: "Image.Image | Figure") -> bytes:
    file = io.BytesIO()
    if isinstance(picture, Image.Image):
        picture.save(file, "PNG")
    else:
        picture.savefig(file, format="png", dpi=130)
    return file.getvalue()


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _(value: Any) -> str:
    """Return a value as text of HTML."""
    return html.escape(printable(str(value)))


def _scroll(rows: str) -> str:
    return f'<div class="scroll" tabindex="0"><table>{rows}</table></div>'


def _class_rows(table: pd.DataFrame) -> str:
    rows = ["<tr><th>class</th>" + "".join(f"<th class=n>{_(key.replace('_', ' '))}</th>" for key in table) + "</tr>"]
    for name, row in table.iterrows():
        cells = [f"{value:,.0f}" if key == "support" else f"{value:.4f}" for key, value in row.items()]
        cells = ["–" if cell == "nan" else cell for cell in cells]
        rows.append(f"<tr><th>{_(name)}</th>" + "".join(f"<td class=n>{cell}</td>" for cell in cells) + "</tr>")
    means = [f"{column.sum():,.0f}" if key == "support" else f"{column.mean():.4f}" for key, column in table.items()]
    rows.append("<tr><th>mean (sum)</th>" + "".join(f"<th class=n>{cell}</th>" for cell in means) + "</tr>")
    return "".join(rows)


def _mistake_rows(mistakes: Sequence[tuple[str, str, int]]) -> str:
    rows = [f"<tr><td>{_(a)}</td><td>{_(b)}</td><td class=n>{count:,}</td></tr>" for a, b, count in mistakes]
    return "<tr><th>class</th><th>predicted</th><th class=n>images</th></tr>" + "".join(rows)
