"""Run the main job on generated data: draw, prepare, train, label, verify, evaluate, report."""

from __future__ import annotations

import sys

import click

from mmray.cli import EXIT_BAD_RESULT, cluster, job


@job("demo")
@click.option("--output", "output_uri", default="build/demo", show_default=True, help="Folder for all files.")
def main(output_uri: str) -> None:
    """Draw scenes, train a model on them, label an archive of others, and check the result; needs no network.

    Example: demo.py --output /tmp/demo
    """
    with cluster():
        from rich.console import Console

        from mmray.demo import run_demo
        from mmray.evaluate import as_table

        console = Console()
        demo = run_demo(output_uri, lambda step: console.print(f"[bold]{step}"))
        console.print(as_table(demo.summary))
        for problem in demo.verification.problems:
            console.print(problem)
    console.print(f"{demo.labeling.summary()}; verified, {len(demo.verification.problems) or 'no'} problems")
    console.print(
        f"Everything is in {output_uri}: raw/, data/, bundle/, labeled/, and two reports:", soft_wrap=True
    )
    console.print(f"{output_uri}/training.html and {output_uri}/labeled.html", soft_wrap=True)
    sys.exit(EXIT_BAD_RESULT if demo.verification.problems else 0)


if __name__ == "__main__":
    main()
