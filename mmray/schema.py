"""The contract of a row: column names, Arrow types, statuses, and the label vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmray.errors import ConfigError, DataError

Label = int | str

CANONICAL_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string()),
        pa.field("image", pa.binary()),
        pa.field("caption", pa.string()),
    ]
)
"""What `prepare` writes; `labels: list<int64 | string>` joins it when the rows are labeled."""


class Status(StrEnum):
    """How one row was labeled. `FAILED` alone has null labels and scores."""

    OK = "ok"
    NO_CAPTION = "no_caption"
    NO_IMAGE = "no_image"
    BAD_IMAGE = "bad_image"
    FAILED = "failed"


REJECTED = (Status.FAILED, Status.BAD_IMAGE)
"""Statuses that `_mmray/rejected/` lists: somebody should look at these rows."""

PREDICTION_COLUMNS = ("predicted_labels", "scores", "status", "error", "model")


@dataclass(frozen=True)
class Vocabulary:
    """All labels that a model knows, sorted; the position is the class index."""

    labels: tuple[Label, ...]

    def __post_init__(self) -> None:
        """Refuse what cannot be a vocabulary.

        Raises:
            DataError: no label, a label twice, or strings and integers mixed.
        """
        if not self.labels:
            raise DataError("no label occurs in the training data: a model needs at least one")
        if len({type(label) for label in self.labels}) > 1:
            raise DataError("labels mix integers and strings: make them all one type")
        if list(self.labels) != sorted(set(self.labels)):
            raise DataError(f"labels must be sorted and unique, not {list(self.labels)[:8]}…")

    @classmethod
    def of(cls, labels: Iterable[Label]) -> Vocabulary:
        """Make the vocabulary of the labels that occur: sorted, so that reading order never matters."""
        unique = set(labels)
        if len({type(label) for label in unique}) > 1:
            raise DataError("labels mix integers and strings: make them all one type")
        return cls(tuple(sorted(unique)))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def arrow_type(self) -> pa.DataType:
        """The type of one label in a table."""
        return pa.int64() if isinstance(self.labels[0], int) else pa.string()

    def encode(self, rows: pa.Array | pa.ChunkedArray, *, others: bool = False) -> np.ndarray:
        """Turn lists of labels into targets.

        Args:
            rows: list<label>, B rows; null and empty lists are rows without a label.
            others: leave labels out that are not in the vocabulary.

        Returns:
            targets: uint8 (B, L).

        Raises:
            DataError: a label that is not in the vocabulary, or no list of labels of its type.
        """
        if isinstance(rows, pa.ChunkedArray):
            rows = rows.combine_chunks()
        try:
            rows = rows.fill_null([])
            flat = pc.list_flatten(rows).cast(self.arrow_type)
        except pa.ArrowException as error:
            raise DataError(
                f"labels of type {rows.type} are no lists of {self.arrow_type}: {error}"
            ) from None
        index = pc.index_in(flat, value_set=pa.array(self.labels, self.arrow_type))
        if index.null_count and not others:
            # Shown by Arrow, which shows text that is not UTF-8 too.
            unknown = flat.filter(index.is_null()).unique()[:5].to_string(indent=0, skip_new_lines=True)
            raise DataError(f"labels {unknown} are not among the {len(self)} labels of the vocabulary")
        targets = np.zeros((len(rows), len(self)), np.uint8)
        row_of = np.repeat(np.arange(len(rows)), pc.list_value_length(rows).to_numpy())
        known = index.is_valid().to_numpy(zero_copy_only=False)
        targets[row_of[known], index.drop_null().to_numpy()] = 1
        return targets

    def decode(self, decided: np.ndarray, valid: np.ndarray) -> pa.ListArray:
        """Turn decisions into lists of labels.

        Args:
            decided: bool (B, L).
            valid: bool (B,); rows that are not valid become null.

        Returns:
            list<label>, B rows, each in vocabulary order.
        """
        rows, columns = np.nonzero(decided & valid[:, None])
        offsets = np.searchsorted(rows, np.arange(len(decided) + 1)).astype(np.int32)
        values = pa.array(self.labels, self.arrow_type).take(pa.array(columns))
        return pa.ListArray.from_arrays(pa.array(offsets), values, mask=pa.array(~valid))


@dataclass(frozen=True)
class KeptScores:
    """Which scores a labeled row keeps: all (`None`), the K highest, or none (0)."""

    top: int | None = None

    @classmethod
    def parse(cls, text: str) -> KeptScores:
        """Read `all`, `none` or `top-K`.

        Raises:
            ConfigError: anything else.
        """
        if text in ("all", "none"):
            return cls(None if text == "all" else 0)
        kind, _, number = text.partition("-")
        if kind != "top" or not number.isdecimal() or int(number) < 1:
            raise ConfigError(f"--scores {text!r} is neither 'all', 'none' nor 'top-K', such as 'top-5'")
        return cls(int(number))

    def field(self, vocabulary: Vocabulary) -> pa.Field | None:
        """Give the `scores` field of the output, or None when no scores are kept."""
        if self.top == 0:
            return None
        if self.top is None:
            return pa.field("scores", pa.list_(_element(pa.float32()), len(vocabulary)))
        entry = pa.struct([("label", vocabulary.arrow_type), ("score", pa.float32())])
        return pa.field("scores", pa.list_(_element(entry)))

    def array(self, scores: np.ndarray, valid: np.ndarray, vocabulary: Vocabulary) -> pa.Array:
        """Lay scores out as Arrow.

        Args:
            scores: float32 (B, L) in [0, 1].
            valid: bool (B,); rows that are not valid become null.
            vocabulary: the L labels.
        """
        mask = pa.array(~valid)
        if self.top is None:
            flat = pa.array(np.ascontiguousarray(scores, np.float32).ravel())
            return pa.FixedSizeListArray.from_arrays(flat, len(vocabulary), mask=mask)
        count = min(self.top or 0, len(vocabulary))
        best = np.argsort(-scores, axis=1, kind="stable")[:, :count]
        labels = pa.array(vocabulary.labels, vocabulary.arrow_type).take(pa.array(best.ravel()))
        kept = pa.array(np.take_along_axis(scores, best, axis=1).astype(np.float32).ravel())
        entries = pa.StructArray.from_arrays([labels, kept], ["label", "score"])
        offsets = pa.array(np.arange(len(scores) + 1, dtype=np.int32) * count)
        return pa.ListArray.from_arrays(offsets, entries, mask=mask)


def score_matrix(column: pa.ChunkedArray, num_labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Undo `KeptScores.array` where all scores were kept.

    Returns:
        scores: float32 (B, L), 0 where a row failed.
        valid: bool (B,), rows that did not fail.
    """
    lists = column.combine_chunks()
    valid = lists.is_valid().to_numpy(zero_copy_only=False)
    scores = np.zeros((len(lists), num_labels), np.float32)
    scores[valid] = lists.flatten().to_numpy().reshape(-1, num_labels)
    return scores, valid


