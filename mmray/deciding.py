"""Deciding again: other thresholds, or another rule, for an output that was labeled before, from its scores.

What comes of it is an output like any other: of the same plan, with a manifest of its own, resumed by the
same command, proved by verify.py against the input that was labeled.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray.data

from mmray.config import ComputeConfig
from mmray.decisions import decide
from mmray.errors import ConfigError
from mmray.faults import moment
from mmray.files import split_uri
from mmray.labeling import LabelingResult, label_planned
from mmray.lease import Lease
from mmray.parcels import Parcel
from mmray.parquet import DataFile
from mmray.plan import Plan, Shard, Work, shards_of
from mmray.planning import find_plan, refuse_inside
from mmray.pool import Pool
from mmray.retry import Earlier, read_shards
from mmray.schema import Vocabulary, score_matrix
from mmray.storage import Folder

UNITS_PER_TASK = 32
"""Of a large file, so that all CPUs share it: each task reads its footer."""


class Rule(NamedTuple):
    """How scores become labels."""

    vocabulary: Vocabulary
    thresholds: np.ndarray
    """float64 (L,)."""
    fallback: bool
    """Whether the top label speaks where no score reaches its threshold."""

    def apply(self, labeled: pa.Table) -> pa.Table:
        """Decide labeled rows, with scores of all labels, anew; those that failed stay without labels."""
        scores, valid = score_matrix(labeled["scores"], len(self.vocabulary))
        decided, _ = decide(scores, self.thresholds, fallback=self.fallback)
        place = labeled.schema.get_field_index("predicted_labels")
        labels = self.vocabulary.decode(decided, valid).cast(labeled.schema.field(place).type)
        # The footer's record is the earlier output's own.
        return labeled.set_column(place, labeled.schema.field(place), labels).replace_schema_metadata(None)


def decide_again(
    predictions_uri: str,
    output_uri: str,
    thresholds: float | Mapping[str, Any] | None = None,
    *,
    fallback: bool = True,
    progress: bool = False,
) -> LabelingResult:
    """Apply other thresholds, or another rule, to a finished output of `label_dataset`; needs no model.

    Args:
        predictions_uri: the output, with the scores of all labels.
        output_uri: folder for a new one.
        thresholds: one for all labels; or by label, where others keep theirs.
        fallback: whether the top label speaks where no score reaches its threshold.
        progress: show how the run goes, on stderr.

    Raises:
        OutputError: the predictions are not finished, or the output belongs to another job.
        ConfigError: the predictions lack scores, or a threshold is none.
    """
    started = time.monotonic()
    output = Folder(output_uri)
    earlier, before = Earlier.find(predictions_uri, "--predictions")
    before.require_scores(earlier)
    vocabulary = before.vocabulary
    rule = Rule(vocabulary, settle_thresholds(thresholds, vocabulary, before.thresholds), fallback)
    settings = before.settings | {
        "thresholds": rule.thresholds.tolist(),
        "fallback": fallback,
        "decided_from": earlier.manifest_sha256,
    }
    pool = Pool.on_cluster(ComputeConfig(use_gpu=False)).without_actors()
    refuse_inside(output, earlier.folder)
    with Lease(output) as lease:
        plan = find_plan(output) or Plan((), settings).append(output, before.files, before.skipped)
        plan.refuse_other(settings, output)
        score = partial(decide_shards, earlier, rule=rule, pool=pool)
        return label_planned(output, plan, score, pool, lease, started, progress=progress)


def decide_shards(earlier: Earlier, work: Work, rule: Rule, pool: Pool) -> ray.data.Dataset:
    """Decide the shards of some work: parcels of labeled tables.

    A task takes some shards of one file, which it opens once.
    """
    committed = work.committed

    def decided(batch: pa.Table) -> Iterator[pa.Table]:
        for row in batch.to_pylist():
            file = DataFile.from_json(row["file"])
            shards = [shard for shard in shards_of(file, json.loads(row["units"])) if shard not in committed]
            try:
                for shard, labeled in zip(shards, read_shards(earlier, file, shards), strict=True):
                    moment("before score", "{} {}-{}".format(*shard))
                    yield Parcel(file, shard, rule.apply(labeled)).packed()
            except Exception as error:  # as data: raised, it would end the run of all the others
                yield Parcel(file, Shard(file.path, 0, 0), error=error).packed()

    tasks = [
        {"file": file.to_json(), "units": json.dumps(units[first : first + UNITS_PER_TASK])}
        for file, units in work.pending
        for first in range(0, len(units), UNITS_PER_TASK)
    ]
    return ray.data.from_items(tasks).map_batches(
        decided, batch_size=1, batch_format="pyarrow", **pool.tasks()
    )


def read_thresholds(uri: str) -> dict[str, Any]:
    """Read thresholds by label: from JSON that says so, or from the `thresholds.json` of a bundle.

    Raises:
        ConfigError: there is no such file, or neither is in it.
        DataError: it is not JSON.
    """
    folder, name = split_uri(uri)
    try:
        record = folder.read_json(name)
    except IsADirectoryError:
        record = None
    if isinstance(record, dict) and isinstance(listed := record.get("thresholds"), list):
        labels = (folder.read_json("labels.json") or {}).get("labels", [])
        if len(labels) != len(listed):
            raise ConfigError(f"{uri}: no labels.json of the same bundle stands beside it")
        return dict(zip(map(str, labels), listed, strict=True))
    if not isinstance(record, dict) or not record:
        raise ConfigError(f"--thresholds {uri} is no file that holds label: threshold pairs")
    return record


def settle_thresholds(
    given: float | Mapping[str, Any] | None, vocabulary: Vocabulary, known: np.ndarray
) -> np.ndarray:
    """Give a threshold for each label: float64 (L,).

    Args:
        given: as `decide_again` takes it.
        vocabulary: the L labels.
        known: float64 (L,), what holds for labels of which nothing is said.

    Raises:
        ConfigError: a label that the vocabulary lacks, or a threshold that is no number between 0 and 1.
    """
    names = [str(label) for label in vocabulary.labels]
    if given is None:
        by_label: dict[str, Any] = {}
    elif not isinstance(given, Mapping):
        by_label = dict.fromkeys(names, given)
    else:
        by_label = {str(label): threshold for label, threshold in given.items()}
    if unknown := sorted(by_label.keys() - set(names)):
        raise ConfigError(f"thresholds of labels {unknown[:5]}: there are {', '.join(names[:20])}")
    for name, value in by_label.items():
        if isinstance(value, bool) or not (isinstance(value, Real) and 0 <= float(value) <= 1):
            raise ConfigError(f"threshold {value!r} of label {name} is no number between 0 and 1")
    return np.array([by_label.get(name, old) for name, old in zip(names, known, strict=True)], float)
