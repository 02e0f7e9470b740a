"""Pseudo-labels on the cluster: selected from what a labeling job left, and held against what is true."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmray.config import SelfTrainConfig
from mmray.datasets import Rows
from mmray.errors import DataError, OutputError
from mmray.fingerprints import differences, fingerprint
from mmray.metrics import NUM_BINS, histogram
from mmray.parquet import DataFile, read_footer, read_units
from mmray.resources import spread
from mmray.schema import Vocabulary, score_matrix
from mmray.selection import Cutoffs, Selection, write_selection
from mmray.shards import MANIFEST
from mmray.storage import Folder

log = logging.getLogger(__name__)

SELECTED = "selection.json"
VERSION = 3
"""Of what is selected: the first left out rows that surely bear no label, the second took ties apart."""


def select(
    unlabeled: Rows, folder: Folder, vocabulary: Vocabulary, shares: np.ndarray, config: SelfTrainConfig
) -> tuple[Rows, dict[str, Any]]:
    """Select rows and labels of a round from what its teacher said, unless that is done.

    Args:
        unlabeled: the rows that the teacher labeled.
        folder: of the round.
        vocabulary: the L labels.
        shares: float64 (L,), of the labeled rows that bear each label.
        config: how to select.

    Returns:
        The selected rows, and what is known of them; see `report_of`.

    Raises:
        OutputError: the round was selected otherwise.
    """
    labels, target = folder / "labels", folder / "selection"
    manifest = labels.read_json(MANIFEST)
    settings = asdict(config) | {"rounds": None, "labels": manifest["fingerprint"], "version": VERSION}
    record = target.read_json(SELECTED)
    if record is None:
        cutoffs = _cutoffs(unlabeled, labels, shares, config)
        files = list(_select_files(unlabeled, labels, target, vocabulary, cutoffs, config))
        if unread := [file["unread"] for file in files if file["unread"]]:
            told = "%s, in %d of %d files: how right the pseudo-labels of these are is not known"
            log.warning(told, unread[0], len(unread), len(files))
        record = {"settings": settings, "files": {file["path"]: file["num_rows"] for file in files}}
        record["report"] = report_of(files, unlabeled.num_rows, vocabulary)
        target.publish_json(SELECTED, record)
    elif found := differences(record["settings"], settings):
        raise OutputError(f"{target} was selected otherwise ({'; '.join(found)}); choose another --output")
    num_rows = {path: count for path, count in record["files"].items() if count}
    selection = Selection(target, num_rows, fingerprint(record["settings"]))
    chosen = tuple(file for file in unlabeled.files if file.path in num_rows)
    return Rows(unlabeled.folder, chosen, unlabeled.columns, selection), record["report"]


def _cutoffs(unlabeled: Rows, labels: Folder, shares: np.ndarray, config: SelfTrainConfig) -> Cutoffs:
    num_labels = len(shares)
    if config.select == "confidence":
        return Cutoffs.by_confidence(config.confidence, num_labels)

    def count(files: Sequence[DataFile]) -> np.ndarray:
        total = np.zeros((num_labels, NUM_BINS))
        for file in files:
            scores, valid = _scores(labels, file.path, num_labels)
            total += histogram(scores[valid], np.zeros((valid.sum(), num_labels), bool))[0]
        return total

    total = sum(spread(count, unlabeled.files), start=np.zeros((num_labels, NUM_BINS)))
    return Cutoffs.by_frequency(total, shares, config.keep)


def _select_files(
    unlabeled: Rows,
    labels: Folder,
    target: Folder,
    vocabulary: Vocabulary,
    cutoffs: Cutoffs,
    config: SelfTrainConfig,
) -> Iterator[dict[str, Any]]:
    """Write the selection of each file, on the cluster; gives how much it is and, if known, how right."""
    rows = replace(unlabeled, files=())  # what goes to every task

    def write(file: DataFile) -> dict[str, Any]:
        scores, valid = _scores(labels, file.path, len(vocabulary))
        chosen, targets, mask = cutoffs.select(scores, valid, soft=config.targets == "soft")
        if len(chosen):
            write_selection(target, file.path, chosen, targets, mask)
        true = (scores[chosen] >= cutoffs.positive) & mask
        found = {"num_true": true.sum(0), "num_false": (mask & ~true).sum(0)}
        truth, known, unread = _truth(rows, file, vocabulary)
        truth, known = truth[chosen], known[chosen]
        for kind, taken, right in (("true", true, truth), ("false", mask & ~true, ~truth)):
            found |= {
                f"known_{kind}": (taken & known).sum(0),
                f"right_{kind}": (taken & known & right).sum(0),
            }
        counts = {name: count.tolist() for name, count in found.items()}
        return {"path": file.path, "num_rows": len(chosen), "unread": unread, **counts}

    for found in spread(lambda files: [write(file) for file in files], unlabeled.files):
        yield from found


def _scores(labels: Folder, path: str, num_labels: int) -> tuple[np.ndarray, np.ndarray]:
    column = pq.read_table(pa.BufferReader(labels.read(path)), columns=["scores"], partitioning=None)
    return score_matrix(column["scores"], num_labels)


def _truth(rows: Rows, file: DataFile, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray, str | None]:
    """Give what is true of a file's rows, bool (B, L), and of which rows that is known, bool (B, 1).

    Labels that the vocabulary lacks say nothing here. Of labels that are none at all it is said why, and no
    truth is known.
    """
    unknown = np.zeros((file.num_rows, len(vocabulary)), bool), np.zeros((file.num_rows, 1), bool)
    name = rows.columns.labels
    schema = read_footer(rows.folder, file.path, file.size_bytes)[0].schema.to_arrow_schema()
    if name not in schema.names or pa.types.is_null(schema.field(name).type) or not file.num_rows:
        return *unknown, None
    parts = [table[name] for _, _, table in read_units(rows.folder, file, file.units, [name])]
    try:
        truth = np.concatenate([vocabulary.encode(part, others=True) for part in parts]).astype(bool)
    except DataError as error:
        return *unknown, f"{rows.folder}/{file.path}: {error}"
    known = np.concatenate([part.is_valid().to_numpy() for part in parts])
    return truth, known[:, None], None


def report_of(files: list[dict[str, Any]], num_rows: int, vocabulary: Vocabulary) -> dict[str, Any]:
    """Say how many rows and labels join, and how right they are where that is known.

    Returns:
        `num_rows` of them all and `num_selected`; by label `num_true` and `num_false`, of these `known_true`
        and `known_false` in rows whose truth is known, and `precision_true` and `precision_false` of those:
        None where there are none.
    """
    by_label: dict[str, Any] = {}
    for place, label in enumerate(vocabulary.labels):
        entry = by_label[str(label)] = {}
        for kind in ("true", "false"):
            taken, known, right = (
                sum(file[f"{name}_{kind}"][place] for file in files) for name in ("num", "known", "right")
            )
            entry |= {f"num_{kind}": taken, f"known_{kind}": known}
            entry[f"precision_{kind}"] = right / known if known else None
    selected = sum(file["num_rows"] for file in files)
    return {"num_rows": num_rows, "num_selected": selected, "by_label": by_label}
