"""examples/serve.py, started and asked."""

import base64
import csv
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, clean_env, command, tiny_train, wait_for

from alexlab.engine.launcher import free_port

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def run_dir(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "train/runs/one"
    assert tiny_train(shapes, folder).returncode == 0
    done = command("export", f"run={folder}", "format=onnx")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def address(run_dir: Path) -> Iterator[str]:
    port = free_port(None)
    words = [sys.executable, "examples/serve.py", str(run_dir / "model.onnx"), str(port)]
    process = subprocess.Popen(words, cwd=ROOT, env=clean_env(), stderr=subprocess.DEVNULL)

    def answers() -> bool:
        assert process.poll() is None
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/docs").status == 200
        except OSError:
            return False

    try:
        wait_for(answers)
        yield f"http://127.0.0.1:{port}/predict"
    finally:
        process.kill()
        process.wait()


def ask(address: str, images: list[str]) -> Any:
    body = json.dumps({"images": images}).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request))


def test_a_batch_gets_the_probabilities_of_predict(address: str, run_dir: Path, shapes: Path) -> None:
    paths = sorted((shapes / "test").rglob("*.jpg"))[:3]
    answers = ask(address, [base64.b64encode(path.read_bytes()).decode() for path in paths])
    done = command("predict", f"run={run_dir}", f"images={shapes}/test")
    assert done.returncode == 0, done.stderr
    with (run_dir / "predictions.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["path"] in map(str, paths)]
    assert [len(answer) for answer in answers] == [5, 5, 5]
    for row, found in zip(rows, (each for answer in answers for each in answer), strict=True):
        assert found["probability"] == pytest.approx(float(row["probability"]), abs=2e-3)


def test_what_is_no_image_is_refused(address: str) -> None:
    for images, sentence in ((["bm8="], "not an image in base64"), ([], "at least 1 item")):
        with pytest.raises(urllib.error.HTTPError) as raised:
            ask(address, images)
        assert raised.value.code == 422
        assert sentence in raised.value.read().decode()
