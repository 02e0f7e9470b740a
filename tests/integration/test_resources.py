"""How work is shared out over clusters of all kinds, and over what comes later."""

import os
import subprocess
import sys

import pytest
import torch

from mmray.config import ComputeConfig, LabelConfig, ScoringConfig
from mmray.errors import ClusterError, ConfigError
from mmray.fitting import TrainWorkers
from mmray.pool import Pool
from mmray.resources import Node, Resources
from mmray.scoring import room_for

SMALLEST = Resources({"one": Node(1)})
LAPTOP = Resources({"one": Node(2)})
ONE_LARGE = Resources({"one": Node(64)})
MIXED = Resources({"head": Node(0), "large": Node(16), "small": Node(4), "other": Node(4)})
UNEQUAL = Resources({"small": Node(4), **{f"large-{number}": Node(16) for number in range(3)}})
GPU_NODE = Resources({"head": Node(0), "gpus": Node(32, 4)})
MANY = Resources({"head": Node(0), **{f"node-{number}": Node(8) for number in range(4)}})


@pytest.mark.parametrize(
    ("there", "num_workers", "asked_for", "num_threads"),
    [
        (LAPTOP, None, 1, 2),
        (LAPTOP, "2", 0.5, 1),
        (LAPTOP, "1:8", 1.5, 2),  # no second one fits beside it: what comes later brings its own CPUs
        (ONE_LARGE, "1:8", 7, 8),
        (MIXED, "1:8", 3, 4),  # the smallest node takes one
        (MIXED, None, 3, 4),  # one on each small node, four on the large one
        (MIXED, "3", 4, 5),
        (UNEQUAL, "4", 7, 8),  # a quarter of all CPUs each, and three would find no place for a fourth
        (GPU_NODE, "1:16", 0.25, 4),  # of a node's CPUs 8 for each of its GPUs, which two actors share
        (GPU_NODE, "8", 0.25, 4),  # four of them wait for GPUs to come
        (GPU_NODE, None, 0.25, 4),
        (MANY, None, 7, 8),
        (MANY, "1:100", 7, 8),
        (MANY, "8", 3, 4),
    ],
)
def test_an_actor_has_its_share_of_a_node(monkeypatch, there, num_workers, asked_for, num_threads):
    monkeypatch.setattr(Resources, "of_cluster", lambda: there)
    pool = Pool.on_cluster(ComputeConfig(num_workers=num_workers))
    assert (pool.num_cpus, pool.num_threads) == pytest.approx((asked_for, num_threads))
    assert pool.num_gpus == (0.5 if there is GPU_NODE else 0)
    assert pool.places == ({"ray.io/node-id": "!in(head)"} if "head" in there.nodes else None)


ELSEWHERE = Resources({"gpu": Node(4, 1), "one": Node(16), "other": Node(16)})
POOR = Resources({"gpu": Node(2, 2)})


@pytest.mark.parametrize(
    ("there", "num_workers", "wanted", "place", "num_decoders"),
    [
        (LAPTOP, None, None, "beside", (1, 1)),
        (LAPTOP, None, "pool", "pool", (1, 1)),
        (ONE_LARGE, None, "pool", "pool", (63, 63)),
        (MANY, None, "pool", "pool", (28, 28)),
        (GPU_NODE, None, None, "pool", (24, 24)),
        (GPU_NODE, "1:4", None, "pool", (30, 99)),  # no more than shards
        (GPU_NODE, "4", "beside", "beside", (24, 24)),
        (GPU_NODE, None, "gpu", "gpu", (24, 24)),
        (ELSEWHERE, None, None, "pool", (34, 34)),
        (Resources({"gpu": Node(8, 1)}), None, None, "pool", (6, 6)),
        (Resources({"gpu": Node(7, 1)}), None, None, "beside", (5, 5)),
        (Resources({"head": Node(0, 4), "gpu": Node(8, 1)}), None, None, "pool", (6, 6)),
        (Resources({"gpu": Node(8, 1)}), "8", None, "beside", (1, 1)),
        (POOR, None, "pool", "pool", (1, 1)),
    ],
)
def test_a_gpu_with_many_cpus_gets_a_pool_that_decodes_and_leaves_room_for_all_else(
    monkeypatch, there, num_workers, wanted, place, num_decoders
):
    monkeypatch.setattr(Resources, "of_cluster", lambda: there)
    pool = Pool.on_cluster(ComputeConfig(num_workers=num_workers))
    assert pool.settle(LabelConfig(decode=wanted)).decode == place
    settings = pool.decoders(99)
    strategy, of_a_decoder = settings["compute"], settings["num_cpus"]
    assert (strategy.min_size, strategy.max_size) == num_decoders
    of_a_join = 0.5
    there_now = min(pool.minimum, there.gpus / pool.num_gpus if pool.num_gpus else pool.minimum)
    together = there_now * pool.num_cpus + strategy.min_size * of_a_decoder + of_a_join
    assert together <= there.cpus, "the scoring actors would never find a place"
    assert of_a_decoder > 0, "or the head would decode"


