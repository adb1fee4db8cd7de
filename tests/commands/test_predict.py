"""`alexlab predict` and `alexlab.load` give the classes of images, as the run's own test does."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, clean_env, command, photo, tiny_train
from PIL import Image

import alexlab
from alexlab.commands.predict import find_images
from alexlab.engine.errors import UserError


@pytest.fixture(scope="module")
def run_dir(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a few epochs, so that the classes differ."""
    folder = tmp_path_factory.mktemp("logs") / "train/runs/one"
    words = ["trainer.max_epochs=4", "trainer.limit_train_batches=null", "trainer.precision=32-true"]
    done = tiny_train(shapes, folder, *words)
    assert done.returncode == 0, done.stderr
    return folder


def predicted(run_dir: Path, images: object, *words: str):  # type: ignore[no-untyped-def]
    done = command("predict", "run=one", f"images={images}", f"paths.logs={run_dir.parents[2]}", *words)
    out = next((word[4:] for word in words if word.startswith("out=")), run_dir / "predictions.csv")
    with open(out) as file:
        return done, list(csv.DictReader(file))


def test_a_folder_as_in_the_runs_own_test(run_dir: Path, shapes: Path) -> None:
    done, rows = predicted(run_dir, shapes / "test", "topk=10", "num_workers=1", "batch_size=3")
    assert done.returncode == 0, done.stderr
    assert len(rows) == 10 * 10
    firsts = [row for row in rows if row["rank"] == "1"]
    assert [row["path"] for row in firsts] == sorted(str(path) for path in (shapes / "test").rglob("*.jpg"))
    right = [Path(row["path"]).parent.name == row["class"] for row in firsts]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert sum(right) / 10 == pytest.approx(summary["test"]["test/acc1"])
    for i in range(0, 100, 10):
        each = [float(row["probability"]) for row in rows[i : i + 10]]
        assert each == sorted(each, reverse=True)
        assert sum(each) == pytest.approx(1, abs=1e-5)
        assert [row["rank"] for row in rows[i : i + 10]] == [str(rank) for rank in range(1, 11)]
    losses = [-torch.tensor(float(row["probability"])).log() for row in rows
              if Path(row["path"]).parent.name == row["class"]]  # fmt: skip
    assert float(sum(losses)) / 10 == pytest.approx(summary["test"]["test/loss"], abs=1e-3)
    assert not (run_dir / ".predictions.csv.tmp").exists()


def test_calibrated_probabilities_are_those_of_logits_divided_by_the_temperature(run_dir: Path, shapes: Path) -> None:
    done = command("predict", "run=one", f"images={shapes}/test", f"paths.logs={run_dir.parents[2]}", "calibrated=true")
    assert done.returncode == 2
    assert "`calibrated=true`: " in done.stderr
    assert "has no temperature for this checkpoint: run python eval.py run=" in done.stderr
    assert command("eval.py", "run=one", f"paths.logs={run_dir.parents[2]}").returncode == 0
    [entry] = json.loads((run_dir / "temperature.json").read_text()).values()
    temperature = entry["temperature"]
    _, plain = predicted(run_dir, shapes / "test", "topk=10")
    _, rows = predicted(run_dir, shapes / "test", "topk=10", "calibrated=true")
    for i in range(0, 100, 10):
        logits = torch.tensor([float(row["probability"]) for row in plain[i : i + 10]]).double().log()
        expected = (logits / temperature).softmax(0)
        found = [float(row["probability"]) for row in rows[i : i + 10]]
        assert found == pytest.approx(expected.tolist(), abs=1e-3)


def test_a_file_a_glob_and_another_place(run_dir: Path, shapes: Path, tmp_path: Path) -> None:
    image = shapes / "test/ring/0000.jpg"
    done, rows = predicted(run_dir, image, f"out={tmp_path / 'deep/one.csv'}")
    assert (done.returncode, len(rows)) == (0, 5), done.stderr
    assert f"1 image, 5 classes each: {tmp_path / 'deep/one.csv'}" in done.stdout
    assert "ring" in done.stdout
    assert rows[0]["class"] in done.stdout
    done, rows = predicted(run_dir, f"'{shapes}/test/*/0000.jpg'", "topk=99")
    assert (done.returncode, len(rows)) == (0, 100), done.stderr


