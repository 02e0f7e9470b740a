"""Tables of input rows to tables of labeled rows. Without Ray."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from mmray.columns import text_values
from mmray.config import Columns
from mmray.decoded import DECODED, from_column
from mmray.decoding import Image, Row
from mmray.fetch import image_values
from mmray.labeler import Labeler
from mmray.rowgroups import DAMAGE
from mmray.schema import KeptScores, Status, output_schema, passthrough_names, prediction_fields


class TableLabeler:
    """Labels tables."""

    def __init__(
        self, labeler: Labeler, columns: Columns, kept: KeptScores, hidden: str | None = None
    ) -> None:
        """Take what labels, names of columns, the scores to keep, and which of image and caption to hide."""
        self.labeler, self.columns, self.kept, self.hidden = labeler, columns, kept, hidden
        self.fingerprint = labeler.bundle.fingerprint

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Replace the image column by the predictions; rows of a damaged row group have failed.

        Args:
            rows: as `read_units` gives them with `salvage`; images may be decoded already.
        """
        damage = rows[DAMAGE].to_pylist()
        rows = rows.drop_columns(DAMAGE)
        captions = text_values(rows[self.columns.caption])
        images: list[Image | Row] = [*self._images(rows[self.columns.image], captions)]
        if self.hidden == "image":
            images = [None] * len(images)
        if self.hidden == "caption":
            captions = [None] * len(captions)
        for row in (damaged := [row for row, reason in enumerate(damage) if reason]):
            images[row] = captions[row] = None
        labeled = self.labeler(images, captions)
        for row in damaged:
            labeled.statuses[row], labeled.errors[row] = Status.FAILED, damage[row]
        vocabulary, valid = self.labeler.bundle.vocabulary, labeled.valid
        fields = prediction_fields(vocabulary, self.kept)
        predictions = {
            "predicted_labels": vocabulary.decode(labeled.decided, valid),
            "status": pa.array([str(status) for status in labeled.statuses], pa.string()),
            "error": pa.array(labeled.errors, pa.string()),
            "model": pa.array([self.fingerprint] * rows.num_rows, pa.string()),
        }
        if self.kept.top != 0:
            predictions["scores"] = self.kept.array(labeled.scores, valid, vocabulary)
        passed = [rows[name] for name in passthrough_names(rows.schema, self.columns.image)]
        columns = [*passed, *(predictions[field.name] for field in fields)]
        return pa.Table.from_arrays(columns, schema=output_schema(rows.schema, self.columns.image, fields))

    def _images(self, column: pa.ChunkedArray, captions: list[str | None]) -> Sequence[Image | Row]:
        if column.type == DECODED:
            return from_column(column, captions, self.labeler.bundle.model_config.image_size)
        return image_values(column)
