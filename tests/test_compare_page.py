"""The page: what it holds, and what Chromium makes of it. The console of a browser has no errors."""

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
from test_compare import make_run

from alexlab.compare import page
from alexlab.compare.runs import Run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HEAD = "epoch,lr,perf/images,perf/seconds,step,train/acc1,train/loss,train/loss_step,val/acc1,val/acc1_best,val/loss\n"


def make_runs(folder: Path, count: int, rows: int = 10) -> None:
    for number in range(count):
        run = make_run(
            folder / f"r{number:03}", 0.1 / (number % 7 + 1), 0.25 + 0.5 * number / count, seed=number % 3,
            note=("<b>bold</b>", "</script><script>document.title='no'</script>", "a&b")[number % 3],
            trainer={"accumulate_grad_batches": 2}, data={"batch_size": 8},
        )  # fmt: skip
        lines = []
        for row in range(rows):
            step = 10 * row + 9
            lines.append(f"{row // 2},0.1,{(step + 1) * 16},{0.5 * row},{step},,,{2 - row / rows},,,")
            lines.append(f"{row // 2},,,,{step},0.5,1.5,,{row / rows * number / count},0.5,1.25")
        (run / "metrics.csv").write_text(HEAD + "\n".join(lines) + "\n")
        (run / "figures").mkdir()
        Image.fromarray(np.full((30, 40, 3), number, dtype=np.uint8)).save(run / "figures/curves.png")
        (run / "figures/broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")


def written(tmp_path: Path, count: int, *words: str) -> tuple[Path, dict[str, Any]]:
    make_runs(tmp_path / "runs", count)
    out = tmp_path / "page.html"
    done = command("compare.py", f"runs={tmp_path / 'runs'}", "format=html", f"out={out}", *words)
    assert done.returncode == 0, done.stderr
    assert f"{count} run(s) on one page: {out}" in done.stdout
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', out.read_text(), re.S)
    assert found is not None
    return out, json.loads(found[1])


def test_what_the_page_holds(tmp_path: Path) -> None:
    out, data = written(tmp_path, 3, "seeds=each")
    group = data["groups"][0]
    assert group["name"] == "r002"
    assert group["settings"] == {"optimizer.lr": 0.1 / 3, "seed": 2, "note": "a&b"}
    run = group["runs"][0]
    steps = [10.0 * row + 9 for row in range(10)]
    assert run["curves"]["train/loss"] == [steps, [round(2 - row / 10, 5) for row in range(10)]], "the finer one"
    assert "train/loss_step" not in run["curves"]
    assert "val/acc1_best" not in run["curves"]
    assert run["clock"] == [steps, [0.5 * row for row in range(10)]]
    assert run["per_step"] == 16
    assert run["per_epoch"] == 10
    assert set(group["figures"]) == {"curves"}
    assert sum("broken.png" in note for note in data["notes"]) == 3
    assert "://" not in re.sub(r"https?://(www\.w3\.org|plotly\.com|\w+\.github\.com)\S*", "", json.dumps(data))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', out.read_text())
    assert policy is not None
    assert policy[1].startswith("default-src 'none'"), "nothing is fetched"


def test_long_curves_are_drawn_as_means() -> None:
    curve = [(float(step), float(step % 2)) for step in range(1000)]
    steps, values = page.thinned(curve, 100)
    assert len(steps) == len(values) == 100
    assert (steps[0], steps[-1]) == (4.5, 994.5)
    assert values == [0.5] * 100
    assert page.thinned(curve[:3], 100) == [[0.0, 1.0, 2.0], [0.0, 1.0, 0.0]]


def test_curves_of_a_run_that_says_nothing_of_its_epochs() -> None:
    run = Run(Path("x"), "x", "finished", {})
    run.rows = [{"step": 4.0, "epoch": 0.0, "val/loss": 1.0}, {"step": 9.0, "epoch": 1.0, "val/loss": float("nan")}]
    told = page.curves_of(run, 10)
    assert told == {"curves": {"val/loss": [[4.0], [1.0]]}, "per_epoch": 5.0, "per_step": None, "clock": [[], []]}


