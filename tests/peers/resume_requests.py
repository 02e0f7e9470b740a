"""Count the requests that a large labeling job sends to S3 when it resumes.

    python tests/peers/resume_requests.py [--shards N] [--state FOLDER]

Lays down what `tests/peers/resume.py` does, puts it into moto's S3 server, and runs `jobs/label.py` to its
end through a proxy that writes down what is asked. Requests for the lease are listed but are not in the sum:
they grow with time.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import click
from resume import JOBS, Layout, copy_output, lay_down

sys.path.insert(0, str(Path(__file__).parents[1] / "s3"))

from conftest import moto, proxied
from faulty_proxy import Request

BUCKET = "bucket"


def kind_of(request: Request) -> str:
    """Tell what a request asks for."""
    url = urlsplit(request.target)
    path, query = unquote(url.path).removeprefix(f"/{BUCKET}").strip("/"), parse_qs(url.query)
    method = "LIST" if "list-type" in query else request.method
    path = query.get("prefix", [path])[0] or "(bucket)"
    for folder in ("plan", "pieces", "records", "rejected"):
        if path.startswith(f"output/_mmray/{folder}/"):
            return f"{method} output/_mmray/{folder}/"
    if path.startswith("output/") and path.endswith(".parquet"):
        return f"{method} a labeled file"
    return f"{method} {path}" if path.startswith("output/") else f"{method} {path.partition('/')[0]}/"


def upload(state: Path, output: Path, endpoint: str) -> None:
    """Put the input, the bundle and the output into the store."""
    import fsspec

    store = fsspec.filesystem("s3", endpoint_url=endpoint)
    store.mkdir(BUCKET)
    for folder, name in ((state / "input", "input"), (state / "bundle", "bundle"), (output, "output")):
        store.put(f"{folder}/", f"{BUCKET}/{name}/", recursive=True)


@click.command()
@click.option("--shards", "num_shards", default=2_000, show_default=True, help="In the plan.")
@click.option("--state", "folder", default="build/resume", show_default=True, help="Keeps what is laid down.")
def main(num_shards: int, folder: str) -> None:
    """Count the requests of a labeling job that resumes of which all but ten shards are committed."""
    os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # moto's server tells every request
    state = Path(folder).absolute() / str(num_shards)
    output = state.with_name(f"{num_shards}-resumed")
    lay_down(state, num_shards)
    copy_output(state, output)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    with moto() as store, proxied(listener, store) as proxy:
        upload(state, output, f"http://{store}")
        command = [sys.executable, str(JOBS / "label.py"), "--no-gpu"]
        for option, name in {"input": "input", "model": "bundle", "output": "output"}.items():
            command += [f"--{option}", f"s3://{BUCKET}/{name}"]
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        started = time.monotonic()
        subprocess.run(command, check=True, env=os.environ | {"AWS_ENDPOINT_URL": endpoint})
        seconds = time.monotonic() - started
        counts = Counter(map(kind_of, proxy.requests))
    leases = sum(count for kind, count in counts.items() if kind.endswith("lease.json"))
    layout = Layout.of(num_shards)
    num_files = num_shards - 9 * (len(layout.joined) + len(layout.unjoined) + len(layout.partial))
    click.echo(
        f"{num_shards:,} shards, {num_files:,} files: {counts.total() - leases:,} requests in {seconds:.0f} s"
    )
    for kind, count in sorted(counts.items()):
        click.echo(f"{count:8,} {kind}")


if __name__ == "__main__":
    main()
