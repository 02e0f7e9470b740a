"""Jobs and their stores: exit statuses, one line for each failure, and workers on other nodes."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mmray.cli import job
from mmray.storage import Folder

REPOSITORY = Path(__file__).parents[2]


def run_job(uri, work=lambda folder: folder.list()):
    """Run a job that has one URI; give its exit status and the one line that it writes."""

    @job("work")
    @click.option("--input", "input_uri")
    @click.option("--model", "model_uri")
    def main(input_uri, model_uri):
        work(Folder(input_uri))

    result = CliRunner().invoke(main, ["--input", uri])
    assert len(result.stderr.splitlines()) <= 1 and "Traceback" not in result.output
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        assert os.environ[name].rpartition("/")[2] not in result.output
    return result.exit_code, result.stderr


def test_a_job_whose_store_answers_runs(bucket):
    assert run_job(f"{bucket}/rows") == (0, "")


def test_a_missing_bucket_is_wrong_use(proxy):
    status, line = run_job("s3://no-such-bucket-anywhere/rows")
    assert status == 2 and "no-such-bucket-anywhere" in line and "no such bucket" in line


def test_a_wrong_endpoint_is_wrong_use(impatient, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
        status, line = run_job("s3://bucket/rows")
    assert status == 2 and "AWS_ENDPOINT_URL" in line


def test_a_denied_key_is_wrong_use(bucket, proxy):
    with proxy.always("denied"):
        status, line = run_job(f"{bucket}/rows")
    assert status == 2 and "access denied" in line


def test_a_store_that_fails_in_the_middle_is_to_be_tried_again(bucket, proxy, impatient):
    def work(folder):
        with proxy.always("503"):
            folder.list()

    status, line = run_job(f"{bucket}/rows", work)
    assert status == 3 and "the same command resumes" in line


DRIVER = """
import json, logging, os, sys
from mmray.cli import cluster
from mmray.storage import Folder

with cluster():
    import ray

    @ray.remote
    def read(uri):
        context = ray.get_runtime_context()
        return context.get_node_id(), context.get_runtime_env_string(), Folder(uri).read("rows").decode()

    here = ray.get_runtime_context().get_node_id()
    there, runtime_env, rows = ray.get(read.remote(sys.argv[1]))
    print(json.dumps({"elsewhere": here != there, "runtime_env": runtime_env, "rows": rows}))
"""


@pytest.fixture
def two_nodes():
    """Start a head without CPUs and a node with some, which know of no store.

    Gives what a driver's environment needs to join them, and the folder of their logs.
    """
    bare = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    with socket.socket() as unused, tempfile.TemporaryDirectory(dir="/tmp", prefix="ray-") as folder:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        unused.close()
        (Path(folder) / "token").write_text("0123456789abcdef" * 4)
        joining = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": f"{folder}/token"}
        joining |= {"PYTHONPATH": str(REPOSITORY)}
        start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        head = ["--head", f"--port={address.rpartition(':')[2]}", "--num-cpus=0", f"--temp-dir={folder}"]
        head += ["--include-dashboard=false", "--node-ip-address=127.0.0.1"]
        nodes = []
        try:
            for arguments in (head, [f"--address={address}", "--num-cpus=2", "--node-ip-address=127.0.0.1"]):
                nodes.append(
                    subprocess.Popen([*start, *arguments], env=bare | joining, stdout=subprocess.DEVNULL)
                )
                await_port(address)
            yield joining | {"RAY_ADDRESS": address}, Path(folder)
        finally:
            for node in reversed(nodes):
                node.send_signal(signal.SIGTERM)
                node.wait()


def await_port(address):
    host, _, port = address.rpartition(":")
    for _ in range(600):
        with socket.socket() as client:
            if client.connect_ex((host, int(port))) == 0:
                return
        time.sleep(0.1)
    pytest.fail(f"nobody listens on {address}")


def test_workers_on_other_nodes_reach_the_store_and_no_log_holds_a_secret(bucket, two_nodes):
    joining, logs = two_nodes
    Folder(f"{bucket}/data").publish("rows", b"the rows")
    secrets = [os.environ[f"AWS_{name}"] for name in ("SECRET_ACCESS_KEY", "ACCESS_KEY_ID", "ENDPOINT_URL")]
    ran = subprocess.run(
        [sys.executable, "-c", DRIVER, f"{bucket}/data"],
        env=os.environ | joining,
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    seen = json.loads(ran.stdout.splitlines()[-1])
    assert seen["elsewhere"] and seen["rows"] == "the rows"
    written = {path: path.read_bytes() for path in logs.rglob("*") if path.is_file()}
    assert len(written) > 10
    for secret in secrets:
        assert secret not in ran.stdout + ran.stderr and secret not in seen["runtime_env"]
        assert not [path for path, content in written.items() if secret.encode() in content]
