"""Label a Parquet dataset of images and captions; the same command resumes."""

from __future__ import annotations

from typing import Any

import click

from mmray.cli import cluster, job, options
from mmray.config import Columns, ComputeConfig, LabelConfig
from mmray.options import make


@job("label")
@click.option("--input", "input_uri", required=True, help="Folder of Parquet files, or one file.")
@click.option("--model", "model_uri", required=True, help="Bundle that train.py made.")
@click.option("--output", "output_uri", required=True, help="Folder for the labeled files.")
@options(Columns, LabelConfig, ComputeConfig)
@click.option(
    "--retry-failed", "retry_failed_uri", help="A finished output; label only its failed rows again."
)
@click.option("--extend", is_flag=True, help="Also label input files that came after the plan.")
@click.option("--dry-run", is_flag=True, help="Show the plan and do nothing.")
def main(
    input_uri: str,
    model_uri: str,
    output_uri: str,
    retry_failed_uri: str | None,
    extend: bool,
    dry_run: bool,
    **settings: Any,
) -> None:
    """Label a Parquet dataset of images and captions, or go on where an earlier run stopped.

    Example: label.py --input s3://archive/2026 --model s3://models/coco --output s3://labels/2026
    """
    with cluster():
        from mmray.labeling import label_dataset

        result = label_dataset(
            input_uri,
            model_uri,
            output_uri,
            make(Columns, settings),
            make(LabelConfig, settings),
            make(ComputeConfig, settings),
            retry_failed_uri=retry_failed_uri,
            extend=extend,
            dry_run=dry_run,
            progress=True,
        )
    if dry_run:
        click.echo(
            f"{result.num_rows:,} rows in {result.num_files:,} files: {result.num_shards:,} shards, "
            f"of which {result.num_shards - result.num_resumed:,} are still to be labeled"
        )
    else:
        click.echo(f"{result.summary()}; {output_uri}")


if __name__ == "__main__":
    main()
