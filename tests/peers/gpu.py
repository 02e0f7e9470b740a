"""EfficientNet-B4 at 380 px on a GPU: the model alone, against the whole labeling job that feeds it.

    python tests/peers/gpu.py --input FOLDER [--copies N] [--decode PLACE ...] [--actors N ...] [--json FILE]

alone      the model on batches that are on the device already, as `Predictor` computes them
job        `label_dataset` on Ray, by rows of the second half of the files: a pool decodes the first ones
           while the model loads and compiles
decoding   threads and processes that do nothing but decode, as many as there are CPUs

FOLDER holds Parquet files of images and captions; each is labeled `--copies` times: so many that the job
takes minutes, or all may have been decoded before the model is there. All of it in bf16, eager
and with `--compile`; the job with its decoding on the GPU, in a pool and beside the model, and with one actor
on the GPU and two.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from itertools import islice, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import pyarrow.parquet as pq
import ray
import torch
from bundles import make_bundle

from mmray.bundle import Bundle
from mmray.config import LabelConfig, ModelConfig
from mmray.fusions import Inputs
from mmray.images import decode_image
from mmray.labeler import PRECISIONS
from mmray.labeling import label_dataset
from mmray.predictor import Predictor
from mmray.storage import Folder

MODEL = ModelConfig(vision="efficientnet_b4", image_size=380, pretrained=False)
LABELS = tuple(number for number in range(1, 20) if number != 12)
BATCHES = 40
DECODED_ROWS = 4000
PLACES = ("gpu", "pool", "beside")


@ray.remote(num_gpus=1, max_calls=1)  # its memory on the device is free again for the job
def alone(uri: str, batch_size: int, compiled: bool) -> dict[str, Any]:
    """Compute batches that are on the device; gives rows/s, and where the time of one goes."""
    bundle, device = Bundle.load(uri), torch.device("cuda")
    predictor = Predictor(bundle.model(), device, PRECISIONS["bf16"], batch_size=batch_size, flip=False)
    started = time.monotonic()
    if compiled:
        predictor.compile(MODEL.image_size)
    start_s = time.monotonic() - started
    side, generator = MODEL.image_size, torch.Generator().manual_seed(0)
    inputs = Inputs(
        torch.randint(0, 256, (batch_size, side, side, 3), dtype=torch.uint8, generator=generator),
        torch.ones(batch_size, dtype=torch.bool),
        torch.randint(5, 100, (batch_size, 16), generator=generator),
        torch.ones(batch_size, 16, dtype=torch.int64),
        torch.ones(batch_size, dtype=torch.bool),
    ).to(device)

    def compute(batches: int) -> float:
        began = time.monotonic()
        for waiting in [predictor.submit(inputs) for _ in range(batches)]:
            waiting()
        return batches * batch_size / (time.monotonic() - began)

    compute(3)
    rates = sorted(compute(BATCHES) for _ in range(5))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        compute(1)
    table = profile.key_averages().table(sort_by="cuda_time_total", row_limit=25, max_name_column_width=70)
    return {"rows_per_s": rates, "compile_s": start_s, "profile": table, "gpu": torch.cuda.get_device_name()}


def job(rows: Path, uri: str, output: Path, config: LabelConfig) -> dict[str, float]:
    """Label the rows; gives the wall time, and rows/s of the second half of the files."""
    started = time.monotonic()
    result = label_dataset(str(rows), uri, str(output), config=config)
    wall_s = time.monotonic() - started
    files = sorted(path.stat().st_mtime for path in output.glob("*.parquet"))
    half = len(files) // 2
    rate = result.num_rows * (len(files) - 1 - half) / len(files) / (files[-1] - files[half])
    return {"wall_s": wall_s, "rows_per_s": rate, "num_rows": result.num_rows} | result.counts


def decoding(images: list[bytes], pool: Executor) -> float:
    """Decode images; gives their number a second."""
    decode = partial(decode_image, size_px=MODEL.image_size)
    settings = {"chunksize": 50} if isinstance(pool, ProcessPoolExecutor) else {}
    list(pool.map(decode, images[:200], **settings))
    started = time.monotonic()
    for pixels in pool.map(_decoded_bytes, images, **settings):
        assert pixels
    return len(images) / (time.monotonic() - started)


def _decoded_bytes(image: bytes) -> int:
    """Decode an image where it is, and bring nothing home: what a transfer costs is not asked here."""
    return decode_image(image, MODEL.image_size).nbytes


@click.command()
@click.option("--input", "source", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--copies", default=40, show_default=True)
@click.option("--batch-size", default=256, show_default=True)
@click.option("--decode", "places", type=click.Choice(PLACES), multiple=True, default=PLACES)
@click.option("--actors", "crowds", type=int, multiple=True, default=(1, 2))
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(
    source: Path,
    copies: int,
    batch_size: int,
    places: tuple[str, ...],
    crowds: tuple[int, ...],
    json_path: Path | None,
) -> None:
    """Measure, and print what was found."""
    found: dict[str, Any] = {"batch_size": batch_size, "cpus": os.cpu_count()}

    def tell(name: str, value: Any) -> None:
        found[name] = value
        shown = (
            {key: part for key, part in value.items() if key != "profile"} if type(value) is dict else value
        )
        click.echo(f"{name}: {shown}")
        if json_path:
            json_path.write_text(json.dumps(found, indent=1))

    with TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows"
        rows.mkdir()
        paths = sorted(source.glob("*.parquet"))
        if len(paths) * copies < 4:
            raise click.UsageError(f"{len(paths)} files of {copies} copies are too few for a second half")
        for number, path in enumerate(paths * copies):
            shutil.copy(path, rows / f"{number:04}.parquet")
        texts = [
            text for path in paths for text in pq.read_table(path, columns=["caption"])["caption"].to_pylist()
        ]
        uri = f"{scratch}/bundle"
        make_bundle(Folder(uri), MODEL, [text for text in texts if text], LABELS)
        images = [
            image for path in paths for image in pq.read_table(path, columns=["image"])["image"].to_pylist()
        ]
        images = list(islice(images * (1 + DECODED_ROWS // len(images)), DECODED_ROWS))
        for kind in (ThreadPoolExecutor, ProcessPoolExecutor):
            with kind(os.cpu_count()) as pool:
                tell(f"decoding, {kind.__name__}", decoding(images, pool))
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        ray.init(log_to_driver=False)
        for compiled in (False, True):
            name = "compiled" if compiled else "eager"
            tell(f"alone, {name}", ray.get(alone.remote(uri, batch_size, compiled)))
            for place, actors in product(places, crowds):
                config = LabelConfig(
                    batch_size=batch_size,
                    compiled=compiled,
                    decode=place,
                    actors_per_gpu=actors,
                    max_failed_fraction=0.1,
                )
                case = f"{name}, decoding {place}, {actors} on the GPU"
                tell(f"job, {case}", job(rows, uri, Path(scratch) / case, config))
                rate = found[f"job, {case}"]["rows_per_s"]
                tell(f"job / alone, {case}", rate / float(np.median(found[f"alone, {name}"]["rows_per_s"])))


if __name__ == "__main__":
    main()
