"""What one training worker does: decoded rows in, steps, validation, a checkpoint each epoch."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
from ray.data.collate_fn import NumpyBatchCollateFn
from ray.util.queue import Queue
from torch import Tensor

from mmray.bundle import tokenizer_of
from mmray.captions import tokenize
from mmray.config import ModelConfig, TrainConfig
from mmray.events import EVENTS, event_file
from mmray.learner import Batches, Learner, drop_modalities, drop_words, freeze_unused, inputs_of
from mmray.news import News
from mmray.resources import Resources
from mmray.start import Start
from mmray.storage import Folder
from mmray.validation import Validation, add_up
from mmray.words import words_of

SHUFFLE_BUFFER_BYTES, SHUFFLE_BUFFER_ROWS = 256 << 20, 8192
HISTORY = ("epoch", "loss", "sample_f1", "map", "macro_f1", "seconds", "waited", "workers")
"""What is remembered of each epoch."""


@dataclass(frozen=True)
class TrainJob:
    """All that a worker is told."""

    model: ModelConfig
    train: TrainConfig
    start: Start
    datasets: list[str]
    """Names of the folders that the rows are in, for the model card: of the paths nothing is kept."""
    num_rows: int
    run: Folder
    """Takes the run's events."""
    news: Queue | None


def train_worker(config: dict[str, Any]) -> None:
    """Train, validate and report, epoch by epoch. Ray Train runs this in each worker."""
    job: TrainJob = config["job"]
    context, node_id = ray.train.get_context(), ray.get_runtime_context().get_node_id()
    # Asked here, since the next start may be on other nodes, with more or fewer workers.
    torch.set_num_threads(Resources.of_cluster().threads(node_id, context.get_local_world_size()))
    rank, world_size = context.get_world_rank(), context.get_world_size()
    num_steps = job.num_rows // world_size // batch_size_of(job, world_size)
    learner = make_learner(job, num_steps, world_size)
    state: dict[str, Any] = {"epoch": 0, "stale": 0, "best": -1.0, "history": []}
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            state = learner.load(Path(folder))
    epochs = Epochs(job, learner, num_steps, rank, world_size)
    while state["epoch"] < job.train.epochs and state["stale"] < job.train.patience:
        metrics, validation = epochs.run(state["epoch"] + 1)
        better = metrics["sample_f1"] > state["best"]
        state = {
            "epoch": metrics["epoch"],
            "stale": 0 if better else state["stale"] + 1,
            "best": max(state["best"], metrics["sample_f1"]),
            "metrics": metrics,
            "history": [*state["history"], {name: metrics[name] for name in HISTORY}],
        }
        epochs.news.tell(told(metrics, better=better))
        if rank == 0:
            job.run.publish(EVENTS.format(metrics["epoch"]), event_file(state["history"][-1]))
        report(learner, state, validation.gathered(), rank)


class Epochs:
    """Passes of one worker over its shares of the rows, which Ray Train hands it."""

    def __init__(self, job: TrainJob, learner: Learner, num_steps: int, rank: int, world_size: int) -> None:
        """Take what learns, and its place among the workers."""
        self.job, self.learner, self.num_steps = job, learner, num_steps
        self.rank, self.world_size = rank, world_size
        self.news = News(job.news if rank == 0 else None)
        self.train, self.val = ray.train.get_dataset_shard("train"), ray.train.get_dataset_shard("val")
        self.collate = Collate(tokenizer_of(job.start.tokenizer_files), job.model.max_tokens)

    def run(self, epoch: int) -> tuple[dict[str, Any], Validation]:
        """Train for an epoch and validate; gives its metrics, and what was made of the validation rows."""
        job, learner = self.job, self.learner
        batch_size = batch_size_of(job, self.world_size)
        stream: dict[str, Any] = {"batch_size": batch_size, "collate_fn": self.collate}
        stream["device"] = "cpu"  # inputs_of() copies to the GPU
        batches = Timed(
            self.train.iter_torch_batches(
                **stream,
                drop_last=True,
                local_shuffle_buffer_size=shuffle_buffer_rows(job, batch_size, self.world_size),
                local_shuffle_seed=job.train.seed + epoch,
            )
        )
        torch.manual_seed(job.train.seed + 1_000_003 * epoch + self.rank)
        started = time.monotonic()
        loss = train_epoch(learner, self.news.about(batches, epoch, self.num_steps), self.collate.tokenizer)
        validation = Validation.of(learner, self.val.iter_torch_batches(**stream), len(job.start.vocabulary))
        metrics = validation.measure(job.start.vocabulary, learner.device)
        metrics |= {"epoch": epoch, "loss": loss, "seconds": time.monotonic() - started}
        return metrics | {"waited": batches.seconds, "workers": self.world_size}, validation


