"""Labeled rows on Ray Data: checked, shuffled anew each epoch, decoded, counted.

Without torch: most processes of a training run need no more than this, and torch costs each of them seconds.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import ray.train
from ray.data import DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata

from mmray.captions import is_blank
from mmray.columns import image_bytes, text_values
from mmray.config import Columns, ModelConfig
from mmray.decoding import decode_row
from mmray.errors import DataError
from mmray.fetch import fetch_images
from mmray.images import Augmentation, View
from mmray.parquet import DataFile, Unit, describe_files, find_files, read_units
from mmray.schema import Label, Status, Vocabulary
from mmray.selection import Selection, as_lists, as_matrix
from mmray.storage import Folder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """Rows for training and evaluation: where they are and how their columns are called."""

    folder: Folder
    files: tuple[DataFile, ...]
    columns: Columns
    selection: Selection | None = None
    """Which rows take part, and what they have in place of labels; None where all do, by their own."""

    @classmethod
    def find(cls, uri: str, columns: Columns, needs: Sequence[str] = ("image", "caption", "labels")) -> Rows:
        """Find a dataset, and check the columns that it needs.

        Raises:
            DataError: no file, no row, or a column is missing.
        """
        folder, files = find_files(uri)
        described = describe_files(folder, files, columns.image)
        for file, schema in described:
            columns.require(schema, f"{folder}/{file.path}", needs)
        rows = cls(folder, tuple(file for file, _ in described if file.num_rows), columns)
        if not rows.files:
            raise DataError(f"{uri}: its {len(files)} files hold no row")
        return rows

    @property
    def num_rows(self) -> int:
        """Rows that take part."""
        if self.selection:
            return sum(self.selection.num_rows.values())
        return sum(file.num_rows for file in self.files)

    def identity(self) -> list[tuple[str, str]]:
        """Say which rows these are: path and footer sum of each file, and the selection."""
        files = [(file.path, file.footer_sha256) for file in self.files]
        return [*files, ("selection", self.selection.fingerprint)] if self.selection else files

    def dataset(self, columns: Sequence[str]) -> ray.data.Dataset:
        """Stream the rows with Ray Data, in the files' order, a block for each shard.

        Args:
            columns: of `image`, `caption` and `labels`, under these names whatever the files call them.
        """
        return ray.data.read_datasource(RowSource((self,), tuple(columns), None))


def examples(
    parts: Sequence[Rows],
    vocabulary: Vocabulary,
    seed: tuple[int, ...] | None = None,
    *,
    columns: tuple[str, ...] = ("image", "caption"),
    num_cpus: float = 1,
) -> ray.data.Dataset:
    """Stream rows to learn from: their columns, and for each label what is true and whether it is known.

    Args:
        parts: rows that are shuffled together.
        vocabulary: of the L labels; the blocks' `targets` are list<float32>[L], their `mask` list<bool>[L].
        seed: shuffles the units anew each time the dataset is executed, that is each epoch, and adds a
            column `draw`: uint64, another number for each row and epoch. None keeps the files' order.
        columns: of `image` and `caption`.
        num_cpus: that each task asks for.
    """
    source = RowSource(tuple(parts), columns, seed, vocabulary)
    return ray.data.read_datasource(source, num_cpus=num_cpus)


class RowSource(Datasource):
    """Ray's view of `Rows`: a read task for each unit."""

    def __init__(
        self,
        parts: tuple[Rows, ...],
        columns: tuple[str, ...],
        seed: tuple[int, ...] | None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """Hold what is to be read."""
        super().__init__()
        self.parts, self.columns, self.seed, self.vocabulary = parts, columns, seed, vocabulary
        self.executions = 0

    def estimate_inmemory_data_size(self) -> int:
        """Estimate bytes: the images, as far as they are asked for."""
        files = [file for rows in self.parts for file in rows.files]
        return sum(file.image_bytes for file in files) if "image" in self.columns else 0

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """Give the tasks of one execution; Ray asks anew for each, which is what shuffles the next epoch."""
        units = [(rows, file, unit) for rows in self.parts for file in rows.files for unit in file.units]
        draws: list[int | None] = [None] * len(units)
        if self.seed is not None:
            generator = np.random.default_rng((*self.seed, self.executions))
            units = [units[index] for index in generator.permutation(len(units))]
            draws = [int(draw) for draw in generator.integers(2**63, size=len(units))]
            self.executions += 1
        return [self._task(*unit, draw) for unit, draw in zip(units, draws, strict=True)]

    def _task(self, rows: Rows, file: DataFile, unit: Unit, draw: int | None) -> ReadTask:
        columns, vocabulary = self.columns, self.vocabulary
        if vocabulary and not rows.selection:
            columns += ("labels",)
        names = {column: getattr(rows.columns, column) for column in columns}

        def read() -> Iterator[pa.Table]:
            for first, _, table in read_units(rows.folder, file, [unit], list(names.values())):
                chosen = rows.selection.read(file.path, first, first + len(table)) if rows.selection else None
                table = table.take(chosen["row"]) if chosen else table
                block = {column: table[name] for column, name in names.items()}
                if "image" in block:
                    images = fetch_images(table, names["image"], rows.columns.image_prefixes)[names["image"]]
                    block["image"] = pa.array(image_bytes(images), pa.large_binary())
                if "caption" in block:  # of any layout, also those that Ray cannot send from task to task
                    block["caption"] = block["caption"].cast(pa.large_string())
                if vocabulary and chosen:
                    block |= {name: chosen[name] for name in ("targets", "mask")}
                elif vocabulary:
                    targets = vocabulary.encode(block.pop("labels")).astype(np.float32)
                    block |= {"targets": as_lists(targets), "mask": as_lists(np.ones_like(targets, bool))}
                if draw is not None:
                    block["draw"] = pa.array(
                        np.arange(table.num_rows, dtype=np.uint64) + np.uint64(draw + first)
                    )
                yield pa.table(block)

        num_rows = unit[-1] - unit[0]
        size = file.image_bytes_of(unit)
        return ReadTask(
            read, BlockMetadata(num_rows=num_rows, size_bytes=size, exec_stats=None, input_files=None)
        )


class ExactValidation(ray.train.DataConfig):
    """Splits training rows equally, so that no worker waits for another, and validation rows exactly."""

    def configure(
        self,
        datasets: dict[str, ray.data.Dataset],
        world_size: int,
        worker_handles: Any,
        worker_node_ids: list[str] | None,
        **kwargs: Any,
    ) -> list[dict[str, ray.data.DataIterator]]:
        """Give each worker its streams, of blocks on its own node as far as there are any."""
        splits = {
            name: dataset.streaming_split(world_size, equal=name == "train", locality_hints=worker_node_ids)
            for name, dataset in datasets.items()
        }
        return [{name: split[rank] for name, split in splits.items()} for rank in range(world_size)]


def decode_rows(
    block: pa.Table, model: ModelConfig, augmentation: Augmentation | None = None
) -> dict[str, np.ndarray]:
    """Decode what `examples` gives: by the function that decodes for labeling, plus augmentation.

    Returns:
        pixels: uint8 (B, S, S, 3), S being 1 for a model that sees none; caption: str (B,);
        has_image, has_caption, valid: bool (B,);
        targets: float32 (B, L); mask: bool (B, L), of the labels that are known.
    """
    views: list[View | None] = [None] * block.num_rows
    if augmentation and block.num_rows:
        generator = np.random.default_rng(block["draw"][0].as_py())
        views = [augmentation.draw(generator) for _ in range(block.num_rows)]
    sees, captions = "image" in model.towers, text_values(block["caption"])
    images = block["image"].to_pylist() if sees else [None] * block.num_rows
    rows = [
        decode_row(image, caption, model.fusion, model.image_size, view)
        for image, caption, view in zip(images, captions, views, strict=True)
    ]
    size_px = model.image_size if sees else 1
    pixels = np.zeros((len(rows), size_px, size_px, 3), np.uint8)
    for index, row in enumerate(rows):
        if row.pixels is not None:
            pixels[index] = row.pixels
    valid = np.array([row.status is not Status.FAILED for row in rows], bool)
    targets, mask = (as_matrix(block[name]) for name in ("targets", "mask"))
    return {
        "pixels": pixels,
        "caption": np.array([caption or "" for caption in captions], object),
        "has_image": np.array([row.pixels is not None for row in rows], bool),
        "has_caption": np.array([row.caption is not None for row in rows], bool),
        "valid": valid,
        "targets": targets,
        "mask": mask & valid[:, None],
    }


def count_labels(rows: Rows) -> tuple[Vocabulary, np.ndarray]:
    """Count the rows that bear each label.

    Returns:
        The vocabulary, and positives: int64 (L,).

    Raises:
        DataError: no label, labels of mixed types, or no lists of labels.
    """

    def count(block: pa.Table) -> pa.Table:
        counts: Counter[Label] = Counter()
        try:
            for labels in block["labels"].to_pylist():
                counts.update(set(labels or ()))
        except (TypeError, UnicodeDecodeError) as error:
            kind = block["labels"].type
            raise DataError(f"labels of type {kind} are no lists of integers or of text: {error}") from None
        nulls = block["labels"].null_count
        return pa.table({"counts": [json.dumps(list(counts.items()))], "nulls": [nulls]})

    total: Counter[Label] = Counter()
    num_nulls = 0
    counted = rows.dataset(["labels"]).map_batches(count, batch_size=None, batch_format="pyarrow")
    for row in counted.iter_rows():
        total.update(dict(json.loads(row["counts"])))
        num_nulls += row["nulls"]
    if num_nulls:
        told = "%s: the labels of %d of %d rows are null, taken as none; "
        remedy = "rows that nobody has labeled yet are for self_train.py --unlabeled"
        log.warning(told + remedy, rows.folder, num_nulls, rows.num_rows)
    vocabulary = Vocabulary.of(total)
    return vocabulary, np.array([total[label] for label in vocabulary.labels], np.int64)


def sample_captions(parts: Sequence[Rows], limit: int) -> list[str]:
    """Give the captions of the first `limit` rows that have one."""
    source = RowSource(tuple(parts), ("caption",), None)
    return [caption for captions, _ in _captioned(source, limit) for caption in captions]


def sample_labeled(rows: Rows, vocabulary: Vocabulary, limit: int) -> tuple[list[str], np.ndarray]:
    """Give the captions, and targets float32 (N, L), of `limit` rows with one, of units drawn at random."""
    captions, targets = list[str](), [np.zeros((0, len(vocabulary)), np.float32)]
    for texts, batch in _captioned(RowSource((rows,), ("caption",), (0,), vocabulary), limit):
        captions += texts
        targets.append(as_matrix(batch["targets"]))
    return captions, np.concatenate(targets)


def _captioned(source: RowSource, limit: int) -> Iterator[tuple[list[str], pa.Table]]:
    """Stream the first `limit` rows that have a caption: captions as text, and the rows."""
    for batch in ray.data.read_datasource(source).iter_batches(batch_size=None, batch_format="pyarrow"):
        said = enumerate(text_values(batch["caption"]))
        texts = {row: text for row, text in said if text is not None and not is_blank(text)}
        rows = [*texts][:limit]
        yield [texts[row] for row in rows], batch.take(pa.array(rows, pa.int64()))
        limit -= len(rows)
        if not limit:
            break
