"""What a Ray cluster has, for those who share it out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import ray

from mmray.config import ComputeConfig
from mmray.errors import ConfigError

TASKS_PER_CPU = 4

Result = TypeVar("Result")


class Resources(NamedTuple):
    """CPUs and GPUs of the nodes that are alive."""

    cpus: float
    gpus: int
    nodes: list[float]
    """CPUs of each node."""

    @classmethod
    def of_cluster(cls) -> Resources:
        """Ask the cluster."""
        total = ray.cluster_resources()
        nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
        return cls(total.get("CPU", 1), int(total.get("GPU", 0)), nodes)

    def use_gpu(self, compute: ComputeConfig) -> bool:
        """Tell whether workers ask for GPUs: as they are told to, else where there are any.

        Raises:
            ConfigError: they are told to, and there is none.
        """
        use_gpu = compute.use_gpu if compute.use_gpu is not None else self.gpus > 0
        if use_gpu and not self.gpus:
            raise ConfigError("--use-gpu: the cluster has no GPU; use --no-gpu, or submit to one that has")
        return use_gpu

    def share(self, num_workers: int) -> float:
        """Give the CPUs that each of some workers may have: none is larger than a node."""
        return min(self.cpus / num_workers, max(self.nodes))


def spread(work: Callable[[Sequence[str]], Result], paths: Sequence[str]) -> list[Result]:
    """Do some work on files in a few tasks, each with its share of them; gives what they return."""
    num_tasks = min(len(paths), TASKS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 0))))
    task = ray.remote(num_cpus=0.5)(work)
    return list(ray.get([task.remote(paths[share::num_tasks]) for share in range(num_tasks)]))
