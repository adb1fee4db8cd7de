"""Try a trained network in a browser: python examples/demo.py RUN [PORT]     (pip install 'alexlab[demo,explain]')

RUN is a run's directory or name, latest, or a folder of `alexlab export format=hub`. The page takes an image, and shows
the five most probable classes and the Grad-CAM of the first one. Only this machine can open it.
"""

import sys
from pathlib import Path

import gradio

import alexlab
from alexlab.analysis import cam, drawing
from alexlab.data import decode
from alexlab.engine.config import ROOT
from alexlab.engine.errors import UserError
from alexlab.engine.run_dir import find_run
from alexlab.tasks import hub
from alexlab.tasks.load import config_of

if len(sys.argv) < 2:
    sys.exit(__doc__)
try:
    net, transform, classes = alexlab.load(sys.argv[1])
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
folder, logs = hub.folder_of(sys.argv[1]), ROOT / "logs"
about = hub.read_config(folder) if folder else config_of(find_run(sys.argv[1], logs)).data.model_dump()


def predict(path: str | None) -> tuple:
    """Return the probabilities of the best classes, the Grad-CAM of the first one, and the reason if it has none."""
    if path is None:  # the image was removed
        return None, None, ""
    try:
        pixels = decode.read(path, transform.crop)
    except decode.BrokenImageError as error:
        raise gradio.Error(error.reason.replace(path, Path(path).name), print_exception=False) from None
    images = transform.normalize(pixels[None])
    logits = net(images)[0].detach()
    values, best = (logits.sigmoid() if about.get("multilabel") else logits.softmax(0)).topk(min(5, len(classes)))
    top = {classes[k]: value for k, value in zip(best.tolist(), values.tolist(), strict=True)}
    try:
        [heat] = cam.grad_cam(net, images, best[:1])
    except UserError as error:
        return top, None, str(error)
    return top, cam.overlay(drawing.as_rgb(pixels.permute(1, 2, 0).numpy()), heat), ""


image = gradio.Image(label="Image")
image.preprocess = lambda file: file and file.path  # the file itself, which is decoded as in the run's evaluation
cam_image = gradio.Image(label="Grad-CAM of the first class", format="png", buttons=["download", "fullscreen"])
outputs = [gradio.Label(label="Classes"), cam_image, gradio.Markdown()]
page = gradio.Interface(predict, image, outputs, live=True, flagging_mode="never", analytics_enabled=False)
try:
    page.launch(server_name="127.0.0.1", server_port=int(sys.argv[2]) if len(sys.argv) > 2 else None)
except (OSError, ValueError):
    sys.exit(f"error: PORT={sys.argv[2]} is in use, or is no port: give another, or none for the next free one.")
