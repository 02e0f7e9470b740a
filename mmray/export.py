"""Hand-over of a labeled output: the rows most worth a person's time, and what cleanlab asks for."""

from __future__ import annotations

import io
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmray.config import Columns
from mmray.files import file_place
from mmray.label_studio import Question, form, tasks
from mmray.looks import Reader
from mmray.options import require_range
from mmray.pairing import Pair, Pairs
from mmray.parquet import find_files
from mmray.picking import Pick, first_turns, take_first
from mmray.plan import Plan
from mmray.resources import spread
from mmray.retry import Earlier
from mmray.schema import KeptScores, output_name, score_matrix
from mmray.storage import Folder
from mmray.survey import Surveyor

QUESTION_PX = 640
"""Longer side of the images that people see."""

MOST_QUESTIONS, MOST_PICKS = 10_000, 1_000_000
"""In one file: of questions with their images, and of rows."""


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
    place, name = file_place(output_uri, outside=output)
    picks = least_certain(output, plan, count)
    looks = Reader(output, plan.settings, None).read_all(plan.files, picks)
    vocabulary = plan.vocabulary
    shape, everything = (len(looks), len(vocabulary)), np.ones(len(looks), bool)
    decided = np.array([look.decided for look in looks], bool).reshape(shape)
    scores = np.array([look.scores for look in looks], np.float32).reshape(shape)
    table = pa.table(
        {
            "file": pa.array([look.pick.path for look in looks], pa.string()),
            "row": pa.array([look.pick.row for look in looks], pa.int64()),
            "doubt": pa.array([look.pick.rank for look in looks], pa.float64()),
            "caption": pa.array([look.caption for look in looks], pa.string()),
            "status": pa.array([look.status for look in looks], pa.string()),
            "predicted_labels": vocabulary.decode(decided, everything),
            "scores": KeptScores().array(scores, everything, vocabulary),
        }
    )
    file = io.BytesIO()
    pq.write_table(table, file)
    place.publish(name, file.getvalue())
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
    place, name = file_place(output_uri, outside=output)
    require_range("--count", count, 1, MOST_QUESTIONS)
    source, files = find_files(input_uri)
    plan.compare_input(files)
    reader = Reader(output, plan.settings, source, image_prefixes, thumbnail_px=QUESTION_PX)
    looks = reader.read_all(plan.files, least_certain(output, plan, count))
    labels, footers = reader.vocabulary.labels, {file.path: file.footer_sha256 for file in plan.files}
    questions = [
        Question(
            *(look.pick.path, footers[look.pick.path], look.pick.row, look.caption or "", look.thumbnail),
            [labels[place] for place in np.flatnonzero(look.decided)],
            isinstance(labels[0], int),
            1 - look.pick.rank,
            plan.settings["bundle"],
        )
        for look in looks
    ]
    place.publish(f"{name}.config.xml", form(labels).encode())
    place.publish(name, tasks(questions).encode())
    return len(questions)


def least_certain(output: Folder, plan: Plan, count: int) -> list[Pick]:
    """Pick the rows that the model is least certain of, on the cluster; labels take turns.

    Raises:
        ConfigError: the output lacks scores.
        OutputError: a file is gone or damaged.
    """
    require_range("--count", count, 1, MOST_PICKS)
    plan.require_scores(output)
    surveyor = Surveyor.of(output, plan)

    def pick(paths: Sequence[str]) -> list[Pick]:
        picks: list[Pick] = []
        for path in paths:
            picks = first_turns([*picks, *surveyor.uncertain(path, count)], count)
        return picks

    found = spread(pick, [file.path for file in plan.files if file.num_rows])
    return take_first((pick for picks in found for pick in picks), count)


def export_cleanlab(
    data_uri: str, predictions_uri: str, output_uri: str, columns: Columns | None = None
) -> int:
    """Write what cleanlab makes its arguments of, as a NumPy archive.

    It holds `pred_probs`: float32 (N, L), `targets`: uint8 (N, L), and `vocabulary`: (L,) of the labels' own
    type; and of each row `path` and `row`, or its `id` where rows were joined by it. Failed rows are left
    out. Predictions should be of a model that did not see these rows.

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
    place, name = file_place(output_uri, outside=pairs.predictions)
    pairs.plan.require_scores(pairs.predictions)
    vocabulary = pairs.plan.vocabulary

    def arrays_of(pair: Pair, ids: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        truth, labeled = pair
        scores, valid = score_matrix(labeled["scores"], len(vocabulary))
        found = {"pred_probs": scores, "targets": vocabulary.encode(truth), **ids}
        return {name: array[valid] for name, array in found.items()}

    def read(paths: Sequence[str]) -> list[tuple[str, dict[str, np.ndarray]]]:
        files = {file.path: file for file in pairs.files}
        rows = {path: np.arange(files[path].num_rows) for path in paths}
        return [
            (path, arrays_of(pairs.of_file(files[path]), {"path": np.full(len(row), path), "row": row}))
            for path, row in rows.items()
        ]

    if pairs.by_position:
        shares = spread(read, [file.path for file in pairs.files])
        parts = [
            arrays for _, arrays in sorted((part for share in shares for part in share), key=itemgetter(0))
        ]
    else:
        truth, labeled = pairs.joined()
        ids = np.array(labeled[output_name(pairs.rows.columns.id)].cast(pa.string()).to_pylist(), str)
        parts = [arrays_of((truth, labeled), {"id": ids})]
    archive: dict[str, Any] = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    file = io.BytesIO()
    np.savez_compressed(file, vocabulary=np.array(vocabulary.labels), **archive)
    place.publish(name, file.getvalue())
    return len(archive["targets"])


def _finished(predictions_uri: str) -> tuple[Folder, Plan]:
    earlier, plan = Earlier.find(predictions_uri, "--predictions")
    return earlier.folder, plan
