"""examples/demo.py, started and asked as the page does, by Gradio's client."""

import csv
import importlib.util
import os
import re
import signal
import socket
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from conftest import ROOT, command, tiny_train
from PIL import Image

import alexlab
from alexlab.data import decode
from alexlab.engine.launcher import free_port
from alexlab.engine.targets import build_network
from alexlab.tasks import hub

gradio_client = pytest.importorskip("gradio_client")
NEEDED = ("gradio", "captum", "safetensors", "timm")
pytestmark = pytest.mark.skipif(not all(map(importlib.util.find_spec, NEEDED)), reason=f"needs {', '.join(NEEDED)}")


def asked(run: Path, image: Path, folder: Path) -> dict[str, Any]:
    """Start the demo of a run, and return what it answers and serves.

    `classes` is {class: probability}, `cam` the path of the Grad-CAM or None, `text` what is below it, `error` the
    answer to a file that is no image, `page` and `style` the HTML and the CSS, `listens` the addresses of the server.
    """
    port, found, errors = free_port(None), dict[str, Any](), list[Exception]()
    address, broken = f"http://127.0.0.1:{port}/", folder / "notes.jpg"
    broken.write_text("no image")

    def ask(pid: int) -> None:
        if found or errors:
            return
        try:
            found["page"] = urllib.request.urlopen(address).read().decode()
        except OSError:  # the demo is still starting
            return
        try:
            found["style"] = urllib.request.urlopen(f"{address}theme.css").read().decode()
            connections = psutil.Process(pid).net_connections()
            found["listens"] = {each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN}
            client = gradio_client.Client(address, verbose=False, analytics_enabled=False, download_files=str(folder))
            label, found["cam"], found["text"] = client.predict(gradio_client.handle_file(str(image)))
            found["classes"] = {each["label"]: each["confidence"] for each in label["confidences"]}
            with pytest.raises(gradio_client.exceptions.AppError) as raised:
                client.predict(gradio_client.handle_file(str(broken)))
            found["error"] = str(raised.value)
        except Exception as error:  # after which the demo must end, too
            errors.append(error)
        finally:
            os.kill(pid, signal.SIGKILL)

    done = command("examples/demo.py", str(run), str(port), watch=ask, env={"GRADIO_TEMP_DIR": str(folder)})
    assert not errors, errors
    assert found, done.stderr
    return found


def test_the_page_shows_the_classes_of_predict_and_the_grad_cam(shapes: Path, tmp_path: Path) -> None:
    run, path = tmp_path / "train/runs/one", next((shapes / "test").rglob("*.jpg"))
    assert tiny_train(shapes, run).returncode == 0
    done = command("predict", f"run={run}", f"images={path}")
    assert done.returncode == 0, done.stderr
    with (run / "predictions.csv").open() as file:
        expected = {row["class"]: float(row["probability"]) for row in csv.DictReader(file)}
    found = asked(run, path, tmp_path)
    assert list(found["classes"]) == list(expected)
    assert len(expected) == 5
    assert found["classes"] == pytest.approx(expected, abs=1e-5)

    crop = decode.read(str(path), alexlab.load(run).transform.crop).permute(1, 2, 0).numpy()
    drawn = np.asarray(Image.open(found["cam"]).convert("RGB"), int)
    assert drawn.shape == crop.shape == (64, 64, 3)
    assert np.abs(drawn - crop).mean() > 20
    assert found["text"] == ""
    assert re.match(r"notes\.jpg cannot be read as an image \(no image", found["error"])

    # nothing is loaded from elsewhere, nor offered to others
    loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"([^\"]+)", found["page"])
    assert any(each.endswith(".js") for each in loaded)
    assert not [each for each in loaded if "//" in each]
    assert '"stylesheets":[]' in found["page"], "fonts of Google's"
    assert '"analytics_enabled":false' in found["page"]
    assert not re.findall(r"@import|url\(['\"]?(?:https?:)?//", found["style"])
    assert found["listens"] == {"127.0.0.1"}


def test_a_vision_transformer_has_classes_and_the_reason_why_there_is_no_grad_cam(shapes: Path, tmp_path: Path) -> None:
    """Of a folder of format=hub, with any number of classes per image."""
    path, settings = next((shapes / "test").rglob("*.jpg")), {"name": "test_vit", "pretrained": False, "in_channels": 3}
    settings["_target_"] = "alexlab.models.pretrained.timm_net"
    about = {
        "name": "test_vit", "net": settings, "is_timm": False, "multilabel": True, "crop_ratio": 0.875,
        "classes": ["a", "b", "c"], "class_folders": ["a", "b", "c"], "height": 64, "width": 64, "covered": [73, 73],
        "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
    }  # fmt: skip
    hub.save(build_network(settings, 3, trusted=()), about, tmp_path / "hub")
    found = asked(tmp_path / "hub", path, tmp_path)
    net, transform, classes = alexlab.load(tmp_path / "hub")
    values = net(transform(path)[None])[0].sigmoid().tolist()
    assert found["classes"] == pytest.approx(dict(zip(classes, values, strict=True)), abs=1e-5)
    assert found["cam"] is None
    assert found["text"].startswith("Grad-CAM needs at least two convolutions")


def test_a_port_that_is_in_use_or_none_is_an_error(tmp_path: Path) -> None:
    run = ROOT / "tests/fixtures/runs/finished"
    with socket.create_server(("127.0.0.1", 0)) as used:
        for port in (str(used.getsockname()[1]), "abc"):
            done = command("examples/demo.py", str(run), port)
            assert done.returncode == 1
            assert done.stderr.splitlines()[-1] == (
                f"error: PORT={port} is in use, or is no port: give another, or none for the next free one."
            )
            assert "Traceback" not in done.stderr


def test_a_run_that_does_not_exist_is_an_error() -> None:
    done = command("examples/demo.py", "nowhere")
    assert (done.returncode, done.stderr.splitlines()[0]) == (
        2, "error: `run=nowhere` is not a run's directory (it has no config.yaml): give one, or latest.",
    )  # fmt: skip
