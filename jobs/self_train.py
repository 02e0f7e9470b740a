"""Train on labeled rows and on pseudo-labels of unlabeled ones; the same command goes on where it was."""

from __future__ import annotations

from typing import Any

import click

from mmray.cli import cluster, job, options
from mmray.config import Columns, ComputeConfig, ModelConfig, SelfTrainConfig, TrainConfig
from mmray.options import make


@job("self_train")
@click.option("--data", "data_uri", required=True, help="Parquet rows with labels.")
@click.option("--unlabeled", "unlabeled_uri", required=True, help="Parquet rows to learn from beside them.")
@click.option("--val", "val_uri", required=True, help="Parquet rows that choose epoch and thresholds.")
@click.option("--output", "output_uri", required=True, help="Folder of the bundle; the rounds stand below.")
@options(SelfTrainConfig, ModelConfig, TrainConfig, Columns, ComputeConfig)
def main(data_uri: str, unlabeled_uri: str, val_uri: str, output_uri: str, **settings: Any) -> None:
    """Train a teacher, label the unlabeled rows with it, select the sure labels, and train a student.

    Example: self_train.py --data rows/train --unlabeled rows/more --val rows/val --output models/second
    """
    with cluster():
        from rich.console import Console

        from mmray.self_train import as_table, self_train

        result = self_train(
            *(data_uri, unlabeled_uri, val_uri, output_uri),
            make(ModelConfig, settings),
            make(TrainConfig, settings),
            make(SelfTrainConfig, settings),
            make(Columns, settings),
            make(ComputeConfig, settings),
            progress=True,
        )
        Console().print(as_table(result))
    click.echo(
        f"Round {result.best} was the best; its bundle took {result.seconds:.0f} s: {output_uri}, "
        f"fingerprint {result.bundle.fingerprint}"
    )


if __name__ == "__main__":
    main()
