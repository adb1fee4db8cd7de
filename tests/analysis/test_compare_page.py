"""The page: its data, and how Chromium renders it, without an error in the console."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import command
from PIL import Image
from test_runs import make_run, write_summary

from alexlab.analysis import page
from alexlab.analysis.compare import grouped
from alexlab.analysis.runs import Run
from alexlab.engine.errors import counted

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HEAD = (
    "epoch,lr,perf/images,perf/seconds,step,train/acc1,train/loss,train/loss_step,val/acc1,val/acc1_best,val/loss,"
    "val/my acc\n"
)
NOTES = ("<b>bold</b>", "</script><script>document.title='no'</script>", "a&b")


def make_runs(folder: Path, count: int, rows: int = 10) -> None:
    for number in range(count):
        run = make_run(
            folder / f"r{number:03}%{{y}}", 0.1 / (number % 7 + 1), 0.25 + 0.5 * number / count, seed=number % 3,
            note=NOTES[number % 3],
            trainer={"accumulate_grad_batches": 2}, data={"batch_size": 8},
        )  # fmt: skip
        best = {"val/acc1": 0.25 + 0.5 * number / count, "val/loss": 1.5}
        write_summary(
            run, hardware={"devices": "cpu", "device": "x86"},
            best={**best, "constructor": number % 4, "__proto__": number / 8},
        )  # fmt: skip
        lines = []
        for row in range(rows):
            step = 10 * row + 9
            lines.append(f"{row // 2},0.1,{(step + 1) * 16},{0.5 * row},{step},,,{2 - row / rows},,,,")
            lines.append(f"{row // 2},,,,{step},0.5,1.5,,{row / rows * number / count},0.5,1.25,0.75")
        (run / "metrics.csv").write_text(HEAD + "\n".join(lines) + "\n")
        (run / "figures").mkdir()
        Image.fromarray(np.full((30, 40, 3), number, dtype=np.uint8)).save(run / "figures/curves.png")
        (run / "figures/broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")


def written(tmp_path: Path, count: int, *overrides: str) -> tuple[Path, dict[str, Any]]:
    make_runs(tmp_path / "runs", count)
    out = tmp_path / "page.html"
    done = command("compare", f"runs={tmp_path / 'runs'}", "format=html", f"out={out}", *overrides)
    assert done.returncode == 0, done.stderr
    assert f"{count} of {counted(count, 'run')}: {out}" in done.stdout
    return out, data_in(out)


def data_in(path: Path) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.S)
    return json.loads(text)


def test_the_data_of_the_page(tmp_path: Path) -> None:
    out, data = written(tmp_path, 3, "seeds=each", "where=seed<9 and status=finished")
    group = data["groups"][0]
    words = f"runs={tmp_path / 'runs'} format=html out={out} seeds=each 'where=seed<9 and status=finished'"
    assert data["asked"] == f"alexlab compare {words}"
    assert data["x"] == "epoch"
    assert {"val/loss", "seconds", "val/acc1", "images_per_second"} & set(data["low"]) == {"val/loss", "seconds"}
    assert group["name"] == "r002%{y}"
    assert group["settings"] == {"optimizer.lr": 0.1 / 3, "seed": 2, "note": "a&b"}
    run = group["runs"][0]
    steps = [10.0 * row + 9 for row in range(10)]
    assert run["curves"]["train/loss"] == [steps, [round(2 - row / 10, 5) for row in range(10)]], "the finer curve"
    assert not {"train/loss_step", "val/acc1_best"} & set(run["curves"])
    assert run["clock"] == [steps, [0.5 * row for row in range(10)]]
    assert (run["per_step"], run["per_epoch"], set(group["figures"])) == (16, 10, {"curves"})
    assert sum("broken.png" in note for note in data["notes"]) == 3
    assert "://" not in re.sub(r"https?://(www\.w3\.org|plotly\.com|\w+\.github\.com)\S*", "", json.dumps(data))
    assert """Content-Security-Policy" content="default-src 'none'""" in out.read_text(), "nothing is fetched"


def test_long_curves_are_drawn_as_means() -> None:
    curve = [(float(step), float(step % 2)) for step in range(1000)]
    steps, values = page.thinned(curve)
    assert (len(steps), steps[0], steps[-1], values[:2]) == (200, 2.0, 997.0, [0.4, 0.6])
    assert page.thinned(curve[:3]) == [[0.0, 1.0, 2.0], [0.0, 1.0, 0.0]]


def test_steps_per_epoch_follow_from_the_first_validation() -> None:
    run = Run(Path("x"), "x", "finished", {})
    run.rows = [{"step": 4.0, "epoch": 0.0, "val/loss": 1.0}, {"step": 9.0, "epoch": 1.0, "val/loss": float("nan")}]
    curves = {"val/loss": [[4.0], [1.0]]}
    assert page.curves_of(run) == {"curves": curves, "per_epoch": 5.0, "per_step": None, "clock": [[], []]}


def test_curves_are_drawn_by_epoch_if_all_runs_recorded_epochs(tmp_path: Path) -> None:
    known, foreign = (Run(tmp_path, name, "finished", {"seed": name}) for name in "ab")
    known.rows = [{"step": 4.0, "epoch": 0.0, "val/loss": 1.0}]
    foreign.rows = [{"step": 4.0, "val/loss": 1.0}]
    assert page.data_of(grouped([known]), "val/loss", [])["x"] == "epoch"
    assert page.data_of(grouped([known, foreign]), "val/loss", [])["x"] == "step"


def dom(path: Path, state: str, profile: Path, width: int = 1400) -> tuple[str, list[str]]:
    """Return the document as rendered by Chromium, and the lines of its console."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
         f"--user-data-dir={profile}", f"--window-size={width},2000", "--virtual-time-budget=20000",
         "--enable-logging=stderr", "--log-level=0", "--dump-dom", f"file://{path}#{state}"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line and "GL Driver Message" not in line]
    return done.stdout, console


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's package chromium)")
@pytest.mark.parametrize("count", [1, 14])
def test_the_page_is_drawn_in_a_browser(count: int, tmp_path: Path) -> None:
    out, _ = written(tmp_path, count, "seeds=each", "most=null")
    html, console = dom(out, "x=seconds&theme=dark", tmp_path / "profile")
    assert console == []
    assert f'data-ready="true" data-shown="{count}"' in html or f'data-shown="{count}" data-ready="true"' in html
    assert 'data-theme="dark"' in html
    assert html.count('aria-label="show r') == count
    assert f"{count} of {count} run" in html
    assert len(re.findall(r'class="scatterlayer mlayer"', html)) >= 4, "four panels of curves"
    assert re.search(r'data-panel="val/acc1".*?class="scatterlayer mlayer">(.*?)</g></g></g>', html, re.S)
    assert html.count("js-line") >= 4 * count
    assert 'data-title="Share' not in html, "Plotly's button that sends a chart away"
    assert "<title>Comparison of runs</title>" in html, "no text of a run is a script"
    assert "<b>bold</b>" not in html.split("<footer")[0].split("</script>")[0]
    for section in ("parallel", "against"):
        assert (f'<section id="{section}" hidden' not in html) == (count > 1)
    assert html.count("<figure>") == min(count, page.WITH_FIGURES)


