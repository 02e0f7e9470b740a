"""Run a command and measure what it takes, all its processes together.

Memory is what Linux calls PSS, where a page that n processes share counts 1/n for each, sampled twice a
second and summed up. Each sample stops a process for as long as its pages are counted: so what is to be timed
is measured without. Ray's daemons are `raylet`, `gcs_server` and the like: whatever is neither the command's
own process nor a Ray worker.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import click

from mmray.joining import WORKER_ENVIRONMENT

SAMPLES_PER_S = 2

KEPT = {name: value for name, value in WORKER_ENVIRONMENT.items() if name.startswith("MALLOC")}
"""By which glibc keeps memory, as mmray's workers are started."""


class Usage(NamedTuple):
    """What a command took."""

    wall_s: float
    cpu_s: float
    """Of all processes."""
    rss_bytes: int
    """Of the command's own process, at its peak, as the kernel keeps it."""
    peaks: Counter[str]
    """Of PSS in bytes, by kind of process; each at a time of its own."""


def run_command(
    command: Sequence[str | Path], environ: Mapping[str, str] | None = None, *, memory: bool = True
) -> Usage:
    """Run a command to its end.

    Args:
        command: with its arguments.
        environ: what is added to the environment.
        memory: sample it; without, all peaks are 0.

    Raises:
        click.ClickException: it failed.
    """
    mark, peaks, rss, cpu_s = f"MMRAY_MEASURED={uuid4().hex}", Counter[str](), 0, dict[str, float]()
    started = time.monotonic()
    job = subprocess.Popen(command, env=os.environ | dict(environ or {}) | dict([mark.split("=")]))
    while job.poll() is None:
        peaks |= _sampled(job.pid, mark, cpu_s, memory)
        rss = max(rss, _memory(f"/proc/{job.pid}/status", "VmHWM"))
        with suppress(subprocess.TimeoutExpired):
            job.wait(1 / SAMPLES_PER_S)
    wall_s = time.monotonic() - started
    if job.returncode:
        raise click.ClickException(f"{' '.join(map(str, command))} ended with {job.returncode}")
    return Usage(wall_s, sum(cpu_s.values()), rss, peaks)


def _sampled(command: int, mark: str, cpu_s: dict[str, float], memory: bool) -> Counter[str]:
    """Sum up the memory of the processes that inherited a mark in their environment, and note their time."""
    sums = Counter[str]()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended, or is not ours to read
            if mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                worker = (process / "cmdline").read_bytes().startswith(b"ray::")
                kind = "driver" if process.name == str(command) else "workers" if worker else "daemons"
                ticks = (process / "stat").read_text().rpartition(")")[2].split()[11:13]
                cpu_s[process.name] = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
                sums[kind] += _memory(f"{process}/smaps_rollup", "Pss") if memory else 0
    both, total = sums["driver"] + sums["workers"], sums.total()
    return sums | Counter({"driver and workers": both, "with Ray's daemons": total})


def _memory(file: str, entry: str) -> int:
    """Read a number of bytes from what the kernel says of a process; 0 when it has ended."""
    with suppress(OSError):
        for line in Path(file).read_text().splitlines():
            if line.startswith(f"{entry}:"):
                return int(line.split()[1]) << 10
    return 0