def dom(path: Path, state: str, profile: Path) -> tuple[str, list[str]]:
    """The document as Chromium has made it, and what its console said."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
         f"--user-data-dir={profile}", "--window-size=1400,2000", "--virtual-time-budget=20000",
         "--enable-logging=stderr", "--log-level=0", "--dump-dom", f"file://{path}#{state}"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line and "GL Driver Message" not in line]
    return done.stdout, said


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's package chromium)")
@pytest.mark.parametrize("count", [1, 8, 100])
def test_in_a_browser(count: int, tmp_path: Path) -> None:
    out, _ = written(tmp_path, count, "seeds=each", "most=null")
    html, said = dom(out, "x=seconds&theme=dark", tmp_path / "profile")
    assert said == []
    assert f'data-ready="true" data-shown="{count}"' in html or f'data-shown="{count}" data-ready="true"' in html
    assert 'data-theme="dark"' in html
    assert html.count('aria-label="show r') == count
    assert f"{count} of {count} run" in html
    assert len(re.findall(r'class="scatterlayer mlayer"', html)) >= 4, "four panels of curves"
    lines = re.search(r'data-panel="val/acc1".*?class="scatterlayer mlayer">(.*?)</g></g></g>', html, re.S)
    assert lines is not None
    assert html.count("js-line") >= 4 * count
    assert 'data-title="Share' not in html, "Plotly's button that sends a chart away"
    assert "<title>Comparison of runs</title>" in html, "no run's text is a script"
    assert "<b>bold</b>" not in html.split("<footer")[0].split("</script>")[0]
    parallel = '<section id="parallel" hidden' not in html
    assert parallel == (count > 1)
    assert ('<section id="against" hidden' not in html) == (count > 1)
    assert html.count("<figure>") == min(count, page.WITH_FIGURES)


STATES = {  # and how many of eight runs are left
    "filter=optimizer.lr>0.04": 3, "filter=seed%3D0+note!%3Da%26b": 3, "filter=R00": 8, "filter=val/acc1>%3D0.5": 4,
    "filter=nothing": 0, "off=0+1": 6, "filter=optimizer.lr+>+0.04+and+status=finished": 3,
    "filter=name~r00+AND+model.name~ALEX": 8, "filter=seed%3D0+or+note%3D'a%26b'": 5, "filter=toString": 0,
    "x=step&theme=light": 8, "x=images&smooth=0.6&logy=1": 8, "colour=optimizer.lr&sx=seed&sy=optimizer.lr": 8,
    "filter=optimizer.l>0.04": 0,
}  # fmt: skip


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's package chromium)")
def test_what_is_chosen_in_a_browser(tmp_path: Path) -> None:
    """One start of it, in which the page is told to show one choice after the other; the first comes as its address."""
    out, _ = written(tmp_path, 8, "seeds=each")
    visits = """
    const states = %s;
    if (!location.hash) location.hash = states[0];  // as a bookmark does where the page is open: it loads again
    else document.body.dataset.told = JSON.stringify(states.map((chosen, place) => {
      if (place) { Object.assign(state, DEFAULTS, Object.fromEntries(new URLSearchParams(chosen))); draw(); }
      return [document.body.dataset.shown, $("wrong").textContent, getComputedStyle(document.body).backgroundColor];
    }));
    """
    page_of_all = tmp_path / "all.html"
    script = f"<script>{visits % json.dumps(list(STATES))}</script></body>"
    page_of_all.write_text(out.read_text().replace("</body>", script))
    html, said = dom(page_of_all, "", tmp_path / "profile")
    assert said == []
    found = re.search(r'data-told="([^"]*)"', html)
    assert found is not None
    told = json.loads(unescape(found[1]))
    assert {state: int(row[0]) for state, row in zip(STATES, told, strict=True)} == STATES
    assert [row[1] for row in told] == [""] * (len(STATES) - 1) + ["no run has optimizer.l"]
    assert told[10][2] == "rgb(255, 255, 255)", "light"