STATES = {  # the address after #, and how many of eight runs are shown
    "filter=optimizer.lr>0.04": 3, "filter=seed%3D0+note!%3Da%26b": 3, "filter=R00": 8, "filter=val/acc1>%3D0.5": 4,
    "filter=nothing": 0, "off=0+1": 6, "filter=optimizer.lr+>+0.04+and+status=finished": 3,
    "filter=name~r00+AND+model.name~ALEX": 8, "filter=seed%3D0+or+note%3D'a%26b'": 5, "filter=toString": 0,
    "x=step&theme=light": 8, "x=images&smooth=0.6&logy=1": 8, "colour=optimizer.lr&sx=seed&sy=optimizer.lr": 8,
    "filter=optimizer.l>0.04": 0, "filter=lr>0.04": 0, "filter=optimizer.lr>abc": 0, "filter=note<%3D3": 0,
    "filter=unheard=3": 0, "filter=val/acc1>null": 0, "filter=seed>0": 5, "filter=device=x86": 8,
    "filter=status=finished+%26+seed=0": 0, "filter=(seed=0)": 0, "filter=seed=": 8,
}  # fmt: skip
NO_NUMBER = "is not a number: compare text with =, != or ~ (contains)."
NO_CONDITION = "is not a condition: write KEY SIGN VALUE, joined with `and` or `or`, without brackets."
MISTAKES = {
    "filter=optimizer.l>0.04": "no run has optimizer.l. Did you mean optimizer.lr?",
    "filter=lr>0.04": "no run has lr. Did you mean optimizer.lr?",
    "filter=optimizer.lr>abc": f"`abc` {NO_NUMBER}", "filter=val/acc1>null": f"`null` {NO_NUMBER}",
    "filter=note<%3D3": f"`{NOTES[7 % 3]}` {NO_NUMBER}",
    "filter=status=finished+%26+seed=0": f"`&` {NO_CONDITION}", "filter=(seed=0)": f"`(seed=0)` {NO_CONDITION}",
    "filter=seed=": f"`seed=` {NO_CONDITION}",
    "filter=unheard=3": "no run has unheard. Keys are status, name, metrics and settings.",
}  # fmt: skip
VISITS = """
(() => {
  const states = STATES;
  if (!location.hash) { location.hash = states[0]; return; }  // like a bookmark: the page loads again
  document.body.dataset.states = JSON.stringify(states.map((chosen, place) => {
    if (place) choose(Object.fromEntries(new URLSearchParams(chosen)));
    return [document.body.dataset.shown, $("wrong").textContent, getComputedStyle(document.body).backgroundColor];
  }));
  function choose(chosen) { Object.assign(state, DEFAULTS, chosen); draw(); }
  const box = (node) => node.getBoundingClientRect();
  const row = () => [...$("runs").tBodies[0].rows[0].cells];
  const found = {}, scroll = $("runs").parentElement;
  choose({});
  found.heads = [...$("runs").tHead.rows[0].cells].map((cell) => cell.textContent);
  found.cells = row().slice(0, 7).map((cell) => cell.textContent);
  found.right = row().slice(0, 2).map((cell) => box(cell).right);
  const shown = () => [...document.querySelectorAll("#scatter .textpoint")]
    .filter((label) => label.style.visibility !== "hidden");
  const labels = () => shown().map((label) => label.textContent);
  found.labels = labels();
  choose({ filter: "seed=0 or note='a&b'" });
  found.short = labels();
  choose({ sx: "constructor", sy: "images_per_second" });  // two runs on each point
  found.crowded = labels().length;
  found.overlapping = shown().map(box).filter((a, i, all) => all.slice(i + 1)
    .some((b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom)).length;
  choose({});
  const chart = document.querySelector('[data-panel="val/acc1"]');
  Plotly.Fx.hover(chart, [{ curveNumber: 0, pointNumber: 4 }]);
  found.hover = chart.querySelector(".hoverlayer").textContent;
  choose({ filter: "nothing" });
  found.empty = ["lines", "parallel", "against", "pictures"].filter((id) => !$(id).hidden);
  choose({ sx: "constructor", sy: "__proto__" });
  found.points = document.querySelectorAll("#scatter .point").length;
  const own = document.querySelector('[data-panel="val/my acc"]');
  found.spaced = own.querySelectorAll(".js-line").length;
  [...$("choose").children].find((label) => label.textContent === "val/my acc").firstElementChild.click();
  found.closed = own.hidden;
  choose({ panels: "", theme: "dark" });
  found.charts = [...document.querySelectorAll(".chart")].filter((node) => !node.hidden).length;
  found.axis = getComputedStyle(document.querySelector(".parcoords .axis path")).stroke;
  found.ticks = [[0.2, 2], [0.5, 60], [0.1, 0.4]].map((x) => wholeEpochs([{ x }]).dtick ?? null);
  found.log = [[[1, 2], [2, 4000]], [[1, 2], [2, 30]], [[0, 1], [2, 4000]]]
    .map((curves) => hasDiverged(curves.map((y) => ({ y }))));
  found.order = value({ settings: {}, config: { seconds: 3 }, metrics: { seconds: 5 } }, "seconds");
  found.written = WRITTEN.map(([key, ...rows]) => {
    data.groups = rows.map(([mean, std]) => ({ metrics: { [key]: mean }, std: std ? { [key]: std } : {} }));
    return rows.map((numbers) => writer(key)(...numbers));
  });
  data.groups = [[1, 1, 1], [1, 2, 1], [1, 3, 2], [2, 4, 2]]
    .map(([a, b, c]) => ({ settings: { a, b, c }, config: {}, metrics: {}, facts: {} }));
  found.alone = ["a", "b", "c"].filter(isAlone);
  scroll.addEventListener("scroll", () => {
    found.stays = box(row()[0]).left - box(scroll).left;
    found.edges = [...scroll.parentElement.classList].sort();
    document.body.dataset.found = JSON.stringify(found);
  });
  scroll.scrollLeft = 120;
})();
"""
WRITTEN = {  # (mean, deviation) in one column, and how they are written
    "images_per_second": ([(195.2, 6.41), (1009.71,)], ["195±6", "1010"]),
    "seconds": ([(34.87, 1.66), (9.27,), (48.1,), (109,)], ["34.9±1.7", "9.3", "48.1", "109.0"]),
    "parameters": ([(56890000,), (11689512,)], ["56.89 M", "11.69 M"]),
    "val/acc1": ([(0.5, 0.01), (0.25,)], ["0.5000±0.0100", "0.2500"]),
    "val/loss": ([(0.63,), (0.71,), (86.3,)], ["0.6300", "0.7100", "86.3000"]),
    "epochs": ([(2,), (90,)], ["2", "90"]),
    "effective_lr": ([(0.0001,)], ["1.00e-4"]),
}


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's package chromium)")
def test_controls_of_the_page_in_a_browser(tmp_path: Path) -> None:
    """Chromium starts once: a script applies one state after the other; the first state comes with the address."""
    out, _ = written(tmp_path, 8, "seeds=each")
    page_of_all = tmp_path / "all.html"
    columns = json.dumps([[key, *rows] for key, (rows, _) in WRITTEN.items()])
    script = VISITS.replace("STATES", json.dumps(list(STATES))).replace("WRITTEN", columns)
    page_of_all.write_text(out.read_text().replace("</body>", f"<script>{script}</script></body>"))
    html, console = dom(page_of_all, "", tmp_path / "profile", width=500)
    assert console == []
    states, found = (
        json.loads(unescape(value[1])) for name in ("states", "found")
        if (value := re.search(rf'data-{name}="([^"]*)"', html))
    )  # fmt: skip
    assert {state: int(row[0]) for state, row in zip(STATES, states, strict=True)} == STATES
    assert {state: row[1] for state, row in zip(STATES, states, strict=True) if row[1]} == MISTAKES
    assert states[10][2] == "rgb(255, 255, 255)", "light"

    assert found["heads"] == [
        "run", "best.ckpt\nval/acc1", "note", "optimizer.\nlr", "seed", "best.ckpt\nval/loss", "test/acc1",
        "images/s", "seconds",
    ]  # fmt: skip
    note = "…pt><script>document.title='no'</script>"
    assert found["cells"] == [" r007%{y}", "0.6875", note, "0.1", "1", "1.5000", "0.2500"]
    assert all(right < 400 for right in found["right"]), "on a telephone, too"
    assert found["stays"] == pytest.approx(1, abs=1), "the name, however far one scrolls"
    assert found["edges"] == ["after", "before", "edged"]
    assert found["labels"] == [f"r00{number}%{{y}}" for number in reversed(range(8))], "one note is too long"
    assert found["short"] == [
        "<b>bold</b> lr=0.01429", "a&b lr=0.01667", "<b>bold</b> lr=0.025", "a&b lr=0.03333", "<b>bold</b> lr=0.1",
    ]  # fmt: skip
    assert 2 <= found["crowded"] <= 4, "of eight runs on four points; how many fit depends on the fonts"
    assert found["overlapping"] == 0
    assert "r007%{y}" in found["hover"]
    assert found["empty"] == []
    assert found["points"] == found["spaced"] == 8, "the curves of a metric of yours are shown"
    assert found["closed"], "by its checkbox"
    assert found["charts"] == 0
    assert found["axis"] == "rgb(154, 167, 180)", "--quiet of the dark theme"
    assert found["ticks"] == [1, None, None]
    assert found["log"] == [True, False, False], "of curves of which one has diverged, and no value is 0"
    assert found["alone"] == ["a"], "what only one run has different"
    assert found["order"] == 3, "a setting comes before a metric of the same name"
    assert found["written"] == [words for _, words in WRITTEN.values()]
