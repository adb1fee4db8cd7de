"""One self-contained page: curves of all runs, parallel coordinates, scatter, settings and figures, with a filter.

Plotly draws it, in whatever browser opens the file; nothing is fetched. page.html, page.css, page.filter.js and
page.js are the page, and what they show is a JSON in it.
"""

import base64
import io
import itertools
import json
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from alexlab.analysis.formats import finite
from alexlab.analysis.groups import Group
from alexlab.analysis.runs import Row, Run, low_is_good
from alexlab.analysis.settings import told
from alexlab.engine.files import name_in_errors
from alexlab.engine.kinds import is_number

HERE = Path(__file__).parent / "html"
SCRIPTS = ("page.filter.js", "page.js")
POINTS, FEW_POINTS = 400, 150  # of a curve, where runs are up to FEW, and more
FEW = 50
KEPT_AXES = ("epoch", "step", "perf/images", "perf/seconds")
FIRST = ("val/acc1", "val/loss", "train/loss", "train/acc1")  # panels that are open
OTHERS = ("val/acc5", "train/acc5", "perf/images_per_second", "perf/data_wait")
COLUMNS = ("val/acc1", "val/loss", "test/acc1", "images_per_second", "parameters", "seconds")
WITH_FIGURES = 12  # groups whose figures are on the page, the best first
WIDEST, LARGEST = 900, 20_000_000  # pixels, and bytes of a file that is read


def write(path: Path, groups: Sequence[Group], sort: str, notes: Sequence[str], asked: str = "") -> None:
    """
    Args:
        groups: the best first.
        sort: the number by which they are.
        notes: for the page's end, such as what was left out.
        asked: the command that makes it, for its head.
    """
    from plotly.offline import get_plotlyjs

    values = finite(data_of(groups, sort, notes) | {"asked": asked})
    # no text of a run may end the script that it stands in
    encoded = json.dumps(values, allow_nan=False, default=str).replace("<", "\\u003c")
    parts = {
        "TITLE": "Comparison of runs", "STYLE": (HERE / "page.css").read_text(), "DATA": encoded,
        "PLOTLY": get_plotlyjs(), "SCRIPT": "".join((HERE / name).read_text() for name in SCRIPTS),
    }  # fmt: skip
    pieces = re.split(r"__([A-Z]+)__", (HERE / "page.html").read_text())
    page = "".join(parts[piece] if number % 2 else piece for number, piece in enumerate(pieces))
    with name_in_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")


def data_of(groups: Sequence[Group], sort: str, noted: Sequence[str]) -> dict[str, Any]:
    """What the page shows."""
    runs = [run for group in groups for run in group.runs]
    points = POINTS if len(runs) <= FEW else FEW_POINTS
    numbers = list(dict.fromkeys(key for run in runs for key in run.numbers))
    notes = list(noted)
    told_groups: list[dict[str, Any]] = []
    for number, group in enumerate(groups):
        stats = {key: stat for key in numbers if (stat := group.stat(key)) and math.isfinite(stat.mean)}
        pictures = figures_of(group.runs[0].path / "figures", notes) if number < WITH_FIGURES else {}
        told_groups.append({
            "id": number, "name": group.name, "status": group.status, "paths": [str(run.path) for run in group.runs],
            "label": f"{group.name}  {told(group.apart)}".strip(), "settings": group.apart,
            "config": group.runs[0].config, "facts": group.runs[0].facts,
            "metrics": {key: stat.mean for key, stat in stats.items()},
            "std": {key: stat.std for key, stat in stats.items() if stat.std is not None},
            "fewer": {key: stat.n for key, stat in stats.items() if stat.n < len(group.runs)},
            "runs": [{"name": run.name, "label": f"{run.name}  {told(group.apart)}", **curves_of(run, points)}
                     for run in group.runs],
            "figures": pictures,
        })  # fmt: skip
    panels = list(dict.fromkeys(key for group in told_groups for run in group["runs"] for key in run["curves"]))
    ordered = [key for key in (*FIRST, *OTHERS) if key in panels]
    panels = ordered + sorted(key for key in panels if key not in ordered)
    settings = {key for group in groups for key, value in group.apart.items() if is_number(value)}
    if len(groups) > WITH_FIGURES and any(group["figures"] for group in told_groups):
        notes.append(f"figures: of the first {WITH_FIGURES} rows alone")
    bare = [run.name for run in runs if not run.rows]
    if bare:
        notes.append(f"without curves: {', '.join(bare[:10])}{' and more' if len(bare) > 10 else ''}")
    if any(len(run.rows) > points for run in runs):
        notes.append(f"curves of more than {points} points are drawn as means of as many stretches")
    curved = [run for group in told_groups for run in group["runs"] if run["curves"]]
    measured = ("images_per_second", "parameters", "macs", "seconds", "gpu_hours", "effective_lr")
    return {
        "groups": told_groups, "sort": sort, "count": len(runs), "panels": panels,
        "shown": [key for key in panels if key in FIRST][:4] or panels[:2],
        "columns": list(dict.fromkeys(key for key in (sort, *COLUMNS) if key in numbers)),
        "scatter": [key for key in (*measured, *sorted(settings), *numbers) if key in numbers or key in settings],
        "figures": list(dict.fromkeys(name for group in told_groups for name in group["figures"])),
        "x": "epoch" if all(run["per_epoch"] for run in curved) else "step",
        "low": [key for key in dict.fromkeys((*numbers, *panels, *settings)) if low_is_good(key)],
        "notes": notes, "about": f"by {sort} · {time.strftime('%Y-%m-%d %H:%M')}",
    }  # fmt: skip


