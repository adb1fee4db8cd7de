"""Serve an exported network: python examples/serve.py model.onnx [PORT]     (pip install 'alexlab[export,serve]')

POST /predict takes {"images": [JPEG or PNG files in base64]}, up to 256, and returns the five most probable classes of
each image, computed as one batch. `alexlab export format=onnx` writes the file. This program does not import alexlab.
"""

import base64
import io
import json
import sys

import numpy as np
import onnxruntime
import uvicorn
from fastapi import FastAPI, HTTPException
from PIL import Image, ImageOps
from pydantic import BaseModel, Field

net = onnxruntime.InferenceSession(sys.argv[1])
about = json.loads(net.get_modelmeta().custom_metadata_map["alexlab"])
app = FastAPI(title=about["model"])


class Batch(BaseModel):
    images: list[str] = Field(min_length=1, max_length=256)


def prepare(text: str) -> np.ndarray:
    """Decode an image as the evaluation of the run does: uint8 (C, H, W)."""
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(base64.b64decode(text)))).convert(about["mode"])
    except (ValueError, OSError) as error:
        raise HTTPException(422, f"not an image in base64: {error}") from None
    side, covered = min(zip(image.size, about["covered"], strict=True), key=lambda pair: pair[0] / pair[1])
    size = tuple(covered * each // side for each in image.size)
    bands = np.stack([np.asarray(band.resize(size, Image.Resampling.BILINEAR)) for band in image.split()])
    x, y = round((size[0] - about["width"]) / 2), round((size[1] - about["height"]) / 2)
    return bands[:, y : y + about["height"], x : x + about["width"]]


@app.post("/predict")
def predict(batch: Batch) -> list[list[dict[str, str | float]]]:
    logits = net.run(None, {"images": np.stack([prepare(image) for image in batch.images])})[0]
    powers = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = powers / powers.sum(1, keepdims=True)
    if "sigmoid" in about["output"]:  # any number of classes per image
        probabilities = 1 / (1 + np.exp(-logits))
    best = np.argsort(-probabilities)[:, :5]
    return [
        [{"class": about["classes"][k], "probability": round(float(row[k]), 6)} for k in order]
        for order, row in zip(best, probabilities, strict=True)
    ]


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[2]) if len(sys.argv) > 2 else 8000)
