"""Measure a labeling job of many files: a thousandth of a billion rows in a million files.

    python tests/peers/scaling.py [--files N] [--file-rows N] [--state FOLDER]
    python tests/peers/scaling.py --files 500 --latency 0.03

Rows hold a stub image of 32 pixels and a short caption, the model is the smallest there is: what is left is
what rows, shards and files cost. With `--latency`, input and output are in moto's S3 server, behind a proxy
that lets each request wait so long (a simulation) and counts them. When the plan and the last labeled file
were there is read from the output.
"""

from __future__ import annotations

import io
import logging
import os
import resource
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq
from measuring import run_command
from PIL import Image
from resume import JOBS, make_tiny_bundle
from resume_requests import BUCKET, kind_of

sys.path.insert(0, str(Path(__file__).parents[1] / "s3"))

from conftest import moto, proxied

from mmray.parquet import describe_files, find_files
from mmray.schema import CANONICAL_SCHEMA
from mmray.storage import Folder

IMAGE_PX = 32
FILES_A_FOLDER = 1000


def lay_down(state: Path, num_files: int, file_rows: int) -> None:
    """Draw the rows and make the bundle, unless they are there."""
    if (state / "complete").exists():
        return
    shutil.rmtree(state, ignore_errors=True)
    data = io.BytesIO()
    Image.linear_gradient("L").resize((IMAGE_PX, IMAGE_PX)).convert("RGB").save(data, "JPEG")
    captions = [f"a drawing of number {row}" for row in range(file_rows)]
    for number in range(num_files):
        ids = [f"{number:06}-{row:04}" for row in range(file_rows)]
        path = state / "input" / f"{number // FILES_A_FOLDER:04}" / f"{number % FILES_A_FOLDER:03}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = [ids, [data.getvalue()] * file_rows, captions]
        pq.write_table(pa.table(columns, schema=CANONICAL_SCHEMA), path)
    make_tiny_bundle(Folder(str(state / "bundle")), captions)
    (state / "complete").touch()


@contextmanager
def slow_store(state: Path, latency_s: float) -> Iterator[tuple[str, Counter[str]]]:
    """Serve the input from a slow store; gives its address, and afterwards what was asked of it."""
    import fsspec

    os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # moto's server tells every request
    counts: Counter[str] = Counter()
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    with moto() as store, proxied(listener, store) as proxy:
        direct = fsspec.filesystem("s3", endpoint_url=f"http://{store}")
        direct.mkdir(BUCKET)
        for name in ("input", "bundle"):
            direct.put(f"{state / name}/", f"{BUCKET}/{name}/", recursive=True)
        proxy.latency_s = latency_s
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", counts
        counts.update(map(kind_of, proxy.requests))
        direct.get(f"{BUCKET}/output/", f"{state / 'output'}/", recursive=True)


@click.command()
@click.option("--files", "num_files", default=10_000, show_default=True, help="Input files, a shard each.")
@click.option("--file-rows", default=100, show_default=True, help="Rows of each.")
@click.option("--latency", "latency_s", type=float, help="Seconds that each request to S3 waits.")
@click.option("--state", "folder", default="build/scaling", show_default=True, help="Keeps the input.")
def main(num_files: int, file_rows: int, latency_s: float | None, folder: str) -> None:
    """Measure a labeling job of many files."""
    state = Path(folder).absolute() / f"{num_files}x{file_rows}"
    lay_down(state, num_files, file_rows)
    shutil.rmtree(state / "output", ignore_errors=True)
    load, counts = os.getloadavg()[0], Counter[str]()
    if latency_s is None:
        click.echo(f"footers alone: {footers(state / 'input')}")
        began = time.time()
        usage = run_command(command(str(state)))
        plan, *_ = (state / "output" / "_mmray" / "plan").iterdir()
        labeled = max(path.stat().st_mtime for path in (state / "output").glob("0*/*.parquet"))
        click.echo(
            f"planned after {plan.stat().st_mtime - began:.1f} s, labeled after {labeled - began:.1f} s"
        )
    else:
        with slow_store(state, latency_s) as (endpoint, counts):
            usage = run_command(command(f"s3://{BUCKET}"), {"AWS_ENDPOINT_URL": endpoint})
    num_rows = num_files * file_rows
    click.echo(
        f"{num_rows:,} rows in {num_files:,} files: {usage.wall_s:.1f} s, "
        f"{num_rows / usage.wall_s:,.0f} rows/s, {usage.cpu_s:.0f} s of CPU; the load was {load:.1f} before"
    )
    click.echo(f"driver: {usage.rss_bytes / 1e6:,.0f} MB of RSS at most")
    for name, num_bytes in usage.peaks.items():
        click.echo(f"{name}: {num_bytes / 1e6:,.0f} MB of PSS at most")
    for name in ("plan", "manifest.json"):
        there = state / "output" / "_mmray" / name
        size = sum(path.stat().st_size for path in ([there] if there.is_file() else there.iterdir()))
        click.echo(f"{name}: {size / 1e6:.2f} MB")
    for kind, count in sorted(counts.items()):
        click.echo(f"{count:8,} {kind}")


def footers(rows: Path) -> str:
    """Say what it takes to read the footers of some files in this process, and to hold what they tell."""
    folder, files = find_files(str(rows))
    first = describe_files(folder, files, "image")  # what threads and libraries take once is not a footer's
    before, began = resident_bytes(), time.monotonic()
    described = describe_files(folder, files, "image")
    seconds, grown = time.monotonic() - began, resident_bytes() - before
    assert described == first
    each = len(described)
    return f"{1e3 * seconds / each:.2f} ms and {grown / each / 1e3:.1f} kB of memory each"


def resident_bytes() -> int:
    """Give the memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def command(base: str) -> list[str]:
    """Give the labeling job over what lies below a folder."""
    places = {"input": "input", "model": "bundle", "output": "output"}
    given = [part for option, name in places.items() for part in (f"--{option}", f"{base}/{name}")]
    return [sys.executable, str(JOBS / "label.py"), "--no-gpu", *given]


if __name__ == "__main__":
    main()