@pytest.mark.parametrize(("num_workers", "gpus"), [(None, (4, 4)), ("2", (2, 2)), ("1:8", (1, 8))])
@pytest.mark.parametrize("actors", [1, 2, 3])
def test_actors_share_each_gpu(monkeypatch, num_workers, gpus, actors):
    monkeypatch.setattr(Resources, "of_cluster", lambda: GPU_NODE)
    pool = Pool.on_cluster(ComputeConfig(num_workers=num_workers), ScoringConfig(actors_per_gpu=actors))
    assert (pool.minimum, pool.maximum) == (gpus[0] * actors, gpus[1] * actors)
    assert actors * pool.num_gpus == pytest.approx(1)


def test_gpus_of_a_head_without_cpus_are_out_of_reach(monkeypatch):
    monkeypatch.setattr(Resources, "of_cluster", lambda: Resources({"head": Node(0, 4), "one": Node(8)}))
    with pytest.raises(ClusterError, match="GPU yet"):  # a scheduler tries again, until a node is up
        Pool.on_cluster(ComputeConfig(use_gpu=True))
    assert not Pool.on_cluster(ComputeConfig()).num_gpus
    monkeypatch.setattr(Resources, "of_cluster", lambda: LAPTOP)
    with pytest.raises(ConfigError, match="no GPU; use --no-gpu"):
        TrainWorkers.on_cluster(ComputeConfig(use_gpu=True))


@pytest.mark.parametrize("there", [LAPTOP, ONE_LARGE, GPU_NODE, MANY])
def test_without_actors_tasks_have_all_cpus(monkeypatch, there):
    monkeypatch.setattr(Resources, "of_cluster", lambda: there)
    assert Pool.on_cluster(ComputeConfig(use_gpu=False)).without_actors().num_tasks >= there.cpus


def test_without_gpus_none_decodes(monkeypatch):
    monkeypatch.setattr(Resources, "of_cluster", lambda: LAPTOP)
    pool = Pool.on_cluster(ComputeConfig())
    with pytest.raises(ConfigError, match="--decode gpu: the models have no GPU here"):
        pool.settle(LabelConfig(decode="gpu"))


@pytest.mark.parametrize(
    ("there", "num_workers", "asked_for", "of_a_task", "groups"),
    [
        (LAPTOP, None, 1, 1, 1),
        (SMALLEST, None, 0.5, 0.5, 1),
        (LAPTOP, "2", 0.5, 1, 1),  # a CPU is left for decoding
        (LAPTOP, "1:2", 1.2, 0.4, 1),  # no second one fits beside it, and decoding does
        (ONE_LARGE, "1:8", 38.4, 1, 1),
        (ONE_LARGE, "4", 1, 1, 15),
        (MIXED, "1:3", 2.4, 0.8, 2),  # the smallest node takes one
        (MIXED, "4:6", 1, 1, 3),  # more than there are nodes cannot be one a node
        (MANY, "1:4", 4.8, 1, 1),
        (GPU_NODE, None, 1, 1, 1),
        (GPU_NODE, "1", 1, 1, 4),
        (GPU_NODE, "1:4", 1, 1, 1),  # a GPU each: these are what keeps them apart
    ],
)
def test_workers_leave_decoding_its_share(monkeypatch, there, num_workers, asked_for, of_a_task, groups):
    monkeypatch.setattr(Resources, "of_cluster", lambda: there)
    workers = TrainWorkers.on_cluster(ComputeConfig(num_workers=num_workers))
    assert (workers.num_cpus, workers.task_cpus) == pytest.approx((asked_for, of_a_task))
    assert (workers.use_gpu, workers.groups) == (there is GPU_NODE, groups)


def test_workers_of_a_node_share_its_threads():
    assert GPU_NODE.threads("gpus", 3) == 10
    assert LAPTOP.threads("one", 5) == 1


def test_a_head_alone_is_a_cluster_that_is_not_there_yet(cluster, monkeypatch):
    head = {"NodeID": "head", "Alive": True, "Resources": {"memory": 1.0}}
    monkeypatch.setattr("mmray.resources.ray.nodes", lambda: [head])
    with pytest.raises(ClusterError, match="worker node is up") as raised:
        Resources.of_cluster()
    assert raised.value.exit_status == 3  # a scheduler tries again


def test_a_process_without_a_cluster_labels_on_one_of_its_own(archive, bundle_uri, tmp_path):
    """As a notebook or a service calls it."""
    code = (
        "import mmray; from mmray.config import LabelConfig; config = LabelConfig(max_failed_fraction=0.05); "
        f"places = {str(archive.folder)!r}, {bundle_uri!r}, 'labeled'; "
        "print(mmray.label_dataset(*places, config=config).summary()); "
        "import os; print('usage statistics:', os.environ['RAY_USAGE_STATS_ENABLED'])"
    )
    unset = {"RAY_ADDRESS", "RAY_USAGE_STATS_ENABLED"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert f"{archive.num_rows:,} rows labeled" in done.stdout
    assert "usage statistics: 0" in done.stdout


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_a_gpu_without_room_for_another_actor_says_so(kind):
    with pytest.raises(ConfigError, match=r"^--actors-per-gpu 2: CUDA out of memory; try 1$"), room_for(2):
        raise kind("CUDA out of memory.\nSee the documentation")
    with pytest.raises(kind), room_for(1):
        raise kind("CUDA out of memory.")
