"""Decide again: other thresholds, or another rule, for a labeled output, from its scores."""

from __future__ import annotations

import click

from mmray.cli import cluster, job


@job("decide")
@click.option("--predictions", "predictions_uri", required=True, help="A finished output of label.py.")
@click.option("--output", "output_uri", required=True, help="Folder for the new output.")
@click.option(
    "--thresholds",
    "thresholds_uri",
    help="JSON: label to threshold, or a bundle's thresholds.json. Labels that it lacks keep theirs.",
)
@click.option("--threshold", type=float, help="One threshold for all labels.")
@click.option(
    "--fallback/--no-fallback", default=True, help="Whether a row that reaches none gets its top label."
)
def main(
    predictions_uri: str,
    output_uri: str,
    thresholds_uri: str | None,
    threshold: float | None,
    fallback: bool,
) -> None:
    """Decide again, without a GPU, what scores mean: as a new output with a manifest of its own.

    Example: decide.py --predictions labeled/ --output decided/ --threshold 0.6
    """
    if thresholds_uri and threshold is not None:
        raise click.UsageError("--thresholds and --threshold exclude one another")
    if not thresholds_uri and threshold is None and fallback:
        raise click.UsageError("nothing to decide: give --thresholds, --threshold or --no-fallback")
    with cluster():
        from mmray.deciding import decide_again, read_thresholds

        thresholds = read_thresholds(thresholds_uri) if thresholds_uri else threshold
        result = decide_again(predictions_uri, output_uri, thresholds, fallback=fallback, progress=True)
    click.echo(f"{result.summary()}; {output_uri}")


if __name__ == "__main__":
    main()
