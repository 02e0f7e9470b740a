"""Measure how a large labeling job resumes: 100,000 shards, all but ten of them committed.

    python tests/peers/resume.py [--shards N] [--state FOLDER] [--verify]

Lays down what a job leaves that is killed (`kill -9`) shortly before its end, made by mmray's own code:
input, bundle, plan, labeled files, pieces, records, and the lease of a process that is gone. Then runs
`jobs/label.py` to the end, in a process of its own, and reports the time and the memory that it took.

What is assumed of the killed job: it published its records a hundred times, once in ten seconds as jobs do,
thus committed 100 of 100,000 shards a second; and those of the last ten seconds are lost. One shard in a
hundred belongs to a file of ten: of these files ten are in pieces, five of them with a shard missing and five
complete but not joined. Five files of one shard are missing too.

Memory is told as `measuring.py` samples it; of the driver also its peak of resident memory (RSS). A machine
with other work makes the time longer: so the CPU time of all processes and the load beforehand are reported
too.

That the result is right is proved by `jobs/verify.py` with `--verify`, which takes minutes. Without, it is
shown by less: every file that was committed is still the very same file (its inode), every file of the plan
stands in the manifest with the size and the sha256 that it has, and what was missing passes the checks of
verify.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import pyarrow as pa
import pyarrow.parquet as pq
from bundles import make_bundle
from measuring import Usage, run_command

from mmray.bundle import Bundle
from mmray.config import Columns, LabelConfig, ModelConfig
from mmray.labeler import Labeler
from mmray.lease import LEASE, this_process
from mmray.parquet import find_files
from mmray.plan import PIECES, Plan, shards_of
from mmray.planning import plan_labeling
from mmray.rowgroups import DAMAGE
from mmray.schema import CANONICAL_SCHEMA, KeptScores
from mmray.shards import MANIFEST, RECORDS, Committer, Records
from mmray.storage import Folder
from mmray.tables import TableLabeler
from mmray.verify import Expected, check_file

JOBS = Path(__file__).parents[2] / "jobs"
ROW_GROUP_ROWS = 1001
"""Just above the rows of a shard: two shards each."""
SHARDS_OF_LARGE = 10
NUM_MISSING = 5
"""Of either kind of file."""


class Layout(NamedTuple):
    """Which files there are, and what has become of them."""

    small: list[str]
    """Of one shard, in the order in which they are committed."""
    joined: list[str]
    """Of ten shards, like the following."""
    unjoined: list[str]
    partial: list[str]
    """Their last shard is missing."""

    @classmethod
    def of(cls, num_shards: int) -> Layout:
        """Share the shards out."""
        num_large = max(2 * NUM_MISSING, num_shards // 1000)
        large = [f"large/{number:04}.parquet" for number in range(num_large)]
        num_small = num_shards - SHARDS_OF_LARGE * num_large
        small = [f"small-{number // 1000:04}/{number % 1000:03}.parquet" for number in range(num_small)]
        return cls(
            small, large[: -2 * NUM_MISSING], large[-2 * NUM_MISSING : -NUM_MISSING], large[-NUM_MISSING:]
        )

    @property
    def missing(self) -> list[str]:
        """Files that are not in the output."""
        return self.small[-NUM_MISSING:] + self.unjoined + self.partial


def lay_down(state: Path, num_shards: int) -> None:
    """Make the input, the bundle and what the killed job left, unless they are there."""
    if (state / "complete").exists():
        return
    shutil.rmtree(state, ignore_errors=True)
    started, layout = time.monotonic(), Layout.of(num_shards)
    rows = draw_rows(SHARDS_OF_LARGE // 2 * ROW_GROUP_ROWS)
    for path in (*layout.small, *layout.joined, *layout.unjoined, *layout.partial):
        (state / "input" / path).parent.mkdir(parents=True, exist_ok=True)
        part = named(rows if path.startswith("large") else rows[:1], path)
        pq.write_table(part, state / "input" / path, row_group_size=ROW_GROUP_ROWS)
    bundle = make_tiny_bundle(Folder(str(state / "bundle")), rows["caption"].to_pylist())
    config, output = LabelConfig(precision="fp32"), Folder(str(state / "output"))
    plan = plan_labeling(*find_files(str(state / "input")), bundle, output, Columns(), config)
    assert plan.num_shards == num_shards
    labeled = TableLabeler(Labeler(bundle), Columns(), KeptScores.parse(config.scores))(
        rows.append_column(DAMAGE, pa.nulls(len(rows), pa.string()))
    )
    commit(plan, output, layout, labeled)
    (state / "complete").touch()
    click.echo(f"laid down in {time.monotonic() - started:.0f} s")


def draw_rows(num_rows: int) -> pa.Table:
    """Give rows without images, with short captions."""
    captions = [f"a drawing of number {row}" for row in range(num_rows)]
    columns = [captions, pa.nulls(num_rows, pa.binary()), captions]
    return pa.table(columns, schema=CANONICAL_SCHEMA)


def named(rows: pa.Table, path: str) -> pa.Table:
    """Let the ids of rows tell their file."""
    ids = pa.array([f"{path} {row}" for row in range(len(rows))])
    return rows.set_column(rows.column_names.index("image_id"), "image_id", ids)


def make_tiny_bundle(folder: Folder, captions: list[str]) -> Bundle:
    """Make the smallest bundle there is."""
    config = ModelConfig(
        vision="test_efficientnet",
        text="bert_uncased_L-1_H-32_A-2",
        image_size=32,
        max_tokens=16,
        width=32,
        num_heads=2,
        pretrained=False,
    )
    return make_bundle(folder, config, captions, ("circle", "square", "triangle"))


def commit(plan: Plan, output: Folder, layout: Layout, labeled: pa.Table) -> None:
    """Commit what the killed job committed."""
    os.fsync = lambda file: None  # no power cut is expected here
    committer, records = Committer(output, plan.fingerprint), Records(output)
    num_lost = len(plan.files) // 100
    files, done = {file.path: file for file in plan.files}, 0
    for path in (*layout.joined, *layout.unjoined, *layout.partial, *layout.small[:-NUM_MISSING]):
        file = files[path]
        rows, record = named(labeled[: file.num_rows], path), None
        shards = shards_of(file, file.units)
        for shard in shards[:-1] if path in layout.partial else shards:
            record = committer.commit(shard, rows[shard.first : shard.end], file)
        if path in layout.joined:
            record = committer.join(file)
        if record and len(records.found) < len(plan.files) - num_lost:
            records.add(record)
            done += 1
            if done % max(1, num_lost) == 0:
                records.publish()


def run_job(state: Path, output: Path) -> Usage:
    """Run `jobs/label.py` to its end."""
    command = [sys.executable, str(JOBS / "label.py"), "--no-gpu"]
    for option, folder in {"input": state / "input", "model": state / "bundle", "output": output}.items():
        command += [f"--{option}", str(folder)]
    return run_command(command)


def copy_output(state: Path, output: Path) -> None:
    """Give a job an output of its own: names of the same files, which are never written in place.

    And the lease of a process that is gone, on this machine and since it started.
    """
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(state / "output", output, copy_function=os.link)
    gone = subprocess.Popen(["true"])
    gone.wait()
    Folder(str(output)).publish_json(
        LEASE, {"owner": "gone", **this_process(), "pid": gone.pid, "renewed": 0}
    )


def problems(state: Path, output: Path, layout: Layout) -> Iterator[str]:
    """Check what a job made of its output; see above for what this proves."""
    plan = Plan.load(Folder(str(output)))
    manifest = json.loads((output / MANIFEST).read_text())
    listed = {file["path"]: file for file in manifest["files"]}
    if (
        plan is None
        or listed.keys() != {file.path for file in plan.files}
        or len(listed) != len(manifest["files"])
    ):
        yield "the manifest lists other files than the plan"
        return
    if left := [path for path in Folder(str(output)).list() if path.startswith((PIECES, RECORDS))]:
        yield f"left behind: {left[:3]}"
    for file in plan.files:
        data = (output / file.path).read_bytes()
        if (hashlib.sha256(data).hexdigest(), len(data)) != (
            listed[file.path]["sha256"],
            listed[file.path]["size_bytes"],
        ):
            yield f"{file.path}: not as the manifest says"
        if file.path in layout.missing:
            yield from check_file(
                Folder(str(state / "input")),
                Folder(str(output)),
                file,
                listed[file.path],
                Expected.of(plan.settings),
            )
        elif not (output / file.path).samefile(state / "output" / file.path):
            yield f"{file.path}: committed again"


@click.command()
@click.option(
    "--shards", "num_shards", default=100_000, show_default=True, help="In the plan; 1,000 at least."
)
@click.option("--state", "folder", default="build/resume", show_default=True, help="Keeps what is laid down.")
@click.option("--verify", is_flag=True, help="Prove the result by jobs/verify.py.")
def main(num_shards: int, folder: str, verify: bool) -> None:
    """Measure how a labeling job resumes of which all but ten shards are committed."""
    state = Path(folder).absolute() / str(num_shards)
    output = state.with_name(f"{num_shards}-resumed")
    lay_down(state, num_shards)
    copy_output(state, output)
    load = os.getloadavg()[0]
    usage = run_job(state, output)
    click.echo(f"{num_shards:,} shards, resumed in {usage.wall_s:.1f} s")
    click.echo(f"CPU time: {usage.cpu_s:.0f} s, where the load was {load:.1f} before")
    click.echo(f"driver: {usage.rss_bytes / 1e6:,.0f} MB of RSS at most")
    for name, num_bytes in usage.peaks.items():
        click.echo(f"{name}: {num_bytes / 1e6:,.0f} MB of PSS at most")
    found = list(problems(state, output, Layout.of(num_shards)))
    for problem in found[:20]:
        click.echo(problem)
    if verify:
        command = [sys.executable, JOBS / "verify.py", "--input", state / "input", "--output", output]
        subprocess.run(command, check=True)
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
