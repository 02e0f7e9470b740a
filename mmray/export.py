"""Hand-over of a labeled output: the rows most worth a person's time, and what cleanlab asks for."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmray.config import Columns, require_range
from mmray.errors import ConfigError
from mmray.label_studio import Question, form, tasks
from mmray.looks import Reader
from mmray.pairing import Pairs
from mmray.parquet import find_files
from mmray.picking import Pick, take_first
from mmray.plan import Plan
from mmray.resources import spread
from mmray.retry import Earlier
from mmray.schema import KeptScores, Vocabulary, score_matrix
from mmray.storage import Folder, publish_file
from mmray.survey import Surveyor

QUESTION_PX = 640
"""Longer side of the images that people see."""


def export_uncertain(predictions_uri: str, output_uri: str, count: int) -> int:
    """Write the rows that the model is least certain of, as Parquet; labels take turns.

    The file holds `file`, `row`, `doubt` (mean entropy of the scores in bits), `caption`, `status`,
    `predicted_labels` and `scores`.

    Args:
        predictions_uri: a finished output of `label_dataset`, with all scores.
        output_uri: of the file.
        count: rows to write, at most.

    Returns:
        The rows that were written.

    Raises:
        OutputError: the predictions are not finished, or damaged.
        ConfigError: they lack scores.
    """
    output, plan = _finished(predictions_uri)
    looks = Reader(output, plan, None).read_all(least_certain(output, plan, count))
    vocabulary = Vocabulary(tuple(plan.settings["labels"]))
    decided, scores = (np.array([getattr(look, name) for look in looks]) for name in ("decided", "scores"))
    everything = np.ones(len(looks), bool)
    shape = (len(looks), len(vocabulary))
    table = pa.table(
        {
            "file": [look.pick.path for look in looks],
            "row": pa.array([look.pick.row for look in looks], pa.int64()),
            "doubt": pa.array([look.pick.rank for look in looks], pa.float64()),
            "caption": pa.array([look.caption for look in looks], pa.string()),
            "status": [look.status for look in looks],
            "predicted_labels": vocabulary.decode(decided.reshape(shape), everything),
            "scores": KeptScores().array(scores.reshape(shape), everything, vocabulary),
        }
    )
    file = io.BytesIO()
    pq.write_table(table, file)
    publish_file(output_uri, file.getvalue())
    return table.num_rows


def export_label_studio(
    predictions_uri: str,
    input_uri: str,
    output_uri: str,
    count: int,
    image_prefixes: tuple[str, ...] = (),
) -> int:
    """Write the same rows as tasks for Label Studio, and the form that people fill in, beside it as XML.

    Args:
        predictions_uri: a finished output of `label_dataset`, with all scores.
        input_uri: the rows that were labeled, for their images.
        output_uri: of the JSON file.
        count: rows to write, at most.
        image_prefixes: below which images that rows name by URI may be fetched.

    Returns:
        The rows that were written.

    Raises:
        OutputError: the predictions are not finished, or damaged.
        ConfigError: they lack scores.
        DataError: the input is not what was labeled.
    """
    output, plan = _finished(predictions_uri)
    source, files = find_files(input_uri)
    plan.compare_input(files)
    reader = Reader(output, plan, source, image_prefixes, thumbnail_px=QUESTION_PX)
    looks = reader.read_all(least_certain(output, plan, count))
    labels, model = reader.vocabulary.labels, plan.settings["bundle"]
    questions = [
        Question(
            *(look.pick.path, look.pick.row, look.caption or "", look.thumbnail),
            [labels[place] for place in np.flatnonzero(look.decided)],
            1 - look.pick.rank,
            model,
        )
        for look in looks
    ]
    publish_file(output_uri, tasks(questions).encode())
    publish_file(f"{output_uri}.config.xml", form(labels).encode())
    return len(questions)


def least_certain(output: Folder, plan: Plan, count: int) -> list[Pick]:
    """Pick the rows that the model is least certain of, on the cluster; labels take turns.

    Raises:
        ConfigError: the output lacks scores.
        OutputError: a file is gone or damaged.
    """
    require_range("--count", count, 1, 10_000_000)
    _require_scores(output, plan)
    surveyor = Surveyor.of(output, plan)

    def pick(paths: Sequence[str]) -> list[Pick]:
        return [pick for path in paths for pick in surveyor.uncertain(path, count)]

    found = spread(pick, [file.path for file in plan.files if file.num_rows])
    return take_first((pick for picks in found for pick in picks), count)


def export_cleanlab(
    data_uri: str, predictions_uri: str, output_uri: str, columns: Columns | None = None
) -> int:
    """Write the pair that cleanlab asks for, as a NumPy archive.

    It holds `pred_probs`: float32 (N, L), `targets`: uint8 (N, L), and `labels`: (L,) of their own type. Rows
    that failed are left out. Predictions should be of a model that did not see these rows.

    Args:
        data_uri: Parquet rows with labels.
        predictions_uri: what `label_dataset` made of them, with all scores.
        output_uri: of the .npz file.
        columns: names of the rows' columns.

    Returns:
        The rows that were written.

    Raises:
        OutputError: the predictions are no output of label.py.
        ConfigError: they lack scores.
        DataError: the rows are unusable, bear labels that the model does not know, or cannot be joined.
    """
    pairs = Pairs.find(data_uri, predictions_uri, columns or Columns())
    _require_scores(pairs.predictions, pairs.plan)

    def parts() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        found = map(pairs.of_file, pairs.files) if pairs.by_position else [pairs.joined()]
        for truth, labeled in found:
            scores, valid = score_matrix(labeled["scores"], len(pairs.vocabulary))
            yield scores[valid], pairs.vocabulary.encode(truth)[valid]

    scores, targets = (np.concatenate(arrays) for arrays in zip(*parts(), strict=True))
    file = io.BytesIO()
    arrays: dict[str, Any] = {"pred_probs": scores, "targets": targets}
    np.savez_compressed(file, **arrays, labels=np.array(pairs.vocabulary.labels))
    publish_file(output_uri, file.getvalue())
    return len(scores)


def _finished(predictions_uri: str) -> tuple[Folder, Plan]:
    earlier, plan = Earlier.find(predictions_uri, "--predictions")
    return earlier.folder, plan


def _require_scores(output: Folder, plan: Plan) -> None:
    if plan.settings["scores"] != "all":
        raise ConfigError(f"{output} was labeled with --scores {plan.settings['scores']}: needs all")