def curves_of(run: Run, points: int) -> dict[str, Any]:
    """`curves`: {key: [steps, values]}; and what turns steps into other axes: `per_epoch` steps an epoch, `per_step`
    images a step (null where unknown), `clock` [steps, seconds of training]."""
    rows = run.rows
    curves: dict[str, list[list[float]]] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        plain = key.removesuffix("_step")
        if key in KEPT_AXES or key.endswith("_best") or not key.startswith(("train/", "val/", "lr", "perf/")):
            continue
        if plain != key or not any(f"{key}_step" in row for row in rows):  # the finer of both, under the plain name
            known = [(row["step"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]
            curves[plain] = thinned(known, points)
    config, summary = run.config, run.summary
    batch, accumulated = config.get("data.batch_size"), config.get("trainer.accumulate_grad_batches", 1)
    clock = thinned([(row["step"], row["perf/seconds"]) for row in rows if "perf/seconds" in row], points)
    return {
        "curves": {key: curve for key, curve in curves.items() if curve[0]},
        "per_epoch": summary.get("steps_per_epoch") or _steps_per_epoch(rows),
        "per_step": batch * accumulated if is_number(batch) and is_number(accumulated) else None,
        "clock": clock,
    }  # fmt: skip


def _steps_per_epoch(rows: Sequence[Row]) -> float | None:
    """Of a run that has not said it: its first validation is at an epoch's end, unless it was told otherwise."""
    ends = [row for row in rows if "val/loss" in row and "epoch" in row]
    return (ends[0]["step"] + 1) / (ends[0]["epoch"] + 1) if ends else None


def thinned(curve: list[tuple[float, float]], most: int) -> list[list[float]]:
    """[steps, values], of more than `most` points the means of as many stretches."""
    if len(curve) > most:
        edges = [round(i * len(curve) / most) for i in range(most + 1)]
        parts = [curve[a:b] for a, b in itertools.pairwise(edges)]
        curve = [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]
    return [[round(x, 2) for x, _ in curve], [float(f"{y:.6g}") for _, y in curve]]


def figures_of(folder: Path, notes: list[str]) -> dict[str, str]:
    """A run's pictures as addresses that hold them; what cannot be read is noted."""
    found = {}
    for path in sorted(path for path in folder.glob("*.png") if path.is_file()):  # no pipe
        try:
            if path.stat().st_size > LARGEST:
                raise ValueError(f"more than {LARGEST} bytes")
            with Image.open(path) as picture:
                drawn = picture.convert("RGB")
                drawn.thumbnail((WIDEST, 4 * WIDEST), Image.Resampling.LANCZOS)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            notes.append(f"left out: {path} ({error})")
            continue
        held = io.BytesIO()
        drawn.save(held, "WEBP", quality=82)
        found[path.stem] = f"data:image/webp;base64,{base64.b64encode(held.getvalue()).decode()}"
    return found
