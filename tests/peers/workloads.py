"""What is labeled in the benchmark, and by which model."""

from __future__ import annotations

import io
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from bundles import make_bundle
from PIL import Image

from mmray.config import ModelConfig
from mmray.storage import Folder

PHOTO_PX = (640, 480)
NOISE, QUALITY = 16.0, 94
"""Give JPEGs of about 185 kB, as photos of this size have."""
FILE_ROWS = 500
ROW_GROUP_ROWS = 100
LABELS = tuple(number for number in range(1, 20) if number != 12)
WORDS = [
    "a",
    "dog",
    "cat",
    "man",
    "woman",
    "on",
    "in",
    "with",
    "the",
    "street",
    "beach",
    "red",
    "two",
    "people",
]
COCO18 = Path(__file__).parents[3] / "shared" / "data" / "coco18" / "train"
MODELS = {
    "stub": ModelConfig(vision="peer_stub", fusion="image", image_size=224, pretrained=False),
    "efficientnet_b0": ModelConfig(vision="peer_efficientnet_b0", image_size=224, pretrained=False),
}


class Workload(NamedTuple):
    """Rows and a model."""

    name: str
    input: Path
    model: Path
    num_rows: int


def photos(folder: Path, num_rows: int) -> Path:
    """Draw rows with photo-like images, the same each time, unless they are there; give their folder."""
    target = folder / f"photos-{num_rows}"
    target.mkdir(parents=True, exist_ok=True)
    starts = [start for start in range(0, num_rows, FILE_ROWS) if not _file(target, start).exists()]
    with ProcessPoolExecutor() as pool:
        list(pool.map(_draw, [target] * len(starts), starts, [num_rows] * len(starts)))
    return target


def coco18(folder: Path, num_rows: int) -> Path | None:
    """Take the first files of the real images that hold so many rows, where they are at hand."""
    target, taken = folder / f"coco18-{num_rows}", 0
    if not COCO18.is_dir():
        return None
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(COCO18.glob("*.parquet")):
        if taken >= num_rows:
            break
        rows = pq.read_table(path)[: num_rows - taken]
        pq.write_table(rows, target / path.name, row_group_size=ROW_GROUP_ROWS)
        taken += len(rows)
    return target


def bundle(folder: Path, name: str) -> Path:
    """Make one of the models, unless it is there; give its folder."""
    target = folder / name
    if not (target / "config.json").exists():
        make_bundle(Folder(str(target)), MODELS[name], [" ".join(WORDS)], LABELS)
    return target


def count_rows(folder: Path) -> int:
    """Count the rows of a folder by its footers."""
    return sum(pq.ParquetFile(path).metadata.num_rows for path in folder.glob("*.parquet"))


def _file(folder: Path, start: int) -> Path:
    return folder / f"{start:06}.parquet"


def _draw(folder: Path, start: int, num_rows: int) -> None:
    numbers = range(start, min(start + FILE_ROWS, num_rows))
    rows = [(f"{number:06}", *photo(number)) for number in numbers]
    names = ("image_id", "image", "caption")
    table = pa.table(dict(zip(names, zip(*rows, strict=True), strict=True)))
    scratch = _file(folder, start).with_suffix(".part")
    pq.write_table(table, scratch, row_group_size=ROW_GROUP_ROWS)
    scratch.rename(_file(folder, start))


def photo(number: int) -> tuple[bytes, str]:
    """Draw a coarse picture, enlarged, with a sensor's noise; and some words."""
    generator = np.random.default_rng(number)
    coarse = Image.fromarray(generator.integers(0, 256, (9, 12, 3), np.uint8))
    smooth = np.asarray(coarse.resize(PHOTO_PX, Image.Resampling.BICUBIC), np.float32)
    noisy = smooth + generator.normal(0, NOISE, smooth.shape).astype(np.float32)
    data = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(data, "JPEG", quality=QUALITY)
    return data.getvalue(), " ".join(generator.choice(WORDS, generator.integers(5, 15)))
