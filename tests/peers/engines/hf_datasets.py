"""Hugging Face datasets: a batched map in two processes."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
from shared import BATCH_ROWS, Model, decode, engine

NUM_PROCESSES = 2

model_of = cache(Model)
"""Of a process: it is loaded with the first batch."""


def encoded(batch: dict[str, list[Any]], model_path: str) -> dict[str, Any]:
    """Score encoded images."""
    model = model_of(model_path)
    pixels = [decode(data, model.config.image_size) for data in batch["image"]]
    return {"scores": model(pixels, batch["caption"])}


def decoded(batch: dict[str, list[Any]], model_path: str) -> dict[str, Any]:
    """Score images that the library decoded."""
    model = model_of(model_path)
    side = model.config.image_size
    pixels = [np.asarray(image.convert("RGB").resize((side, side))) for image in batch["image"]]
    return {"scores": model(pixels, batch["caption"])}


@engine
def main(input_path: Path, model_path: str, output_path: Path, idiom: bool) -> None:
    datasets.disable_progress_bars()
    files = sorted(map(str, input_path.glob("*.parquet")))
    with TemporaryDirectory() as cache_path:
        rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache_path)
        if idiom:
            rows = rows.cast_column("image", datasets.Image())
        scored = rows.map(
            decoded if idiom else encoded,
            batched=True,
            batch_size=BATCH_ROWS,
            num_proc=NUM_PROCESSES,
            fn_kwargs={"model_path": model_path},
            remove_columns=[name for name in rows.column_names if name != "image_id"],
        )
        output_path.mkdir(parents=True)
        scored.to_parquet(str(output_path / "scores.parquet"))


if __name__ == "__main__":
    main()
