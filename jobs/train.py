"""Train a model on labeled rows; the same command goes on from the last checkpoint."""

from __future__ import annotations

from typing import Any

import click

from mmray.cli import cluster, job, options
from mmray.config import Columns, ComputeConfig, ModelConfig, TrainConfig
from mmray.options import make


@job("train")
@click.option("--data", "data_uri", required=True, help="Parquet rows to train on.")
@click.option(
    "--val",
    "val_uri",
    required=True,
    help="Parquet rows that choose the best epoch, calibrate and set thresholds.",
)
@click.option(
    "--output", "output_uri", required=True, help="Folder of the bundle; checkpoints stand below it."
)
@options(ModelConfig, TrainConfig, Columns, ComputeConfig)
def main(data_uri: str, val_uri: str, output_uri: str, **settings: Any) -> None:
    """Train a model with Ray Train, and leave a bundle that labels without a network.

    Example: train.py --data s3://rows/train --val s3://rows/val --output s3://models/first --epochs 10
    """
    with cluster():
        from rich.console import Console

        from mmray.evaluate import as_table
        from mmray.training import train_model

        result = train_model(
            data_uri,
            val_uri,
            output_uri,
            make(ModelConfig, settings),
            make(TrainConfig, settings),
            make(Columns, settings),
            make(ComputeConfig, settings),
            progress=True,
        )
        Console().print(as_table(result.metrics))
    done = "was there already" if result.resumed else f"took {result.seconds:.0f} s"
    click.echo(f"The bundle {done}: {output_uri}, fingerprint {result.bundle.fingerprint}")


if __name__ == "__main__":
    main()
