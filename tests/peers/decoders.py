"""Hold the decode of labeling against others that give a square of the same size.

    make build/peers/installed; PYTHONPATH=build/peers python tests/peers/decoders.py [--size PX] [--rows N]

Each of the benchmark's photos, and of coco18's images where these are at hand, goes through all of them, in
turns, on one thread. All but the last may have libjpeg-turbo decode at 1/2, 1/4 or 1/8 where that has enough
pixels. `apart` is the largest difference of a pixel from mmray's, and the mean one.
"""

from __future__ import annotations

import io
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pyarrow.parquet as pq
import simplejpeg
import workloads
from PIL import Image
from rich.console import Console
from rich.table import Table

from mmray.images import decode_image

Decoder = Callable[[bytes, int], np.ndarray]


def by_simplejpeg(data: bytes, size_px: int) -> np.ndarray:
    """Decode with simplejpeg, resize with Pillow."""
    pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=size_px, min_width=size_px)
    return np.asarray(Image.fromarray(pixels).resize((size_px, size_px), Image.Resampling.BICUBIC))


def by_simplejpeg_fast(data: bytes, size_px: int) -> np.ndarray:
    """Decode with simplejpeg's fast, less exact transforms, resize bilinearly."""
    pixels = simplejpeg.decode_jpeg(
        *(data, "RGB"), fastdct=True, fastupsample=True, min_height=size_px, min_width=size_px
    )
    return np.asarray(Image.fromarray(pixels).resize((size_px, size_px), Image.Resampling.BILINEAR))


def by_pillow_whole(data: bytes, size_px: int) -> np.ndarray:
    """Decode all pixels with Pillow, as most documentation does."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(image.resize((size_px, size_px), Image.Resampling.BICUBIC))


DECODERS: dict[str, Decoder] = {
    "mmray (Pillow, scaled)": decode_image,
    "simplejpeg, scaled": by_simplejpeg,
    "simplejpeg, scaled, fast, bilinear": by_simplejpeg_fast,
    "Pillow, whole": by_pillow_whole,
}


def measure(title: str, images: list[bytes], size_px: int) -> Table:
    """Decode images by all decoders; lay out ms an image, and how far their pixels are apart."""
    taken, apart = defaultdict[str, list[float]](list), defaultdict[str, list[tuple[int, float]]](list)
    for data in images:
        pixels = decode_image(data, size_px).astype(np.int16)
        for name, decoder in DECODERS.items():
            started = time.perf_counter()
            found = decoder(data, size_px)
            taken[name].append(1000 * (time.perf_counter() - started))
            difference = np.abs(found - pixels)
            apart[name].append((int(difference.max()), float(difference.mean())))
    table = Table(title=title)
    for name in ("decoder", "ms, median", "ms, mean", "apart, most", "apart, mean"):
        table.add_column(name, justify="left" if name == "decoder" else "right")
    for name, times in taken.items():
        most, mean = max(apart[name])[0], statistics.fmean(each for _, each in apart[name])
        table.add_row(
            name,
            f"{statistics.median(times):.2f}",
            f"{statistics.fmean(times):.2f}",
            str(most),
            f"{mean:.2f}",
        )
    return table


@click.command()
@click.option("--state", default="build/bench", show_default=True, type=Path, help="Keeps inputs.")
@click.option("--rows", "num_rows", default=500, show_default=True)
@click.option("--size", "size_px", default=224, show_default=True, help="Side of the square, in pixels.")
def main(state: Path, num_rows: int, size_px: int) -> None:
    """Hold decoders against each other."""
    for kind in (workloads.photos, workloads.coco18):
        if (folder := kind(state.absolute(), num_rows)) is not None:
            images = pq.read_table(folder, columns=["image"])["image"].to_pylist()
            Console().print(
                measure(f"{kind.__name__}, {len(images):,} images, {size_px} px", images, size_px)
            )


if __name__ == "__main__":
    main()
