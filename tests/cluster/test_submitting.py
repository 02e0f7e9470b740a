"""Jobs that are submitted to a real cluster: a head that computes nothing, and a worker node."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from contextlib import suppress
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest
import yaml
from killing import DEADLINE_S, RAY, SCORING, Node, free_port, marked, poll

from mmray.bundle import Bundle
from mmray.faults import FAULT, FOLDER
from mmray.schema import Status
from mmray.verify import verify_dataset

REPOSITORY = Path(__file__).parents[2]
RUNTIME_ENV = REPOSITORY / "jobs" / "runtime-env.yaml"
MAX_UPLOAD_BYTES = 2 << 20
NUM_FILES = 8
MANY_EPOCHS = 10_000
OUTAGE_S = float(os.environ.get("MMRAY_OUTAGE_S") or 0)
"""How long a job is left without any worker node; README.md tells of ten minutes, too long for every run."""

pytestmark = pytest.mark.usefixtures("cluster")  # of this process, for `verify_dataset`


class Cluster:
    """A head and a worker node, each `ray start`, and what speaks to its job server."""

    def __init__(self, folder):
        """Start the head, which alone has the keys of a store in its environment, and the store."""
        port, store = free_port(), free_port()
        self.folder, self.server = folder, f"http://127.0.0.1:{port}"
        self.token = uuid.uuid4().hex
        path = (
            f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # a job's `python` is this one
        )
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        self.environment |= {"PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        self.keys = {"AWS_ACCESS_KEY_ID": uuid.uuid4().hex, "AWS_SECRET_ACCESS_KEY": uuid.uuid4().hex}
        self.keys |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{store}", "AWS_REGION": "us-east-1"}
        self.nodes = [Node(folder, num_cpus=0, dashboard_port=port, environment=self.environment | self.keys)]
        with open(folder / "store.log", "w") as log:
            command = [sys.executable, "-m", "moto.server", "--port", str(store)]
            self.store = subprocess.Popen(command, stdout=log, stderr=log)

    def start(self):
        """Wait until both are up."""
        self.nodes[0].wait_until_up()
        self.add_node()
        # Jobs are started by an agent, which comes up some seconds after its node.
        poll(lambda: self.job("submit", "--", "true").returncode == 0, lambda: "the job server")

    def add_node(self):
        """Start a worker node, and give it."""
        self.nodes.append(Node(self.folder, self.nodes[0], environment=self.environment))
        return self.nodes[-1].wait_until_up()

    def job(self, verb, *words):
        """Run a command of Ray's job client; give its process when it has ended."""
        command = [*RAY, "job", verb, "--address", self.server, *words]
        settings = {"cwd": REPOSITORY, "env": self.environment, "timeout": DEADLINE_S}
        return subprocess.run(command, capture_output=True, text=True, **settings)

    def submit(self, *entrypoint, runtime_env=RUNTIME_ENV, name, wait=True):
        """Submit a job with the options that the README gives."""
        readme = (REPOSITORY / "README.md").read_text()
        (options,) = re.findall(
            r"^    ray job submit --address \S+ (.+?)\s+(?:\\\s+)?-- python jobs/", readme, re.M
        )
        words = [*options.split(), "--runtime-env", str(runtime_env), "--submission-id", name]
        return self.job("submit", *words, *([] if wait else ["--no-wait"]), "--", *map(str, entrypoint))

    def restore(self):
        """Leave one worker node and no job, wherever the last test ended."""
        for job in self.ask("jobs/"):
            if job["status"] in ("PENDING", "RUNNING"):
                self.job("stop", job["submission_id"])
        head, *workers = self.nodes
        first, *others = [node for node in workers if node.process.poll() is None] or [self.add_node()]
        for node in others:
            node.kill()
        self.nodes = [head, first]
        poll(lambda: self.num_alive() == 2, self.num_alive)

    def ask(self, path):
        """Ask the head over HTTP."""
        headers = {"Authorization": f"Bearer {self.token}"}
        request = urllib.request.Request(f"{self.server}/api/{path}", headers=headers)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def num_alive(self):
        """Count the nodes that the head believes to be alive."""
        nodes = self.ask("v0/nodes")["data"]["result"]["result"]
        return sum(node["state"] == "ALIVE" for node in nodes)

    def info(self, name):
        """Ask the job server about a job."""
        return self.ask(f"jobs/{name}")

    def logs(self, name):
        """Give what a job has said so far."""
        return self.ask(f"jobs/{name}/logs")["logs"]

    def shards_logged(self):
        """Give the lines that workers wrote about the shards that they scored."""
        logs = self.folder.glob("*/session_2*/logs/worker-*.err")
        lines = [line for log in logs for line in log.read_text().splitlines()]
        return [json.loads(line) for line in lines if line.startswith('{"shard"')]

    def driver(self, script):
        """Find the driver that runs a script on the head: its process id, or None."""
        for process, title in marked(self.nodes[0].mark, Node.NAME).items():
            if re.match(rf"\S*python\S* jobs/{script}", title):
                return process
        return None


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # sockets have short names
        cluster = Cluster(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.store.kill()
            for node in cluster.nodes:
                node.kill()


@pytest.fixture
def two_nodes(started):
    """Give the cluster: the head, and one worker node."""
    started.restore()
    return started


@pytest.fixture
def label(archive, bundle_uri, tmp_path):
    """Give the command that labels the archive."""
    options = ("--input", archive.folder, "--model", bundle_uri, "--output", tmp_path / "labeled")
    return ("python", "jobs/label.py", *options, "--max-failed-fraction", "0.05")


@pytest.fixture
def paused(tmp_path):
    """Give `paused(moment, action="pause") -> a runtime environment`: the job waits for a file `go`."""

    def write(moment, action="pause"):
        recipe = yaml.safe_load(RUNTIME_ENV.read_text())
        recipe["env_vars"] |= {FAULT: f"{action} {moment}", FOLDER: str(tmp_path)}
        (tmp_path / "runtime-env.yaml").write_text(yaml.safe_dump(recipe))
        return tmp_path / "runtime-env.yaml"

    return write


def test_labeling_ends_with_its_result_and_what_it_said(two_nodes, archive, label, tmp_path):
    ended = two_nodes.submit(*label, name="label")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "succeeded" in ended.stdout
    assert f"{archive.num_rows:,} rows" in ended.stdout
    assert verify_dataset(str(archive.folder), str(tmp_path / "labeled")).problems == []
    assert two_nodes.info("label")["driver_exit_code"] == 0
    package, *_ = two_nodes.folder.glob("*/session_2*/runtime_resources/working_dir_files/_ray_pkg_*/")
    files = [path.relative_to(package) for path in package.rglob("*") if path.is_file()]
    assert {"jobs/label.py", "mmray/labeling.py", "jobs/runtime-env.yaml"} <= set(map(str, files))
    assert {path.parts[0] for path in files} == {"jobs", "mmray", "pyproject.toml"}, "the code alone"
    assert sum((package / path).stat().st_size for path in files) < MAX_UPLOAD_BYTES


@pytest.mark.parametrize("moment", ["before read *", "before publish _mmray/pieces/*"])
def test_a_head_without_cpus_neither_reads_nor_commits(two_nodes, label, paused, tmp_path, moment):
    """Tasks that do so ask for no CPU: Ray would have them there first of all."""
    name = moment.split()[1]
    started = two_nodes.submit(*label, runtime_env=paused(moment, "hold"), name=name, wait=False)
    assert started.returncode == 0, started.stdout + started.stderr
    reached = [tmp_path / f"reached-{number}" for number in range(2)]
    poll(lambda: all(path.exists() for path in reached), lambda: two_nodes.info(name))
    head, worker = (node.processes().keys() for node in two_nodes.nodes)
    held = {int(path.read_text()) for path in reached}
    assert held <= worker and not held & head
    (tmp_path / "go").touch()
    poll(lambda: two_nodes.info(name)["status"] != "RUNNING", lambda: "the job's end")
    assert two_nodes.info(name)["driver_exit_code"] == 0, two_nodes.logs(name)


@pytest.fixture
def train(draw_rows, tmp_path):
    """Give the command that trains a small model on drawn rows."""
    for name, num_rows in {"train": 96, "val": 32}.items():
        (tmp_path / name).mkdir()
        pq.write_table(draw_rows(num_rows), tmp_path / name / "a.parquet", row_group_size=16)
    options = ("--data", tmp_path / "train", "--val", tmp_path / "val", "--output", tmp_path / "bundle")
    towers = ("--vision", "test_efficientnet", "--image-size", "32", "--width", "32", "--no-pretrained")
    return ("python", "jobs/train.py", *options, *towers)


def test_keys_that_the_head_has_reach_the_workers_and_no_log(two_nodes, archive, bundle_uri):
    keys = two_nodes.keys
    store = fsspec.filesystem(
        "s3",
        key=keys["AWS_ACCESS_KEY_ID"],
        secret=keys["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=keys["AWS_ENDPOINT_URL"],
        use_listings_cache=False,
    )
    store.mkdir("bucket")
    places = ("--input", archive.folder, "--model", bundle_uri, "--output", "s3://bucket/labeled")
    command = ("python", "jobs/label.py", *places, "--max-failed-fraction", "0.05")
    ended = two_nodes.submit(*command, name="store")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert store.exists("bucket/labeled/_SUCCESS")
    logs = [path for path in two_nodes.folder.rglob("*") if path.is_file()]
    told = [path for path in logs if keys["AWS_SECRET_ACCESS_KEY"].encode() in path.read_bytes()]
    assert told == []


def test_training_leaves_a_bundle(two_nodes, train, tmp_path):
    ended = two_nodes.submit(*train, "--epochs", "1", name="train")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "epoch 1: loss" in ended.stdout
    assert Bundle.load(str(tmp_path / "bundle")).vocabulary


def test_wrong_use_fails_the_job_with_its_status(two_nodes, label):
    ended = two_nodes.submit(*label, "--input", "/no/such/folder", name="wrong")
    assert ended.returncode == 1  # Ray's client tells that a job failed, the job server with what
    assert "mmray: /no/such/folder" in ended.stdout
    assert "Traceback" not in ended.stdout
    assert two_nodes.info("wrong")["driver_exit_code"] == 2


def test_a_pool_grows_onto_a_node_that_comes_and_the_job_outlives_all_nodes(
    two_nodes, draw_rows, label, paused, tmp_path
):
    """A second node comes and is used; both die; after MMRAY_OUTAGE_S another one takes their place."""
    rows = tmp_path / "rows"
    rows.mkdir()
    for number in range(NUM_FILES):  # more than one actor is ever given at a time, or the pool would not grow
        pq.write_table(draw_rows(1000, number), rows / f"{number:02}.parquet")
    command = (*label, "--input", rows, "--num-workers", "1:2")
    started = two_nodes.submit(
        *command, runtime_env=paused("before score *", "hold"), name="grows", wait=False
    )
    assert started.returncode == 0, started.stdout + started.stderr
    poll((tmp_path / "reached-0").exists, lambda: two_nodes.info("grows"))
    come = two_nodes.add_node()
    poll(lambda: any(SCORING in title for title in come.processes().values()), come.processes)
    for node in two_nodes.nodes[1:]:
        assert node.kill()
    (tmp_path / "go").touch()
    time.sleep(OUTAGE_S)
    assert two_nodes.info("grows")["status"] == "RUNNING", two_nodes.logs("grows")
    two_nodes.add_node()
    poll(lambda: two_nodes.info("grows")["status"] != "RUNNING", lambda: two_nodes.info("grows"))
    assert two_nodes.info("grows")["driver_exit_code"] == 0, two_nodes.logs("grows")
    assert verify_dataset(str(rows), str(tmp_path / "labeled")).problems == []


def test_a_job_that_is_stopped_lets_go_and_its_successor_resumes(two_nodes, archive, label, paused, tmp_path):
    """`ray job stop` while rows are scored: promises are kept, and nothing goes on in the background."""
    started = two_nodes.submit(
        *label, runtime_env=paused("before publish big.parquet"), name="stopped", wait=False
    )
    assert started.returncode == 0, started.stdout + started.stderr
    poll((tmp_path / "reached-0").exists, lambda: two_nodes.info("stopped"))
    driver = two_nodes.driver("label.py")
    assert "libtorch" not in Path(f"/proc/{driver}/maps").read_text(), "the head has no use for models"
    poll(lambda: "ray_mmray_rows" in two_nodes.nodes[-1].metrics(), lambda: two_nodes.nodes[-1].metrics())
    workers = [Path(f"/proc/{process}/environ") for process in two_nodes.nodes[-1].processes()]
    assert any(b"MALLOC_ARENA_MAX=1" in environment.read_bytes() for environment in workers)
    lines = two_nodes.shards_logged()
    assert lines
    for line in lines:  # which statuses it counts depends on which shard came first
        assert {"shard", "rows", "seconds", "model_s", "waited_s"} <= line.keys()
        assert line["rows"] == sum(line.get(status, 0) for status in Status)
    stopped = two_nodes.job("stop", "stopped")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert two_nodes.info("stopped")["status"] == "STOPPED"
    assert "told to end" in two_nodes.logs("stopped"), "killed before it could let go"
    poll(lambda: not two_nodes.driver("label.py"), lambda: "the driver's end")
    poll(lambda: not marked(str(tmp_path), FOLDER), lambda: marked(str(tmp_path), FOLDER))
    ended = two_nodes.submit(*label, name="resumed")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert re.search(r"[1-9]\d* of \d+ shards were there", ended.stdout)
    assert verify_dataset(str(archive.folder), str(tmp_path / "labeled")).problems == []


def test_training_goes_on_with_the_workers_that_there_are(two_nodes, train, tmp_path):
    """A node dies with its worker, another one comes: each epoch is learned once, by whoever is there.

    The last test: Ray keeps the CPUs of a group that may grow for some minutes after its job was stopped.
    """
    second = two_nodes.add_node()
    endless = ("--num-workers", "1:2", "--epochs", MANY_EPOCHS, "--patience", MANY_EPOCHS)
    started = two_nodes.submit(*train, *endless, name="elastic", wait=False)
    assert started.returncode == 0, started.stdout + started.stderr

    def history():
        """Give each epoch that was learned, and the number of its workers, as far as Ray Train knows them."""
        assert two_nodes.info("elastic")["status"] in ("PENDING", "RUNNING"), two_nodes.logs("elastic")
        run, found = tmp_path / "bundle" / "_train" / "run", [[]]
        with suppress(OSError, ValueError):  # it is being written, or removed
            known = json.loads((run / "checkpoint_manager_snapshot.json").read_text())["checkpoint_results"]
            for checkpoint in known:
                progress = run / checkpoint["checkpoint_dir_name"] / "progress.json"
                found.append(json.loads(progress.read_text())["history"])
        return [(epoch["epoch"], epoch["workers"]) for epoch in max(found, key=len)]

    def wait_for(num_workers):
        poll(lambda: [workers for _, workers in history()][-1:] == [num_workers], history, 2 * DEADLINE_S)

    wait_for(2)
    assert second.kill()
    wait_for(1)
    two_nodes.add_node()
    wait_for(2)
    learned = history()
    assert [epoch for epoch, _ in learned] == list(range(1, len(learned) + 1))
    mapped = Path(f"/proc/{two_nodes.driver('train.py')}/maps").read_text()
    assert "torchvision" not in mapped, (
        "the head has no use for models; Ray's TorchTrainer alone brings torch"
    )
    assert two_nodes.job("stop", "elastic").returncode == 0
    poll(lambda: not two_nodes.driver("train.py"), lambda: "the driver's end")
    assert two_nodes.logs("elastic").splitlines()[-1] == "mmray: interrupted; the same command resumes"
