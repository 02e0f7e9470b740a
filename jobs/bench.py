"""Measure the stages of labeling apart, name what will limit the job, and say how long it will take."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from mmray.cli import cluster, job, options
from mmray.config import Columns, ComputeConfig, ScoringConfig
from mmray.options import make


@job("bench")
@click.option("--input", "input_uri", required=True, help="Folder of Parquet files, or one file.")
@click.option("--model", "model_uri", required=True, help="Bundle that train.py made.")
@click.option("--scratch", "scratch_uri", help="Folder to measure writing in, such as one beside the output.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Also write the numbers here.")
@options(Columns, ScoringConfig, ComputeConfig)
def main(
    input_uri: str, model_uri: str, scratch_uri: str | None, json_path: str | None, **settings: Any
) -> None:
    """Predict how fast label.py will go on this cluster, and what holds it, from a thousand rows.

    Example: bench.py --input s3://archive/2026 --model s3://models/coco --scratch s3://labels/scratch
    """
    with cluster():
        from rich.console import Console

        from mmray.bench import as_table, forecast

        found = forecast(
            input_uri,
            model_uri,
            make(Columns, settings),
            make(ScoringConfig, settings),
            make(ComputeConfig, settings),
            scratch_uri,
        )
    Console().print(as_table(found))
    hours, minutes = divmod(round(found.seconds / 60), 60)
    if json_path:
        Path(json_path).write_text(json.dumps(asdict(found), indent=2) + "\n")
    click.echo(f"{found.limit} is the limit; the whole job will take {hours} h {minutes:02} min")


if __name__ == "__main__":
    main()