def test_broken_images_are_counted_and_listed(run_dir: Path, shapes: Path, tmp_path: Path) -> None:
    shutil.copytree(shapes / "test", tmp_path / "images")
    (tmp_path / "images/broken.jpg").write_bytes((shapes / "test/ring/0000.jpg").read_bytes()[:300])
    (tmp_path / "images/none.png").touch()
    (tmp_path / "images/notes.txt").touch()
    done, rows = predicted(run_dir, tmp_path / "images", "topk=1")
    assert done.returncode == 1
    assert "2 of 12 images could not be read:" in done.stderr
    assert "broken.jpg cannot be read as an image" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(rows) == 10
    assert "data.on_error" not in done.stderr
    for i in range(12):
        (tmp_path / f"images/many{i:02}.png").touch()
    done, rows = predicted(run_dir, tmp_path / "images", "topk=1")
    assert "14 of 24 images could not be read:" in done.stderr
    assert "... (4 more)" in done.stderr


def test_wrong_settings_are_refused(run_dir: Path, tmp_path: Path) -> None:
    logs = f"paths.logs={run_dir.parents[2]}"
    for overrides, message in (
        (["run=one", f"images={ROOT}/docs", f"out={tmp_path}"], f"`out={tmp_path}` is a folder: give a file, such as"),
        (["run=one", f"images={tmp_path}"], f"`images={tmp_path}` names no image: give a file, a folder or a"),
        (["run=one", "images=x", "topk=0"], "`topk=0` must be at least 1"),
    ):
        done = command("predict", *overrides, logs)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False)
        assert message in done.stderr
    assert not list(tmp_path.iterdir())
    for script in (["eval.py", "run=one"], ["compare"]):
        command(*script, logs)
    assert [path.name for path in run_dir.parents[2].iterdir()] == ["train"], "they leave no directories of their own"


def test_folders_are_searched_at_any_depth_and_odd_names_are_taken_as_they_are(tmp_path: Path) -> None:
    photo(tmp_path / "a[1]/b/x.JPG")
    photo(tmp_path / "a[1]/y.png")
    assert find_images(str(tmp_path / "a[1]")) == [str(tmp_path / "a[1]/b/x.JPG"), str(tmp_path / "a[1]/y.png")]
    with pytest.raises(UserError, match="names no image"):
        find_images(str(tmp_path / "none/*.jpg"))


def test_what_is_no_image_is_named_and_a_glob_skips_what_systems_leave(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(photo(tmp_path / "a/x.jpg"))
    photo(tmp_path / "a/@eaDir/x.jpg")
    (tmp_path / "a/y.heic").touch()
    assert find_images(str(tmp_path)) == find_images(f"{tmp_path}/**/*.jpg") == [image]
    assert capsys.readouterr().out == (
        f"note: {tmp_path}: folders of these names are skipped: @eaDir/ (1)\n"
        f"note: {tmp_path}: files without the suffix of an image are ignored: 1 .heic\n"
    )
    assert find_images(f"{tmp_path}/*/@eaDir/*.jpg") == [f"{tmp_path}/a/@eaDir/x.jpg"]
    (tmp_path / "a/round").symlink_to(tmp_path)
    with pytest.raises(UserError, match="are the same folder, because one is a link"):
        find_images(f"{tmp_path}/**/*.jpg")


def test_load_gives_the_net_its_transform_and_its_classes(run_dir: Path, shapes: Path) -> None:
    net, transform, classes = alexlab.load(run_dir)
    assert not net.training
    assert classes == sorted(path.name for path in (shapes / "train").iterdir())
    path = shapes / "test/ring/0000.jpg"
    images = transform(path)
    assert (images.shape, images.dtype) == ((3, 64, 64), torch.float32)
    with Image.open(path) as opened:
        assert torch.equal(transform(opened), images)
    with torch.no_grad():
        best = net(images[None]).softmax(1).max(1)
    _, rows = predicted(run_dir, path, "topk=1")
    assert rows[0]["class"] == classes[int(best.indices)]
    assert float(rows[0]["probability"]) == pytest.approx(float(best.values), abs=1e-5)
    with pytest.raises(UserError, match="is not a run's directory"):
        alexlab.load("none", logs=run_dir.parents[2])
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        alexlab.lode  # noqa: B018
    quick = "import sys, alexlab; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", quick], cwd=ROOT, env=clean_env(), check=False).returncode == 0


