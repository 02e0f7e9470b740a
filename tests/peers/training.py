"""Hold training by Ray Train against a plain PyTorch loop over the same files, and two workers against one.

    python tests/peers/training.py [--rows N] [--repeats N] [--epochs N] [--loaders N]

All train the model of `jobs/recipes/coco18-quick.yaml` on the first rows of coco18, by the same steps, with
the same decode and augmentation (`mmray.worker.train_epoch`); what differs is what feeds them, and who starts
them. Each is a command of its own, in turns. rows/s are those of an epoch, the first one left out, since it
also waits for what starts once; Ray's epochs include 64 rows of validation. The loop's DataLoader decodes in
processes of its own.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import click
import pyarrow.parquet as pq
import workloads
from measuring import run_command
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
JOBS = HERE.parents[1] / "jobs"
RECIPE = JOBS / "recipes" / "coco18-quick.yaml"
BATCH_ROWS = 32
"""Of the recipe."""
VAL_ROWS = 64
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}
"""As mmray's jobs set it: threads that wait do not spin."""


def train_by_ray(data: Path, val: Path, output: Path, workers: int, epochs: int) -> list[float]:
    """Train with Ray Train; give rows/s of each epoch."""
    shutil.rmtree(output, ignore_errors=True)
    options = {"config": RECIPE, "data": data, "val": val, "output": output, "epochs": epochs}
    options |= {"patience": epochs, "num-workers": workers}
    given = [str(text) for option, value in options.items() for text in (f"--{option}", value)]
    run_command([sys.executable, str(JOBS / "train.py"), *given, "--no-gpu"], memory=False)
    history = json.loads((output / "metrics.json").read_text())["history"]
    num_rows = workloads.count_rows(data) // workers // BATCH_ROWS * BATCH_ROWS * workers
    return [num_rows / epoch["seconds"] for epoch in history]


def train_by_loop(data: Path, model: Path, output: Path, loaders: int) -> list[float]:
    """Train without Ray; give rows/s of each epoch."""
    options = {"data": data, "model": model, "loaders": loaders}
    given = [str(text) for option, value in options.items() for text in (f"--{option}", value)]
    script = str(HERE / "engines" / "train_loop.py")
    run_command([sys.executable, script, *given, "--output", str(output)], PASSIVE, memory=False)
    rates: list[float] = json.loads(output.read_text())
    return rates


@click.command()
@click.option("--state", default="build/bench", show_default=True, type=Path, help="Keeps inputs and models.")
@click.option("--rows", "num_rows", default=4000, show_default=True)
@click.option("--repeats", default=5, show_default=True, help="Turns.")
@click.option("--epochs", default=3, show_default=True, help="Of each training.")
@click.option("--loaders", default=1, show_default=True, help="Processes that read and decode for the loop.")
def main(state: Path, num_rows: int, repeats: int, epochs: int, loaders: int) -> None:
    """Hold training against a plain loop."""
    state = state.absolute()
    if (data := workloads.coco18(state, num_rows)) is None:
        raise click.ClickException("the real images are not at hand")
    val, rates = state / "coco18-val", defaultdict[str, list[float]](list)
    val.mkdir(exist_ok=True)
    pq.write_table(pq.read_table(next(data.glob("*.parquet")))[:VAL_ROWS], val / "rows.parquet")
    one = state / "trained-1"
    for turn in range(repeats):
        click.echo(f"turn {turn + 1}", err=True)
        rates["Ray Train, 1 worker"] += train_by_ray(data, val, one, 1, epochs)[1:]
        rates["loop"] += train_by_loop(data, one, state / "loop.json", loaders)[1:]
        rates["Ray Train, 2 workers"] += train_by_ray(data, val, state / "trained-2", 2, epochs)[1:]
    table = Table(title=f"training on {num_rows:,} rows of coco18, {RECIPE.name}")
    for name in ("engine", "rows/s", "lowest-highest", "of the loop's"):
        table.add_column(name, justify="left" if name == "engine" else "right")
    ceiling = statistics.median(rates["loop"])
    for name, found in rates.items():
        median = statistics.median(found)
        table.add_row(name, f"{median:.1f}", f"{min(found):.1f}-{max(found):.1f}", f"{median / ceiling:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
