"""Hold labeling against its peers, side by side, and the forecast of `jobs/bench.py` against the run.

    make bench    or    python tests/peers/bench.py [--repeats N] [--only TEXT] [--output F]; --help says more

Every engine runs as a command of its own, from nothing to its exit, in turns, so that what the machine does
beside touches all alike. The order of a turn is drawn anew each time.

rows_per_s      steady: all rows, from when the first model is there until the last batch, by what the model
                writes down whichever engine feeds it (`hooks/peer_models.py`). What comes before and after
                is in wall_s.
wall_s          from the command's start to its exit. What a job takes that starts Ray as mmray's jobs do,
                and does nothing, is measured apart: `ray_alone_s`.
cpu_s_per_1000_rows  of all its processes.
peak_bytes      of PSS, of all its processes together, Ray's daemons with them, sampled twice a second: in a
                turn of its own before the others, which sampling would slow down.

A turn in which an engine's rows are not those of the input, each once, counts as failed; so does one of an
engine that shares the decode and whose scores are not those of the loop within 1e-5. In its own idiom an
engine sees other pixels, since it resizes otherwise: there only the rows are held. "memory kept" is an engine
with the variables by which mmray's own workers are started, so that what these give is not taken for the
engine's.
"""

from __future__ import annotations

import json
import math
import os
import platform
import random
import shutil
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import pyarrow.dataset as pds
import workloads
from measuring import KEPT, run_command
from rich.console import Console
from rich.table import Table
from workloads import Workload

HERE = Path(__file__).parent
JOBS = HERE.parents[1] / "jobs"
DAFT = HERE.parents[1] / "build" / "peers"
"""Where `make bench` puts Daft and the pyarrow that it wants."""
SAME_SCORES = 1e-5
NOTHING = "from mmray.cli import cluster\nwith cluster():\n    pass"
"""A job that starts Ray, and ends."""


class Engine(NamedTuple):
    """A way to label rows."""

    script: Path
    options: tuple[str, ...] = ()
    environ: Mapping[str, str] = {}

    @property
    def shares_decode(self) -> bool:
        """Tell whether the same pixels reach the model as in the loop."""
        return "--idiom" not in self.options


SCRIPTS = {"ray data": "ray_data.py", "daft": "daft_udf.py", "datasets": "hf_datasets.py"}
ENGINES = {
    "mmray": Engine(JOBS / "label.py", ("--no-gpu",)),
    "loop": Engine(HERE / "engines" / "loop.py"),
    "loop, memory kept": Engine(HERE / "engines" / "loop.py", environ=KEPT),
    **{name: Engine(HERE / "engines" / script) for name, script in SCRIPTS.items()},
    "ray data, fused": Engine(HERE / "engines" / "ray_data.py", ("--fused",)),
    **{f"{name}, idiom": Engine(HERE / "engines" / script, ("--idiom",)) for name, script in SCRIPTS.items()},
}


class Run(NamedTuple):
    """What one run of an engine took."""

    rows_per_s: float
    wall_s: float
    cpu_s_per_1000_rows: float
    peak_bytes: float


def run_engine(
    name: str, workload: Workload, scratch: Path, *, memory: bool
) -> tuple[Run, dict[str, np.ndarray]]:
    """Run an engine over a workload; give what it took, and each row's scores by its id.

    Raises:
        click.ClickException: it failed, or its rows are not the input's.
    """
    engine = ENGINES[name]
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    # Daft's own processes look for what the engine imported, and find it only on the path.
    path = [HERE / "hooks", *([DAFT, engine.script.parent] if name.startswith("daft") else [])]
    environ = {"PEERS_TRACE": str(scratch / "trace"), "PYTHONPATH": os.pathsep.join(map(str, path))}
    environ |= engine.environ
    options = {"input": workload.input, "model": workload.model, "output": scratch / "output"}
    given = [text for option, path in options.items() for text in (f"--{option}", str(path))]
    usage = run_command([sys.executable, str(engine.script), *given, *engine.options], environ, memory=memory)
    scores = read_scores(scratch / "output")
    if (num_rows := sum(map(len, scores.values()))) != workload.num_rows or scores.keys() != ids(workload):
        raise click.ClickException(f"{name}: {num_rows} rows of {workload.num_rows}, or others")
    run = Run(
        steady(scratch / "trace"),
        usage.wall_s,
        1000 * usage.cpu_s / workload.num_rows,
        usage.peaks["with Ray's daemons"],
    )
    return run, {key: found[0] for key, found in scores.items()}


