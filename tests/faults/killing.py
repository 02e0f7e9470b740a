"""Real labeling jobs that are stopped at a moment of the protocol, killed there, and run again.

A job is `jobs/label.py` in a process of its own. Its processes are found by a mark in their environment,
whoever their parent is by now, and nothing else is ever killed.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mmray.faults import FAULT, FOLDER
from mmray.verify import verify_dataset

JOBS = Path(__file__).parents[2] / "jobs"
MARK = "MMRAY_TEST_RUN"
DEADLINE_S = 240
RAY = (sys.executable, "-m", "ray.scripts.scripts")
SCORING = "ray::MapWorker"
"""How Ray titles the actors of a pool; other workers bear their task's name."""

hits: Counter[str] = Counter()
"""Kills that found their victim alive, by victim; the session's summary prints them."""


def poll(condition, what, deadline_s=DEADLINE_S):
    """Wait until a condition gives something true, and give it."""
    deadline = time.monotonic() + deadline_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {deadline_s} s in vain for {what()}"
        time.sleep(0.01)
    return value


def marked(mark, name=MARK):
    """Give the living processes that inherited a mark: process id -> title."""
    entry, found = f"{name}={mark}".encode(), {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if entry not in (process / "environ").read_bytes().split(b"\0"):
                continue
            if (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
                continue
            found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has just ended, or is not ours to read
            continue
    return found


def kill(process, victim):
    """Kill a process as `kill -9` does; tell whether it was alive."""
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return False
    hits[victim] += 1
    return True


@dataclass
class Run:
    """A job that was started."""

    process: subprocess.Popen
    mark: str
    folder: Path
    """Where its faults and what it prints are."""

    def told(self):
        """Give what it has printed."""
        return (self.folder / "stdout").read_text() + (self.folder / "stderr").read_text()

    def reached(self, index=0):
        """Wait for a moment, and give the process that is there."""
        file = self.folder / f"reached-{index}"

        def there():
            written = file.exists() and file.read_text()
            assert written or self.process.poll() is None, f"it ended before its moment: {self.told()}"
            return written

        return int(poll(there, lambda: f"{file.name}: {self.told()}"))

    def go(self):
        """Let the process that is stopped at its moment go on."""
        (self.folder / "go").touch()

    def workers(self, title=""):
        """Give its workers, by a part of their title."""
        found = marked(self.mark).items()
        return [process for process, its in found if process != self.process.pid and title in its]

    def kill(self, victim, at_moment=None):
        """Kill the driver, an actor, the process at the moment or any worker; tell whether there was one."""
        if victim == "driver":
            return kill(self.process.pid, victim)
        if victim == "process at the moment":
            return kill(at_moment, victim)
        workers = self.workers(SCORING if victim == "actor" else "ray::")
        return bool(workers) and kill(workers[0], victim)

    def wait(self, deadline_s=DEADLINE_S):
        """Wait for its end, and give its exit status; negative for a signal."""
        try:
            return self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end: {self.told()}\n{marked(self.mark)}") from None

    def wait_for_workers(self):
        """Wait until none of its processes is left, whoever killed its driver."""
        poll(lambda: not marked(self.mark), lambda: f"the end of {marked(self.mark)}")

    def leave(self):
        """Leave nothing behind."""
        self.go()
        for process in marked(self.mark):
            kill(process, "left over")
        self.process.wait()
        self.wait_for_workers()
        hits.pop("left over", None)


@dataclass
class Job:
    """A labeling job, started as often as it takes: always the same command."""

    rows: Path
    bundle_uri: str
    output: Path
    scratch: Path
    address: str | None
    """Of the Ray cluster it joins; None lets each run start its own."""
    options: tuple[str, ...] = ()
    under: tuple[str, ...] = ()
    """A command that runs it, such as `env` with options."""
    environment: dict[str, str] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)

    @property
    def command(self):
        """Give the command."""
        given = {"input": self.rows, "model": self.bundle_uri, "output": self.output}
        given |= {"batch-size": 250, "max-failed-fraction": 0.05}
        return [*self.under, *job_command("label", given), "--no-gpu", *self.options]

    def start(self, fault=None):
        """Start it, with a fault or without."""
        mark = uuid.uuid4().hex
        folder = self.scratch / f"run-{len(self.runs)}-{mark[:8]}"
        folder.mkdir(parents=True)
        own = {MARK: mark, FOLDER: str(folder), **self.environment}
        if fault:
            own[FAULT] = fault
        environment = os.environ | own
        if self.address:
            # Workers of a cluster that runs already do not inherit the driver's environment. This is how
            # `ray job submit` hands a job's own to them.
            environment["RAY_ADDRESS"] = self.address
            environment["RAY_JOB_CONFIG_JSON_ENV_VAR"] = json.dumps({"runtime_env": {"env_vars": own}})
        with open(folder / "stdout", "w") as told, open(folder / "stderr", "w") as errors:
            process = subprocess.Popen(
                self.command, stdout=told, stderr=errors, env=environment, start_new_session=True
            )
        self.runs.append(Run(process, mark, folder))
        return self.runs[-1]

    def finish(self):
        """Run it to its end, undisturbed."""
        run = self.start()
        assert run.wait() == 0, run.told()
        return run

    def finish_after(self, run, survived):
        """See a disturbed run to its end, and run the job again where that is needed."""
        status = run.wait()
        if survived:
            assert status in (0, 3), run.told()
            assert "Traceback" not in run.told()
        else:
            assert status == -signal.SIGKILL, run.told()
        if status:
            self.finish()

    def leave(self):
        """Leave nothing behind."""
        for run in self.runs:
            run.leave()


@dataclass
class Deciding(Job):
    """A job that decides an output again, by one threshold."""

    predictions: Path | None = None

    @property
    def command(self):
        """Give the command."""
        return job_command(
            "decide", {"predictions": self.predictions, "output": self.output, "threshold": 0.3}
        )


def job_command(name, options):
    """Give the command of a job, with options and their values."""
    given = [text for option, value in options.items() for text in (f"--{option}", str(value))]
    return [sys.executable, str(JOBS / f"{name}.py"), *given]


@dataclass(frozen=True)
class Reference:
    """What an undisturbed run made."""

    rows: Path
    output: Path
    seconds: float
    """From the plan to the end."""

    def compare(self, output, same_threads=True):
        """Hold a finished output against this one: files, rows and what they were given.

        On workers of another size torch sums up in another order, and scores differ in their last digits.
        """
        expected, found = files_of(self.output), files_of(output)
        leftovers = {path for path in found if is_leftover(path)}
        assert found - leftovers == expected
        assert (output / "_SUCCESS").exists()
        for path in sorted(path for path in expected if path.endswith(".parquet")):
            if path.startswith("_mmray"):
                continue
            assert identities(output / path) == identities(self.rows / path)
            there, here = (
                pq.read_table(folder / path, partitioning=None) for folder in (self.output, output)
            )
            assert here.schema == there.schema, path
            for name in there.column_names:
                for row, (one, other) in enumerate(
                    zip(there[name].to_pylist(), here[name].to_pylist(), strict=True)
                ):
                    where = f"{path}: row {row}: {name}"
                    if name == "scores" and one and not same_threads:
                        assert one == pytest.approx(other, abs=1e-6), where
                    else:
                        assert repr(one) == repr(other), where  # NaN equals nothing
        rejected = [path for path in expected if path.startswith("_mmray/rejected/")]
        assert rejected
        for path in rejected:
            assert (output / path).read_bytes() == (self.output / path).read_bytes(), path
        verified = verify_dataset(str(self.rows), str(output))
        assert verified.problems == []
        assert verified.num_rows == sum(
            pq.read_metadata(path).num_rows for path in self.rows.rglob("*.parquet")
        )
        return leftovers


def identities(path):
    """Count the rows of a file by what the input calls them."""
    return Counter(pq.read_table(path, columns=["image_id"], partitioning=None)["image_id"].to_pylist())


def files_of(output):
    """List all files of an output, hidden ones too."""
    return {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}


def is_leftover(path):
    """Tell whether it is what a writer leaves that was killed in the middle of a file: no reader sees it."""
    return re.fullmatch(r"\..+\.[0-9a-f]{8}\.tmp", Path(path).name) is not None


class Node:
    """A node of a Ray cluster of its own: `ray start`, and all that comes of it.

    Its ports are its own and its traces lie below its folder, so that clusters beside it are not met.
    """

    NAME = "MMRAY_TEST_NODE"

    def __init__(self, folder, head=None, *, num_cpus=2, dashboard_port=None, environment=None):
        """Start a head, with Ray's job server if a port is given for it, or a node that joins one."""
        self.mark, self.log = (
            uuid.uuid4().hex,
            folder / f"{'joins' if head else 'head'}-{uuid.uuid4().hex[:8]}",
        )
        self.metrics_port = free_port()
        command = [*RAY, "start", "--block", "--num-cpus", str(num_cpus)]
        command += [
            "--object-store-memory",
            str(150 << 20),
            "--min-worker-port",
            "0",
            "--max-worker-port",
            "0",
            "--dashboard-agent-listen-port",
            str(free_port()),
            "--metrics-export-port",
            str(self.metrics_port),
            "--temp-dir",  # of its own, as on a machine of its own: code that a job brings is unpacked below
            str(folder / self.mark[:4]),
        ]
        if head:
            self.address = head.address
            command += ["--address", head.address]
        else:
            port = free_port()
            self.address = f"127.0.0.1:{port}"
            command += ["--head", "--node-ip-address", "127.0.0.1", "--port", str(port)]
            command += ["--include-dashboard", str(bool(dashboard_port)).lower()]
            command += ["--dashboard-port", str(dashboard_port)] if dashboard_port else []
        environment = os.environ if environment is None else environment
        environment = environment | {self.NAME: self.mark, "PYTHONUNBUFFERED": "1"}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def wait_until_up(self):
        """Wait until it serves."""

        def is_up():
            assert self.process.poll() is None, self.log.read_text()
            return "Ray runtime started" in self.log.read_text()

        poll(is_up, self.log.read_text)
        return self

    def processes(self):
        """Give its processes: id -> title."""
        return marked(self.mark, self.NAME)

    def metrics(self):
        """Read what it tells Prometheus."""
        with (
            suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics") as told,
        ):
            return told.read().decode()
        return ""

    def kill(self):
        """Kill all of them, as when the machine is gone; tell whether it was alive."""
        hit = self.process.poll() is None
        while found := self.processes():  # whoever is started in this very moment comes next
            for process in found:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            self.process.poll()
        return hit


def free_port():
    """Find a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
