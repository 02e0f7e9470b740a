"""The pools of a labeling job, sized for the cluster that is there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from ray.data import ActorPoolStrategy, TaskPoolStrategy

from mmray.config import ComputeConfig, LabelConfig, Workers
from mmray.errors import ConfigError
from mmray.resources import Resources

ACTORS_A_GPU = 2
"""That share a GPU: one interpreter starts kernels and lays out rows too slowly to keep a large one busy."""

DECODERS_A_GPU = 8
"""CPUs that a GPU has, its actors' own included, from which on a pool decodes."""

DECODER_CPUS = 0.001
"""That an actor asks for which decodes: see `Pool.decoders`."""


class Pool(NamedTuple):
    """The actors that score: how many, and what each asks for."""

    minimum: int
    maximum: int
    num_cpus: float
    num_gpus: float
    """1, or less for actors that share one."""
    num_threads: int
    num_tasks: int
    """That may read at a time, and that may commit."""
    num_decoders: int
    """Of the pool that decodes, where one does."""
    places: dict[str, str] | None = None
    """Labels of the nodes where work may run, as Ray selects them; None for all."""

    @classmethod
    def on_cluster(cls, compute: ComputeConfig) -> Pool:
        """Size the pool for the cluster that is there; what comes later brings CPUs for actors of its own.

        Of more actors than there are GPUs, as many share each of them, and its CPUs.

        Raises:
            ConfigError: GPUs are asked for, and the cluster has none.
        """
        there = Resources.of_cluster()
        use_gpu = there.use_gpu(compute)
        default = ACTORS_A_GPU * there.gpus if use_gpu else there.num_actors()
        workers = Workers.parse(compute.num_workers or default)
        sharing = -(-workers.minimum // there.gpus) if use_gpu else 1
        share = there.share(workers, use_gpu=use_gpu) / sharing
        # Reading and committing want a CPU beside the actors. In a pool that grows each asks for more than
        # half of its share, so that actors come with new nodes, and not beside the first ones.
        part = 0.75 if workers.minimum < workers.maximum else 0.5
        num_cpus = 0.5 / sharing if use_gpu else int(share) - 1 if share >= 3 else share * part
        return cls(
            minimum=workers.minimum,
            maximum=workers.maximum,
            num_cpus=num_cpus,
            num_gpus=use_gpu / sharing,
            num_threads=max(1, int(share)),
            num_tasks=max(2 * workers.maximum, int(there.cpus - workers.minimum * num_cpus)),
            num_decoders=max(1, int(there.cpus) - workers.minimum),
            places=there.with_cpus(),
        )

    @property
    def device(self) -> str:
        """Where an actor computes. Not on any GPU that it sees: Ray may have given that one to another."""
        return "cuda" if self.num_gpus else "cpu"

    def tasks(self) -> dict[str, Any]:
        """Give the settings of tasks beside the actors: so many, and no CPU asked for.

        After a node has died the actors may hold every CPU that is left. Tasks that asked for one would then
        wait for the actors, and the actors for them.
        """
        return {"compute": TaskPoolStrategy(self.num_tasks), "num_cpus": 0}

    def decoders(self, num_shards: int) -> dict[str, Any]:
        """Give the settings of the pool that decodes so many shards: an actor for each CPU that is there.

        Each asks for next to nothing, so that a scoring actor always finds its place beside them, also when
        they come first, or start again on the nodes that are left; and for more than nothing, so that none
        comes to a head without CPUs.
        """
        growth = self.maximum / self.minimum
        low, high = (min(num_shards, int(self.num_decoders * times)) for times in (1, growth))
        return {
            "compute": ActorPoolStrategy(min_size=max(1, low), max_size=max(1, high)),
            "num_cpus": DECODER_CPUS,
        }

    def settle(self, config: LabelConfig) -> LabelConfig:
        """Fill in what the cluster does best, unless it is asked for: precision, and the place to decode.

        Raises:
            ConfigError: a GPU is to decode, and the actors have none.
        """
        if config.decode == "gpu" and not self.num_gpus:
            raise ConfigError("--decode gpu: the models have no GPU here; beside and pool decode on CPUs")
        cpus, gpus = self.num_decoders + self.minimum, self.num_gpus * self.minimum
        many = self.num_gpus and cpus >= DECODERS_A_GPU * gpus
        return replace(
            config,
            precision=config.precision or ("bf16" if self.num_gpus else "fp32"),
            decode=config.decode or ("pool" if many else "beside"),
        )
