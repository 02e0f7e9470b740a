"""Training without Ray: a DataLoader reads and decodes in processes of its own; the same model and steps."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mmray.bundle import Bundle
from mmray.config import TrainConfig
from mmray.datasets import decode_rows
from mmray.images import Augmentation
from mmray.learner import Learner, freeze_unused
from mmray.options import from_json
from mmray.selection import as_lists
from mmray.start import RECIPE
from mmray.storage import Folder
from mmray.worker import Collate, train_epoch


class Examples(IterableDataset):
    """Batches of the rows of some files, in another order each time."""

    def __init__(self, files: list[Path], bundle: Bundle, train: TrainConfig) -> None:
        """Take the files, the labels and sizes, and how images are augmented."""
        self.files, self.bundle, self.train = files, bundle, train
        self.augmentation = Augmentation(train.crop, train.colour, train.rand_augment)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Read and decode this process's share of the files."""
        torch.set_num_threads(1)
        worker = get_worker_info()
        generator = np.random.default_rng(worker.seed)
        config, vocabulary = self.bundle.model_config, self.bundle.vocabulary
        collate, size = Collate(self.bundle.tokenizer(), config.max_tokens), self.train.batch_size_per_worker
        for path in generator.permutation(self.files[worker.id :: worker.num_workers]):
            rows = pq.read_table(path, columns=["image", "caption", "labels"])
            rows = rows.take(generator.permutation(len(rows)))
            targets = vocabulary.encode(rows["labels"]).astype(np.float32)
            columns = {
                "image": rows["image"].cast(pa.large_binary()),
                "caption": rows["caption"].cast(pa.large_string()),
                "targets": as_lists(targets),
                "mask": as_lists(np.ones_like(targets, bool)),
                "draw": pa.array(generator.integers(2**63, size=len(rows)).astype(np.uint64)),
            }
            table = pa.table(columns)
            for start in range(0, len(rows) - size + 1, size):
                yield collate(decode_rows(table[start : start + size], config, self.augmentation))


@click.command()
@click.option("--data", required=True, type=Path)
@click.option("--model", "model_path", required=True, type=str, help="Bundle that learns on, as it did.")
@click.option("--loaders", required=True, type=int, help="Processes that read and decode.")
@click.option("--output", required=True, type=Path, help="Takes rows/s of each epoch.")
def main(data: Path, model_path: str, loaders: int, output: Path) -> None:
    """Train, and write down how fast."""
    files, bundle = sorted(data.glob("*.parquet")), Bundle.load(model_path)
    learned = Folder(model_path).read_json(RECIPE)["train"]
    train = from_json(TrainConfig, learned | {"init": []}, RECIPE)
    model = bundle.model()
    freeze_unused(model, bundle.model_config.image_size)
    num_rows = sum(pq.ParquetFile(path).metadata.num_rows for path in files)
    steps = num_rows // train.batch_size_per_worker
    positives = np.ones(len(bundle.vocabulary), np.int64)
    learner = Learner(model, train, num_rows=num_rows, positives=positives, steps_per_epoch=steps)
    batches = DataLoader(
        Examples(files, bundle, train), batch_size=None, num_workers=loaders, persistent_workers=True
    )
    rates = []
    for _ in range(train.epochs):
        started, before = time.monotonic(), learner.num_steps
        train_epoch(learner, batches, bundle.tokenizer())
        num_learned = (learner.num_steps - before) * train.batch_size_per_worker
        rates.append(num_learned / (time.monotonic() - started))
    output.write_text(json.dumps(rates))


if __name__ == "__main__":
    main()
