"""Ray Data's documented pattern of batch inference: read, decode in tasks, score in an actor, write."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from shared import BATCH_ROWS, Model, decode, decode_by_pillow, engine, side_px


class Scorer:
    """Scores batches."""

    def __init__(self, model_path: str) -> None:
        self.model = Model(model_path)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        return {"image_id": batch["image_id"], "scores": self.model(batch["pixels"], batch["caption"])}


def decoded(row: dict[str, Any], size_px: int, idiom: bool) -> dict[str, Any]:
    """Put pixels in an image's place."""
    pixels = (decode_by_pillow if idiom else decode)(row["image"], size_px)
    return {"image_id": row["image_id"], "pixels": pixels, "caption": row["caption"]}


@engine
def main(input_path: Path, model_path: str, output_path: Path, idiom: bool) -> None:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    (
        ray.data.read_parquet(str(input_path))
        .select_columns(["image_id", "image", "caption"])
        .map(partial(decoded, size_px=side_px(model_path), idiom=idiom))
        .map_batches(
            Scorer,
            fn_constructor_args=(model_path,),
            batch_size=BATCH_ROWS,
            compute=ray.data.ActorPoolStrategy(size=1),
            num_cpus=1,
        )
        .write_parquet(str(output_path))
    )


if __name__ == "__main__":
    main()
