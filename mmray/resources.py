"""What a Ray cluster has, for those who share it out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import ray

from mmray.config import ComputeConfig, Workers
from mmray.errors import ClusterError, ConfigError
from mmray.joining import join_cluster

TASKS_PER_CPU = 4
ACTOR_CPUS = 8.0
"""That one model on CPUs makes good use of."""
LEAST_SHARE = 4.0
"""CPUs of a small node for whose sake larger ones are still divided."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Node(NamedTuple):
    """A machine of the cluster."""

    cpus: float
    gpus: int = 0


class Resources(NamedTuple):
    """What the nodes have that are alive."""

    nodes: dict[str, Node]
    """By the id that Ray gives them."""

    @classmethod
    def of_cluster(cls) -> Resources:
        """Ask the cluster; a process that is in none starts one, or joins the one that its environment names.

        Raises:
            ClusterError: there is a head alone so far.
        """
        join_cluster()
        alive = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        there = cls({key: Node(has.get("CPU", 0), int(has.get("GPU", 0))) for key, has in alive.items()})
        if not there.cpus:
            raise ClusterError(
                "the cluster has no CPU beside its head yet; try again when a worker node is up"
            )
        return there

    @property
    def cpus(self) -> float:
        """CPUs of all nodes."""
        return sum(node.cpus for node in self.nodes.values())

    @property
    def gpus(self) -> int:
        """GPUs of the nodes with CPUs; actors want both."""
        return sum(node.gpus for node in self.nodes.values() if node.cpus)

    def with_cpus(self) -> dict[str, str] | None:
        """Give the label selector that keeps work which asks for no CPU off nodes without; None if all have.

        Such nodes are heads, which drivers have to themselves; Ray would run such work there first of all.
        """
        without = ",".join(key for key, node in self.nodes.items() if not node.cpus)
        return {"ray.io/node-id": f"!in({without})"} if without else None

    def threads(self, node_id: str, num_workers: int) -> int:
        """Give the threads that each of the workers on a node may have."""
        return max(1, int(self.nodes[node_id].cpus / num_workers))

    def use_gpu(self, compute: ComputeConfig) -> bool:
        """Tell whether workers ask for GPUs: as they are told to, else where there are any.

        Raises:
            ConfigError: they are told to, and this machine has none.
            ClusterError: they are told to, and no node has one yet.
        """
        use_gpu = compute.use_gpu if compute.use_gpu is not None else self.gpus > 0
        if use_gpu and not self.gpus:
            if len(self.nodes) > 1:  # such as a head, whose spot machines come and go
                raise ClusterError(
                    "--use-gpu: no node of the cluster has a GPU yet; try again when one is up"
                )
            raise ConfigError("--use-gpu: the cluster has no GPU; use --no-gpu, or submit to one that has")
        return use_gpu

    def share(self, workers: Workers, *, use_gpu: bool = False) -> float:
        """Give the CPUs that each worker may have.

        On GPUs these are the CPUs that a node has for each of them. Else a fixed number of workers has the
        largest share of which the nodes hold so many. Of workers whose number may grow each has its part of
        the cluster if all were there, or `ACTOR_CPUS` if that is more; and never more than the smallest node.
        """
        nodes = [node for node in self.nodes.values() if node.cpus]
        if use_gpu:
            return min(node.cpus / node.gpus for node in nodes if node.gpus)
        if workers.minimum == workers.maximum:
            shares = {node.cpus / number for node in nodes for number in range(1, workers.maximum + 1)}
            return max(share for share in shares if self.places(share) >= workers.maximum)
        return min(max(self.cpus / workers.maximum, ACTOR_CPUS), min(node.cpus for node in nodes))

    def num_actors(self) -> int:
        """Give the actors that make use of all CPUs: one a node, and more on those that are larger."""
        sizes = [node.cpus for node in self.nodes.values() if node.cpus]
        share = max(min(sizes), min(LEAST_SHARE, max(sizes)))
        return self.places(share)

    def places(self, share: float) -> int:
        """Count the shares of so many CPUs that the nodes hold."""
        return sum(int(node.cpus / share + 1e-9) for node in self.nodes.values())


def spread(work: Callable[[Sequence[Item]], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Do some work on files, or what tells of them, in a few tasks; gives what each makes of its share."""
    join_cluster()
    num_tasks = min(len(items), TASKS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 0))))
    held = ray.put(work)  # with all that it refers to, once
    for task in [_do.remote(held, items[share::num_tasks]) for share in range(num_tasks)]:
        yield ray.get(task)


# Half a CPU, not less: each task at a time is a worker to be started, which takes two seconds of a CPU.
@ray.remote(num_cpus=0.5)
def _do(work: Callable[[Sequence[Item]], Result], items: Sequence[Item]) -> Result:
    return work(items)
