"""Which rows of the real data may train a model: ids from 24,000 on are for validation and the final test."""

from pathlib import Path

import pyarrow.parquet as pq

FIRST_HELD_OUT = 24_000


def ids_of(folder: Path) -> list[int]:
    """Give the numbers in the ids of a dataset's rows, such as 17 of `17.jpg`."""
    return [
        int(name.removesuffix(".jpg"))
        for name in pq.read_table(folder, columns=["image_id"])["image_id"].to_pylist()
    ]


def refuse_held_out(folder: Path) -> None:
    """Refuse a dataset to train on that holds rows which only validate.

    Raises:
        ValueError: it does; names one.
    """
    if (highest := max(ids_of(folder))) >= FIRST_HELD_OUT:
        raise ValueError(f"{folder}: row {highest}.jpg is held out: no id from {FIRST_HELD_OUT} on may train")
