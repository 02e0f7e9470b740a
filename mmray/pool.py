"""The pools of a labeling job, sized for the cluster that is there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from ray.data import ActorPoolStrategy, TaskPoolStrategy

from mmray.config import ComputeConfig, LabelConfig, ScoringConfig, Workers
from mmray.errors import ConfigError
from mmray.resources import Resources

CPUS_A_GPU = 8
"""CPUs for each GPU, the scoring actors' own included, from which on a separate pool decodes."""

DECODER_CPUS = 0.001
"""CPUs that a decoding actor asks for: see `Pool.decoders`."""


class Pool(NamedTuple):
    """The actors that score: how many, and what each asks for."""

    minimum: int
    maximum: int
    num_cpus: float
    num_gpus: float
    """1, or a part of it for actors that share one."""
    num_threads: int
    num_tasks: int
    """That may read at a time, and that may commit."""
    num_decoders: int
    """Of the pool that decodes, where one does."""
    decode: str = "beside"
    """Where images are best decoded."""
    places: dict[str, str] | None = None
    """Labels of the nodes where work may run, as Ray selects them; None for all."""

    @classmethod
    def on_cluster(cls, compute: ComputeConfig, scoring: ScoringConfig | None = None) -> Pool:
        """Size the pool for the cluster that is there; what comes later brings CPUs for actors of its own.

        On GPUs a worker is one of these, with as many actors as are to share it: a single interpreter starts
        kernels and lays out rows too slowly to keep a large GPU busy.

        Raises:
            ConfigError: GPUs are asked for, and this machine has none.
            ClusterError: the cluster has no CPU yet, or not the GPUs that are asked for.
        """
        there, scoring = Resources.of_cluster(), scoring or ScoringConfig()
        use_gpu = there.use_gpu(compute)
        workers = Workers.parse(compute.num_workers or (there.gpus if use_gpu else there.num_actors()))
        actors = scoring.actors_per_gpu if use_gpu else 1
        minimum, maximum = actors * workers.minimum, actors * workers.maximum
        share = there.share(workers, use_gpu=use_gpu) / actors
        # Reading and committing want a CPU beside the actors. In a pool that grows each asks for more than
        # half of its share, so that actors come with new nodes, and not beside the first ones.
        part = 0.75 if workers.minimum < workers.maximum else 0.5
        num_cpus = 0.5 / actors if use_gpu else int(share) - 1 if share >= 3 else share * part
        return cls(
            minimum=minimum,
            maximum=maximum,
            num_cpus=num_cpus,
            num_gpus=use_gpu / actors,
            num_threads=max(1, int(share)),
            num_tasks=max(2 * maximum, int(there.cpus - minimum * num_cpus)),
            num_decoders=max(1, int(there.cpus) - minimum),
            decode="pool" if use_gpu and there.cpus >= CPUS_A_GPU * workers.minimum else "beside",
            places=there.with_cpus(),
        )

    def without_actors(self) -> Pool:
        """Leave the actors' CPUs to tasks, where there is no model."""
        return self._replace(num_tasks=self.num_tasks + int(self.minimum * self.num_cpus))

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
        return replace(
            config,
            precision=config.precision or ("bf16" if self.num_gpus else "fp32"),
            decode=config.decode or self.decode,
        )
