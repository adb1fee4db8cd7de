"""A self-contained HTML page about runs: a table with a filter, curves, parallel coordinates, a scatter plot, figures.

Plotly draws it in whatever browser opens the file; nothing is fetched. The page is html/page.html, page.css,
page.filter.js and page.js, and shows the JSON that is embedded in it.
"""

import base64
import io
import json
import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from alexlab.analysis.compare import Group, as_text, columns_of, finite
from alexlab.analysis.runs import Run, is_number, steps_per_epoch
from alexlab.engine.metrics import is_always_one

HTML = Path(__file__).parent / "html"
MAX_POINTS = 200  # of a curve
OPEN_PANELS = 6
WITH_FIGURES = 12  # groups whose figures are on the page, the best first
MAX_WIDTH = 900  # pixels of a figure


def render(groups: Sequence[Group], sort: str, notes: Sequence[str], command: str) -> str:
    """Return the page of groups that are sorted by a metric, with the command at the top, and the notes at the end."""
    from plotly.offline import get_plotlyjs

    values = finite({**data_of(groups, sort, notes), "asked": command})
    # without <, no text can end the script element
    encoded = json.dumps(values).replace("<", "\\u003c")
    parts = {
        "STYLE": (HTML / "page.css").read_text(),
        "DATA": encoded,
        "PLOTLY": get_plotlyjs(),
        "SCRIPT": (HTML / "page.filter.js").read_text() + (HTML / "page.js").read_text(),
    }
    return re.sub(r"__([A-Z]+)__", lambda match: parts[match[1]], (HTML / "page.html").read_text())


def data_of(groups: Sequence[Group], sort: str, notes: Sequence[str]) -> dict[str, Any]:
    """Return what the page shows, as values for JSON."""
    runs = [run for group in groups for run in group.runs]
    notes = list(notes)
    titles = Counter(group.title for group in groups)
    shown: list[dict[str, Any]] = []
    for number, group in enumerate(groups):
        text = as_text(group.settings)
        title = group.title if titles[group.title] == 1 else f"{group.title} {group.name}"
        shown.append(
            {
                "id": number,
                "name": group.name,
                "title": title,
                "status": group.status,
                "paths": [str(run.path) for run in group.runs],
                "label": f"{title}  {text}".strip(),
                "settings": group.settings,
                "config": group.runs[0].settings,
                "facts": group.runs[0].facts,
                "metrics": {key: stat.mean for key, stat in group.stats.items()},
                "std": {key: stat.std for key, stat in group.stats.items() if stat.std is not None},
                "intervals": {key: stat.interval for key, stat in group.stats.items() if stat.interval is not None},
                "fewer": {key: stat.n for key, stat in group.stats.items() if stat.n < len(group.runs)},
                "runs": [{"name": run.name, "label": f"{title}  {text}", **curves_of(run)} for run in group.runs],
                "figures": figures_of(group.runs[0].path / "figures", notes) if number < WITH_FIGURES else {},
            }
        )
    metrics = list(dict.fromkeys(key for run in runs for key in run.metrics))
    numeric = sorted({key for group in groups for key, value in group.settings.items() if is_number(value)})
    # the order of the panels: these, then the user's own metrics, then speed
    first = ("val/acc1", "val/loss", "train/loss", "train/acc1")
    panels = {key for group in shown for run in group["runs"] for key in run["curves"]}
    rest = sorted(panels.difference(first), key=lambda key: (not key.startswith("val/"), key.startswith("perf/"), key))
    ordered = [*(key for key in first if key in panels), *rest]
    notes += dict.fromkeys(f"skipped: {line}" for run in runs for line in run.problems)
    have_epochs = all(run["per_epoch"] for group in shown for run in group["runs"] if run["curves"])
    facts = ("images_per_second", "parameters", "macs", "seconds", "gpu_hours", "effective_lr")
    return {
        "groups": shown,
        "sort": sort,
        "count": len(runs),
        "panels": ordered,
        "shown": ordered[:OPEN_PANELS],
        "columns": [key for key in columns_of(groups, sort) if key == sort or not key.startswith("last/")],
        "scatter": list(dict.fromkeys((*(key for key in facts if key in metrics), *numeric, *metrics))),
        "figures": list(dict.fromkeys(name for group in shown for name in group["figures"])),
        "x": "epoch" if have_epochs else "step",
        "low": [key for key in dict.fromkeys((*metrics, *ordered, *numeric)) if runs[0].lower_is_better(key)],
        "notes": notes,
        "about": f"by {sort} · {time.strftime('%Y-%m-%d %H:%M')}",
    }


def curves_of(run: Run) -> dict[str, Any]:
    """Return `curves`: {key: [steps, values]}, and what converts steps to the axes: `per_epoch` steps per epoch,
    `per_step` images per step (None if unknown), `clock` [steps, seconds of training]."""
    rows = run.rows
    curves: dict[str, list[list[float]]] = {}
    keys = dict.fromkeys(key for row in rows for key in row)
    for key in keys:
        wanted = key.startswith(("train/", "val/", "lr", "perf/")) and key not in ("perf/images", "perf/seconds")
        # the curve of KEY_step is finer and is shown instead of KEY's, under the name of KEY
        if wanted and not key.endswith("_best") and f"{key}_step" not in keys:
            curve = [(row["step"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]
            if curve and not is_always_one(key, [y for _, y in curve]):
                curves[key.removesuffix("_step")] = thinned(curve)
    batch, accumulated = run.settings.get("data.batch_size"), run.settings.get("trainer.accumulate_grad_batches", 1)
    return {
        "curves": curves,
        "per_epoch": steps_per_epoch(run.summary, rows),
        "per_step": batch * accumulated if is_number(batch) and is_number(accumulated) else None,
        "clock": thinned([(row["step"], row["perf/seconds"]) for row in rows if "perf/seconds" in row]),
    }


def thinned(curve: list[tuple[float, float]]) -> list[list[float]]:
    """Return [steps, values]. A curve with more than MAX_POINTS becomes the means of as many stretches."""
    if len(curve) > MAX_POINTS:
        curve = [part.mean(0).tolist() for part in np.array_split(np.array(curve), MAX_POINTS)]
    return [[round(x, 2) for x, _ in curve], [float(f"{y:.6g}") for _, y in curve]]


def figures_of(folder: Path, notes: list[str]) -> dict[str, str]:
    """Return a run's figures as {name: data URL}, and add a line to `notes` for each that cannot be read."""
    urls = {}
    for path in sorted(path for path in folder.glob("*.png") if path.is_file()):
        try:
            with Image.open(path) as picture:
                small = picture.convert("RGB")
                small.thumbnail((MAX_WIDTH, 4 * MAX_WIDTH), Image.Resampling.LANCZOS)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            notes.append(f"skipped: {path}: {error}")
            continue
        file = io.BytesIO()
        small.save(file, "WEBP", quality=82)
        urls[path.stem] = f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
    return urls