def steady(trace: Path) -> float:
    """Give the rows a second from the first model to the last batch."""
    times, rows = np.array([line.split() for line in trace.read_text().splitlines()], float).T
    return float(rows.sum() / (times.max() - times.min()))


def read_scores(output: Path) -> dict[str, list[np.ndarray]]:
    """Read what an engine wrote: every score of every id."""
    found: dict[str, list[np.ndarray]] = defaultdict(list)
    files = [str(path) for path in output.rglob("*.parquet") if "_mmray" not in path.parts]
    table = pds.dataset(files).to_table(["image_id", "scores"])
    for key, scores in zip(table["image_id"].to_pylist(), table["scores"].to_pylist(), strict=True):
        found[key].append(np.array(scores, np.float32).ravel())
    return found


def ids(workload: Workload) -> set[str]:
    """Give the ids of a workload's rows, which are all different."""
    return set(pds.dataset(str(workload.input)).to_table(["image_id"])["image_id"].to_pylist())


def measure(workload: Workload, names: list[str], repeats: int, scratch: Path) -> Iterator[dict[str, Any]]:
    """Run engines in turns; give a result for each that ever passed the gate, with the turns it failed."""
    runs: dict[str, list[Run]] = {name: [] for name in names}
    failures: Counter[str] = Counter()
    expected: dict[str, np.ndarray] = {}
    peaks: dict[str, float] = {}
    for turn in range(1 + repeats):
        order = sorted(runs, key=lambda name: (turn == 0 and name != "loop", random.random()))
        for name in order:  # the loop comes first in the first turn: it says what is expected
            click.echo(f"{workload.name}, turn {turn or 'of memory'}: {name}", err=True)
            try:
                run, scores = run_engine(name, workload, scratch, memory=turn == 0)
                if name == "loop":
                    expected = expected or scores
                if not expected:
                    raise click.ClickException(f"{name}: the loop failed, and nothing says what is right")
                apart = float(np.max([np.abs(scores[key] - expected[key]) for key in expected]))
                if ENGINES[name].shares_decode and not apart <= SAME_SCORES:  # nor without a number
                    raise click.ClickException(f"{name}: scores are {apart:.1e} apart")
            except click.ClickException as error:
                click.echo(f"{error.message}: no result of this turn", err=True)
                failures[name] += 1
            else:
                if turn == 0:
                    peaks[name] = run.peak_bytes
                else:
                    runs[name].append(run._replace(peak_bytes=peaks.get(name, math.nan)))
    for name, taken in runs.items():
        if not taken:
            continue
        medians = {field: statistics.median(column) for field, column in columns(taken)}
        ranges = {field: [min(column), max(column)] for field, column in columns(taken)}
        told = {"workload": workload.name, "engine": name, "failed_turns": failures[name]}
        yield {**told, **medians, "ranges": ranges}


def columns(runs: list[Run]) -> Iterator[tuple[str, tuple[float, ...]]]:
    """Lay runs out by what was measured."""
    return zip(Run._fields, zip(*runs, strict=True), strict=True)