def output_schema(input_schema: pa.Schema, image_column: str, predictions: Sequence[pa.Field]) -> pa.Schema:
    """Give the schema of a labeled file: every input column but the image, then the predictions.

    An input column that bears the name of a prediction becomes `input_<name>`. Passthrough fields are
    nullable, since a damaged row group leaves nothing to pass through.
    """
    names = passthrough_names(input_schema, image_column)
    kept = [input_schema.field(old).with_name(new).with_nullable(True) for old, new in names.items()]
    return pa.schema([*kept, *predictions])


def passthrough_names(input_schema: pa.Schema, image_column: str) -> dict[str, str]:
    """Map each input column that is passed through to its name in the output.

    Raises:
        DataError: the new name of a column is taken as well.
    """
    names = {name: output_name(name) for name in input_schema.names if name != image_column}
    for name, new in names.items():
        if new != name and new in names:
            raise DataError(
                f"columns {name!r} and {new!r} would share the name {new!r} in the output; rename one"
            )
    return names


def output_name(name: str) -> str:
    """Give the name that an input column bears in the output."""
    return f"input_{name}" if name in PREDICTION_COLUMNS else name


def prediction_fields(vocabulary: Vocabulary, kept: KeptScores) -> list[pa.Field]:
    """Give the columns that labeling adds, in order."""
    scores = kept.field(vocabulary)
    return [
        pa.field("predicted_labels", pa.list_(_element(vocabulary.arrow_type))),
        *([scores] if scores else []),
        pa.field("status", pa.string()),
        pa.field("error", pa.string()),
        pa.field("model", pa.string()),
    ]


def _element(kind: pa.DataType) -> pa.Field:
    """Call a list's elements what they are called once read back, so that joined files are as the others."""
    return pa.field("element", kind)
