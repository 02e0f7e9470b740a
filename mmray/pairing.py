"""Predictions beside the labels that their rows bear: by position where they can be, else by id."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmray.columns import refuse_pickles, require_columns
from mmray.config import Columns
from mmray.damage import reading_labels
from mmray.datasets import Rows
from mmray.errors import DataError
from mmray.parquet import DataFile, read_footer, read_units
from mmray.plan import Plan
from mmray.schema import output_name
from mmray.storage import Folder

log = logging.getLogger(__name__)

Pair = tuple[pa.ChunkedArray, pa.Table]
"""B true lists of labels, null for none; B rows with `predicted_labels` and, if all were kept, `scores`."""


@dataclass(frozen=True)
class Pairs:
    """An output of `label_dataset`, and rows whose labels are known."""

    rows: Rows
    predictions: Folder
    plan: Plan

    @classmethod
    def find(cls, data_uri: str, predictions_uri: str, columns: Columns) -> Pairs:
        """Look both up.

        Raises:
            OutputError: the predictions are no output of label.py.
            DataError: the rows are unusable.
        """
        predictions = Folder(predictions_uri)
        plan = Plan.of_output(predictions)
        return cls(Rows.find(data_uri, columns, needs=["labels"]), predictions, plan)

    @property
    def files(self) -> list[DataFile]:
        """The labeled files that have rows."""
        return [file for file in self.plan.files if file.num_rows]

    @property
    def by_position(self) -> bool:
        """Whether the predictions were made of just these files: row i of one is row i of the other."""
        return {(file.path, file.footer_sha256) for file in self.files} == set(self.rows.identity())

    def of_file(self, file: DataFile) -> Pair:
        """Read the rows of one file, by position."""
        column = self.rows.columns.labels
        units = read_units(self.rows.folder, file, file.units, [column])
        return pa.concat_tables(table for _, _, table in units)[column], self._predictions(file.path)

    def joined(self) -> Pair:
        """Join all rows by id, in this process: ids, labels and scores must fit there.

        The predictions hold the ids too, as the output calls them.

        Raises:
            DataError: an id is null or stands twice, or nothing matches.
        """
        id_column, label_column = self.rows.columns.id, self.rows.columns.labels
        folder = self.rows.folder
        for file in self.rows.files:
            schema = read_footer(folder, file.path, file.size_bytes)[0].schema.to_arrow_schema()
            require_columns(schema, {"--id-column": id_column}, f"{folder}/{file.path}")
        truth = pa.concat_tables(
            table.rename_columns(["id", "truth"])
            for file in self.rows.files
            for _, _, table in read_units(folder, file, file.units, [id_column, label_column])
        )
        name = output_name(id_column)
        labeled = pa.concat_tables(self._predictions(file.path, name) for file in self.plan.files)
        for table, column, where in ((truth, "id", folder), (labeled, name, self.predictions)):
            _require_unique(table[column], column, str(where))
        index = pc.index_in(labeled[name].cast(truth["id"].type), value_set=truth["id"].combine_chunks())
        matched = index.is_valid()
        joined = pc.sum(matched).as_py() or 0
        if not joined:
            raise DataError(
                f"no id of {self.predictions} occurs in {folder}; is {id_column!r} the right --id-column?"
            )
        log.warning(
            "joined by %s: %d rows; %d predictions and %d labeled rows found no partner",
            id_column,
            joined,
            labeled.num_rows - joined,
            truth.num_rows - joined,
        )
        return truth["truth"].take(index.drop_null()), labeled.filter(matched)

    def _predictions(self, path: str, *more: str) -> pa.Table:
        columns = ["predicted_labels", *(["scores"] if self.plan.scored else []), *more]
        with reading_labels(f"{self.predictions}/{path}"):
            labeled = pq.read_table(pa.BufferReader(self.predictions.read(path)), columns=columns)
        refuse_pickles(labeled.schema, f"{self.predictions}/{path}")
        return labeled


def _require_unique(ids: pa.ChunkedArray, column: str, where: str) -> None:
    if ids.null_count:
        raise DataError(f"{where}: {ids.null_count} rows have no {column}; join by another --id-column")
    counts = pc.value_counts(ids)
    twice = counts.filter(pc.greater(pc.struct_field(counts, "counts"), 1))
    if len(twice):
        value = twice[0]["values"].as_py()
        raise DataError(f"{where}: {len(twice)} values of {column} stand more than once, such as {value!r}")
