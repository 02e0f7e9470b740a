"""Ray Train around the workers of `mmray.worker`: how many there are, what they read, and until when."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import ray.data
import ray.train
from ray.data import DataContext
from ray.train.torch import TorchTrainer

from mmray.config import ComputeConfig, Workers
from mmray.datasets import ExactValidation, Rows, decode_rows, examples
from mmray.images import Augmentation
from mmray.learner import PROGRESS
from mmray.resources import Resources
from mmray.start import RUN
from mmray.storage import Folder
from mmray.worker import TrainJob, train_worker

GROWTH_CHECK_S = 30
"""Between two looks for workers of a group that may grow. Growing costs the epoch that is under way."""

MANY_FAILURES = 20
"""Failures of workers that an elastic group tolerates; one of a fixed size tolerates two."""


@dataclass(frozen=True)
class TrainWorkers:
    """The workers that train: how many, and what each asks for."""

    scaling: Workers
    use_gpu: bool
    num_cpus: float
    task_cpus: float
    """Of each task that reads and decodes for them."""
    groups: int
    """Such groups that the cluster holds at once, with room for a task beside them."""

    @classmethod
    def on_cluster(cls, compute: ComputeConfig) -> TrainWorkers:
        """Size the group for the cluster that is there.

        Raises:
            ConfigError: GPUs are asked for, and this machine has none.
            ClusterError: the cluster has no CPU yet, or not the GPUs that are asked for.
        """
        there = Resources.of_cluster()
        use_gpu = there.use_gpu(compute)
        scaling = Workers.parse(compute.num_workers or (there.gpus if use_gpu else 1))
        # Decoding needs CPUs beside the workers, or both would wait for one another. Workers of a group that
        # grows ask for more than half of a node, so that they come with new nodes, not beside the first ones.
        sizes = [node.cpus for node in there.nodes.values() if node.cpus]
        if scaling.minimum < scaling.maximum and scaling.minimum <= len(sizes) and not use_gpu:
            num_cpus, task_cpus = 0.6 * min(sizes), min(1.0, 0.2 * min(sizes))
        else:
            task_cpus = min(1.0, there.cpus / 2)
            num_cpus = min(1.0, (there.cpus - task_cpus) / scaling.maximum)
        room = min(there.places(num_cpus), int((there.cpus - task_cpus) / num_cpus + 1e-9))
        if use_gpu:
            room = min(room, there.gpus)
        return cls(scaling, use_gpu, num_cpus, task_cpus, groups=max(1, room // scaling.maximum))


def fit(
    job: TrainJob, parts: list[Rows], val: Rows, output: Folder, workers: TrainWorkers
) -> tuple[ray.train.Checkpoint, ray.train.Checkpoint]:
    """Run Ray Train until the recipe is done; gives the best epoch's checkpoint, and the last one's."""
    filesystem, path = (output / RUN).arrow()
    low, high = workers.scaling.minimum, workers.scaling.maximum
    stream, context = partial(decoded_rows, job=job, num_cpus=workers.task_cpus), DataContext.get_current()

    def training_rows() -> ray.data.Dataset:
        # Ray Train calls this, in a process of its own, whenever workers start: more epochs may be done then.
        with DataContext.current(context):
            return stream(parts, epochs_done=num_epochs_done(output))

    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        datasets={"train": training_rows, "val": stream([val])},
        dataset_config=ExactValidation(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=low if low == high else (low, high),
            elastic_resize_monitor_interval_s=GROWTH_CHECK_S,
            use_gpu=workers.use_gpu,
            resources_per_worker={"CPU": workers.num_cpus} | ({"GPU": 1} if workers.use_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name="run",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(2 if low == high else MANY_FAILURES),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute="sample_f1"
            ),
        ),
    )
    with ending_by_interrupt():
        result = trainer.fit()
    return result.get_best_checkpoint("sample_f1", "max"), result.checkpoint


@contextmanager
def ending_by_interrupt() -> Iterator[None]:
    """Have Ctrl-C end training as it ends all else: Ray Train leaves by SystemExit, and keeps its handler."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:  # with 0 or 1, whatever Ray meant
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before or signal.SIG_DFL)


def decoded_rows(
    parts: list[Rows], job: TrainJob, num_cpus: float, epochs_done: int | None = None
) -> ray.data.Dataset:
    """Stream decoded rows, as `decode_rows` gives them.

    Args:
        parts: rows that are shuffled together.
        job: whose labels and sizes they get.
        num_cpus: that each task asks for.
        epochs_done: by now, which decides on order and augmentation; None gives neither.
    """
    config, seed, augmentation = job.train, None, None
    if epochs_done is not None:
        seed = (config.seed, epochs_done)
        augmentation = Augmentation(config.crop, config.colour, config.rand_augment)
    columns = ("image", "caption") if "image" in job.model.towers else ("caption",)
    return examples(parts, job.start.vocabulary, seed, columns=columns, num_cpus=num_cpus).map_batches(
        decode_rows,
        fn_args=(job.model, augmentation),
        batch_size=128,
        batch_format="pyarrow",
        num_cpus=num_cpus,
    )


def num_epochs_done(output: Folder) -> int:
    """Give the epochs that checkpoints hold: who goes on from one must not repeat the first ones' order."""
    run = output / f"{RUN}/run"
    return max((run.read_json(path)["epoch"] for path in run.list(f"/{PROGRESS}")), default=0)
