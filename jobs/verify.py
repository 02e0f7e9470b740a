"""Prove a labeled output against its input."""

from __future__ import annotations

import sys

import click

from mmray.cli import EXIT_BAD_RESULT, cluster, job


@job("verify")
@click.option("--input", "input_uri", required=True, help="What was labeled.")
@click.option("--output", "output_uri", required=True, help="What label.py made of it.")
def main(input_uri: str, output_uri: str) -> None:
    """Check files, rows, passthrough values and bytes of a labeled output; exit status 1 if any differ.

    Example: verify.py --input s3://archive/2026 --output s3://labels/2026
    """
    with cluster():
        from mmray.verify import verify_dataset

        found = verify_dataset(input_uri, output_uri)
    for problem in found.problems:
        click.echo(problem)
    skipped = f" ({found.num_skipped:,} others were skipped as unreadable)" if found.num_skipped else ""
    checked = f"{found.num_files:,} files, {found.num_rows:,} rows{skipped}"
    click.echo(f"{checked}: {len(found.problems) or 'no'} problems")
    sys.exit(EXIT_BAD_RESULT if found.problems else 0)


if __name__ == "__main__":
    main()