def told(metrics: dict[str, Any], *, better: bool) -> str:
    """Say in a line what became of an epoch; a star marks the best one so far."""
    line = (
        f"epoch {metrics['epoch']}: loss {metrics['loss']:.4f}, "
        f"validation sample F1 {metrics['sample_f1']:.4f}, "
        f"mAP {metrics['map']:.4f}, macro F1 {metrics['macro_f1']:.4f} "
        f"({metrics['seconds']:.0f} s, {metrics['waited']:.0f} of them waiting for rows"
    )
    many = f"; {metrics['workers']} workers" if metrics["workers"] > 1 else ""
    return f"{line}{many})" + (" *" if better else "")


class Timed:
    """Passes batches on, and adds up how long they were waited for."""

    def __init__(self, batches: Batches) -> None:
        """Take what gives the batches."""
        self.batches, self.seconds = batches, 0.0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Give the batches."""
        asked = time.monotonic()
        for batch in self.batches:
            self.seconds += time.monotonic() - asked
            yield batch
            asked = time.monotonic()


def batch_size_of(job: TrainJob, world_size: int) -> int:
    """Give the rows in one step of one worker; no more than there are for each."""
    return min(job.train.batch_size_per_worker, job.num_rows // world_size)


def make_learner(job: TrainJob, steps_per_epoch: int, world_size: int) -> Learner:
    """Build the model on the worker's device, the same weights on all workers, ready to learn."""
    torch.manual_seed(job.train.seed)
    model = job.start.build(job.model)
    freeze_unused(model, job.model.image_size)
    model.to(ray.train.torch.get_device())
    return Learner(
        model,
        job.train,
        num_rows=job.start.num_labeled,
        positives=job.start.positives,
        steps_per_epoch=steps_per_epoch,
        world_size=world_size,
        word_rates=job.start.word_rates,
        wrap=ray.train.torch.prepare_model,
    )


def train_epoch(learner: Learner, batches: Batches, tokenizer: Any) -> float:
    """Take a step for each batch, some of it hidden; gives the mean loss over all workers."""
    config, mask_id, special_ids = learner.config, tokenizer.mask_token_id, tokenizer.all_special_ids
    generator = torch.Generator().manual_seed(torch.initial_seed())
    total = torch.zeros(2, device=learner.device)
    for batch in batches:
        whole = inputs_of(batch, learner.device)
        inputs = drop_modalities(whole, config.modality_dropout, generator)
        if mask_id is not None:
            inputs = drop_words(inputs, config.word_dropout, mask_id, special_ids, generator)
        words = words_of(whole, learner.with_words.num_words, special_ids) if learner.with_words else None
        targets, mask = batch["targets"].to(learner.device), batch["mask"].to(learner.device)
        loss = learner.step(inputs, targets, mask, words)
        total += torch.stack([loss, torch.ones_like(loss)])
    add_up(total)
    return float(total[0] / total[1].clamp(min=1))


def report(learner: Learner, state: dict[str, Any], validation: Validation, rank: int) -> None:
    """Tell Ray Train of an epoch, with a checkpoint by the first worker."""
    with tempfile.TemporaryDirectory() as folder:
        if rank == 0:
            learner.save(Path(folder), state)
            validation.save(Path(folder))
        metrics = {name: state["metrics"][name] for name in ("epoch", "sample_f1", "map", "loss")}
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint(folder) if rank == 0 else None)


class Collate(NumpyBatchCollateFn):
    """Tokenizes the captions of a batch, and makes tensors of it."""

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        """Take the tokenizer."""
        self.tokenizer, self.max_tokens = tokenizer, max_tokens

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Tensor]:
        """Turn what `decode_rows` gave into the parts of `Inputs`, `targets`, `mask` and `valid`."""
        captions = batch.pop("caption").tolist()
        batch["input_ids"], batch["attention_mask"] = tokenize(self.tokenizer, captions, self.max_tokens)
        return {
            name: torch.from_numpy(np.require(array, requirements=["C", "W"]))
            for name, array in batch.items()
        }


def shuffle_buffer_rows(job: TrainJob, batch_size: int, world_size: int) -> int:
    """Size the buffer that rows are drawn from: as 256 MiB hold, 8,192 at most, and four batches at least.

    Ray gives no batch before it has half as much again; so no more than an eighth of the epoch, either, or
    training would begin when most of it is decoded.
    """
    most = SHUFFLE_BUFFER_ROWS
    if "image" in job.model.towers:
        most = min(most, SHUFFLE_BUFFER_BYTES // (3 * job.model.image_size**2))
    return max(4 * batch_size, min(most, job.num_rows // (8 * world_size)))
