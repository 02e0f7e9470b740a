"""Columns of an input: what they must be, and what they hold."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mmray.errors import DataError

FETCHED = pa.struct(
    [("bytes", pa.large_binary()), ("_mmray_status", pa.string()), ("_mmray_reason", pa.string())]
)
"""Images that were fetched; of those that cannot be had, what that makes of their rows, and why."""

PICKLES = "ray.data.arrow_pickled_object"
"""Name of Ray Data's Arrow type whose values are pickles."""


def require_columns(schema: pa.Schema, columns: dict[str, str], where: str) -> None:
    """Check that columns are there.

    Args:
        schema: of the file.
        columns: option -> column name, such as {"--image-column": "image"}.
        where: the file, for the message.

    Raises:
        DataError: a column is missing; says which option names it and what there is instead.
    """
    for option, name in columns.items():
        if name not in schema.names:
            raise DataError(
                f"{where}: no column {name!r}; there are {', '.join(schema.names) or 'none'}. "
                f"Name the right one with {option}"
            )


def refuse_pickles(schema: pa.Schema, where: str) -> None:
    """Refuse columns of Python objects, as Ray Data writes them: to look at a value would run its code.

    Raises:
        DataError: there is one; names the file and the column.
    """
    for field in schema:
        if _holds_pickles(field.type):
            raise DataError(
                f"{where}: column {field.name!r} holds pickled Python objects, which are never loaded; "
                "write the file without it"
            )


def _holds_pickles(kind: Any) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        return kind.extension_name == PICKLES or _holds_pickles(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return _holds_pickles(kind.value_type)
    return any(_holds_pickles(kind.field(index).type) for index in range(kind.num_fields))


def require_kinds(
    schema: pa.Schema, image_column: str, caption_column: str, where: str, *, fetchable: bool = False
) -> None:
    """Check that images are bytes, or URIs that may be fetched, and captions are text.

    Raises:
        DataError: they are not; names the file, the column and its type.
    """
    kind = schema.field(image_column).type
    if kind == FETCHED:
        raise DataError(
            f"{where}: column {image_column!r} has a type that is used here; drop all but its bytes"
        )
    if holds_uris(kind) and not fetchable:
        raise DataError(
            f"{where}: column {image_column!r} names images by URI, and none may be fetched; "
            "allow those below a place with --image-prefix, such as s3://bucket/images"
        )
    try:
        if not holds_uris(kind):
            image_bytes(pa.array([], kind))
    except DataError as error:
        raise DataError(f"{where}: column {image_column!r}: {error}") from None
    kind = schema.field(caption_column).type
    if not (_is_text(kind) or pa.types.is_null(kind)):
        raise DataError(f"{where}: column {caption_column!r}: a caption column holds text, not {kind}")


def holds_uris(kind: pa.DataType) -> bool:
    """Tell whether an image column of this type names images instead of holding them."""
    return _is_text(kind)


def _is_text(kind: Any) -> bool:
    text = kind.value_type if pa.types.is_dictionary(kind) else kind
    return text in (pa.string(), pa.large_string(), pa.string_view())


def image_bytes(column: pa.Array | pa.ChunkedArray) -> list[bytes | None]:
    """Take the encoded images out of a column.

    Args:
        column: binary, large_binary, or the Hugging Face layout struct<bytes, path>; B rows. Of a column
            that is null throughout, writers forget the type.

    Returns:
        B encoded images, None where there is none.

    Raises:
        DataError: any other type.
    """
    kind: Any = column.type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        column = pc.struct_field(column, "bytes")
        kind = column.type
    if kind not in (pa.binary(), pa.large_binary(), pa.binary_view(), pa.null()):
        raise DataError(f"an image column holds encoded bytes or struct<bytes, path>, not {kind}")
    images: list[bytes | None] = column.to_pylist()
    return images


def text_values(column: pa.Array | pa.ChunkedArray) -> list[str | None]:
    """Take the texts out of a column: captions, or URIs.

    What is not UTF-8 in them, which Parquet does not check, is read as U+FFFD, and a caption is labeled from
    the rest. Arrow itself would give out such a column as a whole or not at all.

    Args:
        column: strings of any layout, dictionaries of them, or null throughout; B rows.

    Returns:
        B texts, None where there is none.
    """
    texts: list[str | None]
    try:
        texts = column.to_pylist()
    except UnicodeDecodeError:
        values = column.cast(pa.large_binary()).to_pylist()
        texts = [value if value is None else value.decode("utf-8", "replace") for value in values]
    return texts
