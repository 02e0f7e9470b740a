"""Ray Data's documented pattern of batch inference: read, decode in tasks, score in an actor, write.

With --fused, decode and model share two actors, as Ray Data arranges them where both ask for the same
resources: images do not pass through the object store then.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click
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


NUM_CPUS = {"decode": 0.6, "model": 0.5, "write": 0.25}
"""Of two CPUs: for two tasks that decode, an actor and a task that writes, so that none waits for others."""


@click.option("--fused", is_flag=True, help="Decode where the model is, in two actors.")
@engine
def main(input_path: Path, model_path: str, output_path: Path, idiom: bool, fused: bool) -> None:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    (
        ray.data.read_parquet(str(input_path))
        .select_columns(["image_id", "image", "caption"])
        .map(
            partial(decoded, size_px=side_px(model_path), idiom=idiom),
            num_cpus=NUM_CPUS["model" if fused else "decode"],
        )
        .map_batches(
            Scorer,
            fn_constructor_args=(model_path,),
            batch_size=BATCH_ROWS,
            compute=ray.data.ActorPoolStrategy(size=2 if fused else 1),
            num_cpus=NUM_CPUS["model"],
        )
        .write_parquet(str(output_path), ray_remote_args={"num_cpus": NUM_CPUS["write"]})
    )


if __name__ == "__main__":
    main()
