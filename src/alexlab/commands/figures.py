"""`alexlab figures`: test a run again and draw all figures."""

from pathlib import Path

import torch

from alexlab.analysis import cam, drawing, gallery, report
from alexlab.callbacks.media import Media
from alexlab.commands import evaluate
from alexlab.commands.predict import find_images
from alexlab.data import decode
from alexlab.engine import mirror
from alexlab.engine import run_dir as run_dirs
from alexlab.engine.errors import UserError
from alexlab.engine.files import make_folder, refuse_link
from alexlab.engine.schema import FiguresConfig
from alexlab.engine.text import printable
from alexlab.tasks.load import config_of, load

MOST_CAMS = 32  # images


def redraw(config: FiguresConfig) -> None:
    """Draw the figures of a run from a checkpoint, and print the paths.

    Raises:
        UserError: the run, the checkpoint or the images do not exist.
    """
    mirror.download_named(config.paths, config.run, config.ckpt)
    run_dir = run_dirs.find_run(config.run, config.paths.local, config.ckpt)
    refuse_link(run_dir / "figures")
    if config.cam is not None:
        path = draw_cam(config, run_dir)
        print(run_dirs.shown(path), flush=True)
        mirror.upload(config.paths, run_dir, [path])
        return
    media = Media(run_dir / "figures", weights=run_dirs.ckpt_of(run_dir, config.ckpt).name, kind=config.format)
    predictions = evaluate.Predictions(keep_logits=True)
    tested = evaluate.score(config, run_dir, callbacks=[media, predictions])
    monitor, device = tested.config.monitor, tested.device
    drawn = gallery.draw(run_dir, tested.data, monitor, config.ckpt, config.among, device, config.allow, config.format)
    if predictions.rows:
        of = f"{tested.data.test_split}, {tested.checkpoint.name}"
        outputs, names = predictions.outputs, tested.data.readable_classes
        calibration = evaluate.kept_calibration(run_dir, tested, predictions, outputs)
        for name, figure in report.figures(outputs, names, calibration, of):
            drawn.append(drawing.save(figure, run_dir / f"figures/{name}.{config.format}"))
    for path in [*media.written, *drawn]:
        print(run_dirs.shown(path), flush=True)
    mirror.upload(config.paths, run_dir, [*media.written, *drawn])


def draw_cam(config: FiguresConfig, run_dir: Path) -> Path:
    """Draw the Grad-CAM of the images that `cam` names, of the most probable class of each; return the path."""
    assert config.cam is not None
    ignored = [*config.data.model_dump().values(), *config.trainer.model_dump().values(), config.compile]
    if any(value is not None for value in ignored):
        raise UserError("`cam` draws the images that it names, on the CPU: remove data.*, compile and trainer.*.")
    paths = find_images(config.cam, "cam")
    if len(paths) > MOST_CAMS:
        print(f"note: the first {MOST_CAMS} of {len(paths):,} images are drawn.", flush=True)
    net, transform, classes = load(run_dir, config.ckpt, config.paths.local, allow=config.allow)
    images: dict[str, torch.Tensor] = {}
    for path in paths[:MOST_CAMS]:
        try:
            images[path] = decode.read(path, transform.crop)
        except decode.BrokenImageError as error:
            print(f"skipped: {printable(error.reason)}", flush=True)
    if not images:
        raise UserError(f"`cam={config.cam}`: no image can be read.")
    with torch.inference_mode():
        logits = torch.cat([net(transform.normalize(image[None])) for image in images.values()])
        probabilities = logits.sigmoid() if config_of(run_dir).data.multilabel else logits.softmax(1)
    best, predicted = probabilities.max(1)
    captions = [
        (f"{value:.0%} {classes[k]}", Path(path).name)
        for value, k, path in zip(best.tolist(), predicted.tolist(), images, strict=True)
    ]
    title = f"{run_dirs.ckpt_of(run_dir, config.ckpt).name}: Grad-CAM of the most probable class"
    picture = cam.picture(net, transform.normalize, list(images.values()), predicted.tolist(), captions, title)
    return drawing.save(picture, make_folder(run_dir, "figures") / f"cam.{config.format}")
