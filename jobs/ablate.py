"""Measure what each part of the method is worth; a rerun skips what is done."""

from __future__ import annotations

from typing import Any

import click

from mmray.cli import cluster, job, options
from mmray.config import AblationConfig, Columns, ComputeConfig, ModelConfig, TrainConfig
from mmray.options import make


@job("ablate")
@click.option("--data", "data_uri", required=True, help="Parquet rows to train on.")
@click.option("--val", "val_uri", required=True, help="Parquet rows to measure on; they also choose epochs.")
@click.option("--unlabeled", "unlabeled_uri", help="Parquet rows for the axis self-training.")
@click.option("--output", "output_uri", required=True, help="Folder for the tables and all runs.")
@options(AblationConfig, ModelConfig, TrainConfig, Columns, ComputeConfig)
def main(data_uri: str, val_uri: str, unlabeled_uri: str | None, output_uri: str, **settings: Any) -> None:
    """Train the recipe with one part changed at a time, over several seeds: a table, a CSV and a plot.

    Example: ablate.py --config recipe.yaml --data rows/train --val rows/val --output ablation
    """
    with cluster():
        from rich.console import Console
        from rich.markdown import Markdown

        from mmray.ablate import Places, ablate, as_markdown
        from mmray.variants import Experiment

        columns, compute = make(Columns, settings), make(ComputeConfig, settings)
        rows = ablate(
            Experiment(make(ModelConfig, settings), make(TrainConfig, settings)),
            make(AblationConfig, settings),
            Places(data_uri, val_uri, unlabeled_uri, columns, compute),
            output_uri,
            progress=True,
        )
        Console().print(Markdown(as_markdown(rows)))
    click.echo(f"The tables, the plot and all runs: {output_uri}")


if __name__ == "__main__":
    main()
