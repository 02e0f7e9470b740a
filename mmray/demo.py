"""The whole way on generated data: draw, prepare, train, label, verify, evaluate, report.

The scenes are drawn so that neither image nor caption tells all: their shapes are seen in the image alone,
their place is told by the caption alone. Only a model that uses both can label them right.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mmray.config import ComputeConfig, LabelConfig, ModelConfig, TrainConfig
from mmray.evaluate import evaluate_predictions
from mmray.labeling import LabelingResult, label_dataset
from mmray.prepare import prepare_folder
from mmray.report import write_report
from mmray.storage import Folder
from mmray.training import train_model
from mmray.verify import Verification, verify_dataset

NUM_ROWS = {"train": 4000, "val": 500, "archive": 3000}
SIDE_PX = 64
SHAPES = ("circle", "square", "triangle")
COLOURS = ((205, 40, 40), (40, 165, 60), (45, 80, 215))
PLACES = ("beach", "city", "forest")
OPENINGS = ("A drawing from the", "We were at the", "Postcard of a", "Seen today near the")

MODEL = ModelConfig(
    vision="mobilenetv3_small_050", image_size=SIDE_PX, max_tokens=24, width=128, pretrained=False
)
TRAIN = TrainConfig(
    epochs=5, batch_size_per_worker=64, learning_rate=3e-3, ema_decay=0.99, crop=0.7, colour=0.0
)


@dataclass(frozen=True)
class Demo:
    """What the demo did, and where it left everything."""

    labeling: LabelingResult
    verification: Verification
    summary: dict[str, Any]
    """Of the labeled archive, as `evaluate` gives it: the labels of drawn scenes are known."""


def run_demo(output_uri: str, tell: Callable[[str], None]) -> Demo:
    """Run the main job on generated data.

    Args:
        output_uri: folder for raw images, datasets, bundle and labeled rows.
        tell: is told each step.
    """
    output = Folder(output_uri)
    compute = ComputeConfig()
    tell(f"drawing {sum(NUM_ROWS.values()):,} scenes with captions")
    for seed, (part, num_rows) in enumerate(NUM_ROWS.items()):
        draw_scenes(output / f"raw/{part}", num_rows, np.random.default_rng(seed))
    tell("preparing Parquet datasets")
    for part in NUM_ROWS:
        raw = f"{output}/raw/{part}"
        prepare_folder(f"{raw}/images", f"{output}/data/{part}", csv_uri=f"{raw}/scenes.csv")
    tell(f"training {MODEL.vision} and BERT-tiny from scratch, {TRAIN.epochs} epochs")
    data = {part: f"{output}/data/{part}" for part in NUM_ROWS}
    bundle_uri, labeled_uri = f"{output}/bundle", f"{output}/labeled"
    train_model(data["train"], data["val"], bundle_uri, MODEL, TRAIN, compute=compute, progress=True)
    tell("labeling the archive")
    labeling = label_dataset(
        data["archive"], bundle_uri, labeled_uri, config=LabelConfig(), compute=compute, progress=True
    )
    tell("verifying the labeled rows against the archive")
    verification = verify_dataset(data["archive"], labeled_uri)
    summary = evaluate_predictions(data["archive"], labeled_uri)
    tell("reporting")
    write_report(bundle_uri, f"{output}/training.html")
    write_report(labeled_uri, f"{output}/labeled.html", input_uri=data["archive"], model_uri=bundle_uri)
    return Demo(labeling, verification, summary)


def draw_scenes(folder: Folder, num_rows: int, generator: np.random.Generator) -> None:
    """Draw scenes: `images/*.jpg`, and `scenes.csv` with image, caption and labels."""
    table = io.StringIO()
    rows = csv.writer(table)
    rows.writerow(["image", "caption", "labels"])
    with ThreadPoolExecutor(8) as threads:
        published = []
        for number in range(num_rows):
            image, caption, labels = draw_scene(generator)
            published.append(threads.submit(folder.publish, f"images/{number:05}.jpg", image))
            rows.writerow([f"{number:05}.jpg", caption, " ".join(labels)])
        for image_file in published:
            image_file.result()
    folder.publish("scenes.csv", table.getvalue().encode())


def draw_scene(generator: np.random.Generator) -> tuple[bytes, str, list[str]]:
    """Draw one scene: a JPEG, its caption, and its labels."""
    shapes = [shape for shape in SHAPES if generator.random() < 0.4]
    place = str(generator.choice(PLACES))
    return _draw(shapes, generator), f"{generator.choice(OPENINGS)} {place}.", sorted([*shapes, place])


def _draw(shapes: list[str], generator: np.random.Generator) -> bytes:
    image = Image.new(
        "RGB", (SIDE_PX, SIDE_PX), tuple(int(level) for level in generator.integers(190, 250, 3))
    )
    pen = ImageDraw.Draw(image)
    cells = generator.permutation(4)[: len(shapes)]
    for shape, cell in zip(shapes, cells, strict=True):
        colour, size = COLOURS[generator.integers(len(COLOURS))], int(generator.integers(18, 28))
        half = SIDE_PX // 2
        left = int(cell % 2 * half + generator.integers(0, half - size))
        top = int(cell // 2 * half + generator.integers(0, half - size))
        box = (left, top, left + size, top + size)
        if shape == "circle":
            pen.ellipse(box, fill=colour)
        elif shape == "square":
            pen.rectangle(box, fill=colour)
        else:
            pen.polygon([(left + size // 2, top), (left, top + size), (left + size, top + size)], fill=colour)
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=90)
    return encoded.getvalue()