def test_names_of_any_bytes_and_with_brackets(run_dir: Path, tmp_path: Path) -> None:
    """A name need not be text."""
    folder = tmp_path / "photos/[bold]"
    for name in ("cat [final].jpg", "[/a].jpg", "ok.jpg"):
        photo(folder / name.replace("/", "d"))
    (folder / "ok.jpg").rename(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.jpg"))
    done = command(
        "predict", "run=one", f"images={folder.parent}", f"paths.logs={run_dir.parents[2]}", f"out={tmp_path}/x.csv"
    )
    assert done.returncode == 0, done.stderr
    assert "cat [final].jpg" in done.stdout
    rows = list(csv.DictReader((tmp_path / "x.csv").read_bytes().decode(errors="surrogateescape").splitlines()))
    assert os.fsencode(folder) + b"/caf\xe9.jpg" in {os.fsencode(row["path"]) for row in rows}


def test_a_transform_says_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    from alexlab.engine.errors import UserError
    from alexlab.tasks.load import EvalTransform

    transform = EvalTransform(64, 0.875, [0.5] * 3, [0.25] * 3)
    with pytest.raises(FileNotFoundError, match=r"no\.jpg does not exist"):
        transform(tmp_path / "no.jpg")
    (tmp_path / "text.jpg").write_text("text")
    with pytest.raises(UserError, match=r"text\.jpg cannot be read as an image \([^)]*\)\.$"):
        transform(tmp_path / "text.jpg")


def test_names_in_no_encoding_from_training_to_prediction(shapes: Path, tmp_path: Path) -> None:
    root, run_dir = tmp_path / "caf\udce9", tmp_path / "r\udce9n"
    for split in ("train", "val"):
        for name, ours in (("arrow", "caf\udce9"), ("ring", "cat\nfish"), ("star", "חתול")):
            source = next(folder for folder in sorted((shapes / split).iterdir()) if folder.name >= name)
            shutil.copytree(source, root / split / ours)
    (root / "val" / "caf\udce9" / "br\udce9.jpg").write_bytes(b"broken")
    done = tiny_train(root, run_dir, "callbacks.figures=true", "data.on_error=skip")
    assert done.returncode == 0, done.stderr
    assert r"3 classes: caf\xe9, cat\nfish, חתול" in done.stdout
    assert {path.stem for path in run_dir.glob("figures/*.png")} >= {"per_class", "confusion_matrix", "top5"}
    for verb, *words in (
        ("eval.py", f"run={run_dir}"),
        ("compare", f"runs={run_dir}", "format=csv"),
        ("compare", f"runs={run_dir}", "format=html", f"out={tmp_path / 'page.html'}"),
        ("export", f"run={run_dir}", "format=torch_export", f"images={root / 'val' / 'חתול'}"),
        ("train.py", f"resume={run_dir}", "trainer.max_epochs=2", "resume.allow_changes=true"),
    ):
        done = command(verb, *words)
        assert done.returncode == 0, done.stderr
        assert r"r\xe9n" in done.stdout or "format=html" in words
    done = command("predict", f"run={run_dir}", f"images={root / 'val'}")
    assert r"caf\xe9/br\xe9.jpg cannot be read as an image" in done.stderr
    with (run_dir / "predictions.csv").open(errors="surrogateescape", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["class"] for row in rows} == {r"caf\xe9", r"cat\nfish", "חתול"}
    assert all(Path(row["path"]).is_file() for row in rows)


def test_jobs_of_a_sweep_do_not_write_one_file(run_dir: Path, shapes: Path, tmp_path: Path) -> None:
    words = ["-m", "run=one", f"paths.logs={run_dir.parents[2]}", f"images={shapes / 'test'},{shapes / 'val'}"]
    done = command("predict", *words)
    assert (done.returncode, "each would write over the results of the others" in done.stderr) == (2, True)
    done = command("predict", *words, f"out={tmp_path}/${{hydra:job.num}}.csv")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.glob("*.csv")} == {"0.csv", "1.csv"}
