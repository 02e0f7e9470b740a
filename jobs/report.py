"""Report on a training run, an ablation or a labeled output, as one HTML file."""

from __future__ import annotations

import click

from mmray.cli import cluster, job, options
from mmray.config import Columns


@job("report")
@click.option("--run", "run_uri", required=True, help="Bundle, labeled output, or output of ablate.py.")
@click.option("--input", "input_uri", help="The rows that were labeled, for thumbnails.")
@click.option(
    "--model", "model_uri", help="The bundle that labeled, to find rows where image and caption disagree."
)
@options(Columns, only=("image_prefixes",))
@click.option("--output", "output_uri", required=True, help="The HTML file.")
def main(
    run_uri: str,
    input_uri: str | None,
    model_uri: str | None,
    image_prefixes: tuple[str, ...],
    output_uri: str,
) -> None:
    """Write a page that opens from disk, without a network: numbers, charts, rows to look at.

    Example: report.py --run labeled/ --input archive/ --model models/first --output report.html
    """
    with cluster():
        from mmray.report import write_report

        size = write_report(
            run_uri, output_uri, input_uri=input_uri, model_uri=model_uri, image_prefixes=image_prefixes
        )
    click.echo(f"{output_uri}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
