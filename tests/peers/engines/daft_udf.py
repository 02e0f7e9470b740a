"""Daft: a batch UDF in two processes; its own decode and resize where the idiom is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import daft
from daft import DataType, col
from shared import BATCH_ROWS, Model, decode, engine, side_px

NUM_PROCESSES = 2


@daft.cls(max_concurrency=NUM_PROCESSES, use_process=True)
class Scorer:
    """Scores batches."""

    def __init__(self, model_path: str) -> None:
        self.model = Model(model_path)

    @daft.method.batch(return_dtype=DataType.list(DataType.float32()), batch_size=BATCH_ROWS)
    def encoded(self, images: daft.Series, captions: daft.Series) -> list[Any]:
        side = self.model.config.image_size
        pixels = [decode(data, side) for data in images.to_pylist()]
        return list(self.model(pixels, captions.to_pylist()))

    @daft.method.batch(return_dtype=DataType.list(DataType.float32()), batch_size=BATCH_ROWS)
    def decoded(self, images: daft.Series, captions: daft.Series) -> list[Any]:
        return list(self.model(images.to_pylist(), captions.to_pylist()))


@engine
def main(input_path: Path, model_path: str, output_path: Path, idiom: bool) -> None:
    scorer, side = Scorer(model_path), side_px(model_path)
    rows = daft.read_parquet(f"{input_path}/*.parquet").select("image_id", "image", "caption")
    if idiom:
        image = col("image").decode_image(mode="RGB").resize(side, side)
        scores = scorer.decoded(image, col("caption"))
    else:
        scores = scorer.encoded(col("image"), col("caption"))
    rows.select(col("image_id"), scores.alias("scores")).write_parquet(str(output_path))


if __name__ == "__main__":
    main()