def forecast(workload: Workload, scratch: Path) -> dict[str, Any]:
    """Ask `jobs/bench.py` how a workload will go."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    command = [sys.executable, str(JOBS / "bench.py"), "--no-gpu", "--json", str(scratch / "forecast.json")]
    command += ["--input", str(workload.input), "--model", str(workload.model)]
    run_command(command, {"PYTHONPATH": str(HERE / "hooks")})
    return json.loads((scratch / "forecast.json").read_text())


def ray_alone(repeats: int) -> float:
    """Give the median seconds of a job that starts Ray and ends."""
    command = [sys.executable, "-c", NOTHING]
    return statistics.median(run_command(command, memory=False).wall_s for _ in range(repeats))


def as_table(title: str, results: list[dict[str, Any]]) -> Table:
    """Lay results out for people: medians, and ranges of the speed."""
    table = Table(title=title)
    for name in ("engine", "rows/s", "lowest-highest", "wall s", "CPU s/1,000 rows", "peak MB", "failed"):
        table.add_column(name, justify="left" if name == "engine" else "right")
    for result in sorted(results, key=lambda result: -result["rows_per_s"]):
        low, high = result["ranges"]["rows_per_s"]
        table.add_row(
            result["engine"],
            f"{result['rows_per_s']:.1f}",
            f"{low:.1f}-{high:.1f}",
            f"{result['wall_s']:.1f}",
            f"{result['cpu_s_per_1000_rows']:.2f}",
            f"{result['peak_bytes'] / 1e6:,.0f}",
            str(result["failed_turns"] or ""),
        )
    return table


def machine() -> dict[str, Any]:
    """Describe what this runs on."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {"cpu": names[0].split(": ")[1], "num_cpus": os.cpu_count(), "python": platform.python_version()}


@click.command()
@click.option("--state", default="build/bench", show_default=True, help="Keeps inputs and models.")
@click.option("--output", default="build/bench.json", show_default=True, help="Takes the results.")
@click.option("--stub-rows", default=4000, show_default=True, help="Labeled with the stub.")
@click.option("--model-rows", default=600, show_default=True, help="Labeled with efficientnet_b0.")
@click.option("--repeats", default=5, show_default=True, help="Turns that are timed.")
@click.option("--only", default="", help="Workloads whose name holds this text.")
@click.option("--engine", "names", multiple=True, help="Only these engines, and the loop.")
def main(
    state: str,
    output: str,
    stub_rows: int,
    model_rows: int,
    repeats: int,
    only: str,
    names: tuple[str, ...],
) -> None:
    """Hold labeling against its peers."""
    sys.path.insert(0, str(HERE / "hooks"))
    import peer_models  # noqa: F401

    folder, results, forecasts = Path(state).absolute(), [], []
    alone_s = ray_alone(repeats)
    click.echo(f"a job that starts Ray and ends: {alone_s:.1f} s, the median of {repeats}")
    chosen = [name for name in ENGINES if not names or name in (*names, "loop")]
    for model, num_rows in {"stub": stub_rows, "efficientnet_b0": model_rows}.items():
        for kind in (workloads.photos, workloads.coco18):
            name = f"{kind.__name__} {model}"
            if only not in name or (rows := kind(folder, num_rows)) is None:
                continue
            workload = Workload(name, rows, workloads.bundle(folder, model), workloads.count_rows(rows))
            found = list(measure(workload, chosen, repeats, folder / "scratch"))
            results += found
            Console().print(as_table(f"{name}, {workload.num_rows:,} rows", found))
            told = forecast(workload, folder / "scratch")
            mine = next((one["rows_per_s"] for one in found if one["engine"] == "mmray"), None)
            if mine:
                share = told["rows_per_s"] / mine
                click.echo(f"forecast: {told['rows_per_s']:.1f} rows/s, {share:.2f} of the run's")
            forecasts.append({"workload": name, **told})
            record = {"date": date.today().isoformat(), "machine": machine(), "repeats": repeats}
            content = {**record, "ray_alone_s": alone_s, "results": results, "forecasts": forecasts}
            Path(output).parent.mkdir(parents=True, exist_ok=True)
            Path(output).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
