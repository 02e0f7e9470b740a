"""The contract of a row: labels to targets and back, kept scores, output columns, image columns."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmray.columns import image_bytes, require_columns, require_kinds
from mmray.errors import ConfigError, DataError
from mmray.schema import (
    PREDICTION_COLUMNS,
    KeptScores,
    Vocabulary,
    output_schema,
    passthrough_names,
    prediction_fields,
)

light = settings(deadline=None, max_examples=100)

LABEL_SETS = st.sets(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=8) | st.sets(
    st.text(st.characters(codec="utf-8"), max_size=4), min_size=1, max_size=8
)

DIGITS = Vocabulary((1, 2, 3))
WORDS = Vocabulary(("bird", "cat", "dog"))
SCORES = np.array([[0.1, 0.9, 0.5], [0.7, 0.2, 0.7], [0.0, 0.0, 0.0]], np.float32)
VALID = np.array([True, True, False])


@light
@given(st.data())
def test_labels_survive_the_way_to_targets_and_back(data):
    labels = data.draw(LABEL_SETS)
    vocabulary = Vocabulary.of(labels)
    row = st.none() | st.lists(st.sampled_from(sorted(labels)), max_size=5)
    rows = data.draw(st.lists(row, max_size=6))
    column = pa.array(rows, pa.list_(vocabulary.arrow_type))
    targets = vocabulary.encode(column)
    assert targets.shape == (len(rows), len(labels)) and targets.dtype == np.uint8
    decoded = vocabulary.decode(targets.astype(bool), np.ones(len(rows), bool))
    assert decoded.type == pa.list_(vocabulary.arrow_type)
    assert decoded.to_pylist() == [sorted(set(row or [])) for row in rows]


@light
@given(st.data())
def test_class_order_never_depends_on_reading_order(data):
    labels = sorted(data.draw(LABEL_SETS))
    met = data.draw(st.permutations(labels + labels))
    assert Vocabulary.of(met).labels == Vocabulary.of(iter(labels)).labels == tuple(labels)


def test_slices_and_chunks_encode_as_the_whole_does():
    rows = pa.array([[3], [1, 2], None, [], [2]])
    whole = DIGITS.encode(rows)
    assert (DIGITS.encode(rows.slice(1, 3)) == whole[1:4]).all()
    assert (DIGITS.encode(pa.chunked_array([rows[:2], rows[2:]])) == whole).all()


def test_list_types_of_other_widths_encode_alike():
    for kind in (pa.list_(pa.int16()), pa.large_list(pa.int64())):
        assert DIGITS.encode(pa.array([[1, 3], None], kind)).tolist() == [[1, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize(
    ("vocabulary", "rows", "named"),
    [
        (DIGITS, pa.array([[1], [2, 90]]), "90"),
        (DIGITS, pa.array([["whale"]]), "whale"),
        (DIGITS, pa.array([[1, None]]), "null"),
        (DIGITS, pa.array([1, 2]), "int64"),
        (WORDS, pa.array([["cat", "whale"]]), "whale"),
        (WORDS, pa.array([[7]]), "7"),
        (WORDS, pa.array([[b"caf\xe9"]]).view(pa.list_(pa.string())), "caf\ufffd"),
    ],
)
def test_a_label_outside_the_vocabulary_is_refused_by_name(vocabulary, rows, named):
    with pytest.raises(DataError, match=named):
        vocabulary.encode(rows)


@pytest.mark.parametrize("labels", [(1, "1"), (), (2, 1), (1, 1), ("b", "a")])
def test_what_is_no_sorted_set_of_one_type_is_no_vocabulary(labels):
    with pytest.raises(DataError):
        Vocabulary(labels)


def test_integers_and_strings_are_never_mixed():
    with pytest.raises(DataError, match="mix integers and strings"):
        Vocabulary.of([1, "1"])


def test_rows_that_are_not_valid_decode_to_null():
    decided = np.ones((3, 3), bool)
    assert WORDS.decode(decided, VALID).to_pylist() == [["bird", "cat", "dog"]] * 2 + [None]
    assert WORDS.decode(np.zeros((0, 3), bool), np.zeros(0, bool)).to_pylist() == []


def test_all_scores_are_kept_in_vocabulary_order():
    kept = KeptScores.parse("all")
    array = kept.array(SCORES, VALID, WORDS)
    assert array.type == kept.field(WORDS).type == pa.list_(pa.float32(), 3)
    assert array.to_pylist() == [*SCORES[:2].tolist(), None]


@pytest.mark.parametrize("vocabulary", [DIGITS, WORDS])
def test_top_scores_are_kept_highest_first_and_ties_in_vocabulary_order(vocabulary):
    kept = KeptScores.parse("top-2")
    array = kept.array(SCORES, VALID, vocabulary)
    assert array.type == kept.field(vocabulary).type
    found = [row and [(entry["label"], entry["score"]) for entry in row] for row in array.to_pylist()]
    first, second, third = vocabulary.labels
    expected = [[(second, 0.9), (third, 0.5)], [(first, 0.7), (third, 0.7)]]
    assert found[:2] == [[(label, pytest.approx(score)) for label, score in row] for row in expected]
    assert found[2] is None


def test_more_top_scores_than_labels_are_all_of_them():
    assert len(KeptScores(9).array(SCORES, VALID, WORDS)[0]) == 3


def test_no_scores_leave_no_column():
    assert KeptScores.parse("none").field(WORDS) is None
    names = [field.name for field in prediction_fields(WORDS, KeptScores.parse("none"))]
    assert names == [name for name in PREDICTION_COLUMNS if name != "scores"]


@pytest.mark.parametrize("text", ["", "ALL", "top", "top-", "top-0", "top--1", "top-five", "top-²", "5"])
def test_other_words_for_scores_are_refused_by_name(text):
    with pytest.raises(ConfigError, match="--scores") as caught:
        KeptScores.parse(text)
    assert repr(text) in str(caught.value)


def test_output_holds_every_input_column_but_the_image_and_then_the_predictions():
    fields = [("image_id", "string"), ("image", "binary"), ("views", "int32")]
    schema = pa.schema([pa.field(name, pa.type_for_alias(kind), nullable=False) for name, kind in fields])
    output = output_schema(schema, "image", prediction_fields(DIGITS, KeptScores()))
    assert output.names == ["image_id", "views", *PREDICTION_COLUMNS]
    assert output.field("views").type == pa.int32() and output.field("views").nullable
    assert output.field("predicted_labels").type == pa.list_(pa.int64())


def test_an_input_column_named_as_a_prediction_moves_aside():
    schema = pa.schema([("scores", pa.int8()), ("model", pa.string()), ("caption", pa.string())])
    assert passthrough_names(schema, "image") == {
        "scores": "input_scores",
        "model": "input_model",
        "caption": "caption",
    }
    output = output_schema(schema, "image", prediction_fields(DIGITS, KeptScores()))
    assert output.field("input_scores").type == pa.int8()
    assert len(set(output.names)) == len(output.names)


def test_a_column_that_has_no_place_to_move_to_is_refused():
    with pytest.raises(DataError, match=r"'scores' and 'input_scores' would share the name .*; rename one"):
        passthrough_names(pa.schema([("scores", pa.int8()), ("input_scores", pa.int8())]), "image")


def test_a_missing_column_is_named_with_its_option_and_what_there_is_instead():
    with pytest.raises(DataError, match=r"rows\.parquet.*'image'.*jpg, txt.*--image-column"):
        require_columns(
            pa.schema([("jpg", pa.binary()), ("txt", pa.string())]),
            {"--image-column": "image"},
            "rows.parquet",
        )


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_images_are_taken_from_binary_columns(kind):
    images = [b"one", None, b""]
    column = pa.array(images, kind)
    assert image_bytes(column) == image_bytes(pa.chunked_array([column])) == images


def test_a_column_of_nothing_holds_no_images():
    assert image_bytes(pa.nulls(2)) == [None, None]


@pytest.mark.parametrize(
    ("image", "caption", "message"),
    [
        (pa.list_(pa.binary()), pa.string(), r"a\.parquet: column 'image': .* encoded bytes .*, not list"),
        (pa.struct([("bytes", pa.list_(pa.binary()))]), pa.string(), r"'image': .*, not list"),
        (pa.dictionary(pa.int32(), pa.binary()), pa.string(), r"'image': .*, not dictionary"),
        (pa.map_(pa.string(), pa.binary()), pa.string(), r"'image': .*, not map"),
        (pa.binary(), pa.list_(pa.string()), r"a\.parquet: column 'caption': .* holds text, not list"),
        (pa.binary(), pa.binary(), "'caption': .* holds text, not binary"),
        (pa.binary(), pa.int64(), "'caption': .* holds text, not int64"),
        (pa.binary(), pa.dictionary(pa.int32(), pa.int64()), "'caption': .* holds text, not dictionary"),
    ],
)
def test_a_column_of_a_type_that_cannot_be_used_is_named_with_its_file_and_type(image, caption, message):
    with pytest.raises(DataError, match=message):
        require_kinds(pa.schema([("image", image), ("caption", caption)]), "image", "caption", "a.parquet")


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string()), pa.null()]
)
def test_captions_may_be_text_of_any_layout_or_null_throughout(kind):
    require_kinds(pa.schema([("image", pa.null()), ("caption", kind)]), "image", "caption", "a.parquet")


def test_images_are_taken_from_the_hugging_face_layout():
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = pa.array([{"bytes": b"one", "path": "1.jpg"}, {"bytes": None, "path": "2.jpg"}, None], kind)
    assert image_bytes(column) == [b"one", None, None]
    assert image_bytes(column[1:]) == [None, None]


@pytest.mark.parametrize("column", [pa.array([1]), pa.array([[b"one"]]), pa.array([{"path": "1.jpg"}])])
def test_a_column_of_another_type_holds_no_images(column):
    with pytest.raises(DataError, match="encoded bytes"):
        image_bytes(column)


def test_labels_that_the_vocabulary_lacks_are_left_out_where_that_is_asked_for():
    rows = pa.chunked_array([pa.array([["a", "z"], None, ["b"], ["z"]])])
    assert Vocabulary(("a", "b")).encode(rows, others=True).tolist() == [[1, 0], [0, 0], [0, 1], [0, 0]]
    with pytest.raises(DataError, match="z"):
        Vocabulary(("a", "b")).encode(rows)
