"""Measure a bundle, or a labeled output, on rows whose labels are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mmray.cli import cluster, job, options
from mmray.config import Columns, ComputeConfig, ScoringConfig
from mmray.options import make


@job("evaluate")
@click.option("--data", "data_uri", required=True, help="Parquet rows with labels.")
@click.option("--model", "model_uri", help="Bundle to measure.")
@click.option("--predictions", "predictions_uri", help="Output of label.py to measure instead.")
@click.option(
    "--hide", type=click.Choice(["image", "caption"]), help="Measure what the model makes of the other alone."
)
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Also write the numbers here.")
@options(Columns, ScoringConfig, ComputeConfig)
def main(
    data_uri: str,
    model_uri: str | None,
    predictions_uri: str | None,
    hide: str | None,
    json_path: str | None,
    **settings: Any,
) -> None:
    """Measure F1, mAP, calibration and fallback rate, in all and by label.

    Example: evaluate.py --data s3://rows/val --predictions s3://labels/val --json numbers.json
    """
    if (model_uri is None) == (predictions_uri is None):
        raise click.UsageError("give one of --model and --predictions")
    if hide and predictions_uri:
        raise click.UsageError("--hide needs --model: the predictions are made already")
    with cluster():
        from rich.console import Console

        from mmray.evaluate import as_table, evaluate_model, evaluate_predictions

        columns = make(Columns, settings)
        if predictions_uri is not None:
            summary = evaluate_predictions(data_uri, predictions_uri, columns)
        else:
            scoring, compute = make(ScoringConfig, settings), make(ComputeConfig, settings)
            summary = evaluate_model(data_uri, str(model_uri), columns, scoring, compute, hidden=hide)
    Console().print(as_table(summary))
    if json_path:
        Path(json_path).write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
