"""Captions to token ids."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmray.captions import MAX_CHARACTERS, is_blank, load_tokenizer, tokenize, train_tokenizer
from mmray.columns import text_values
from mmray.errors import ConfigError

CAPTIONS = [
    "A dog runs over the green grass.",
    "Two dogs and a cat on the grass",
    "The cat sleeps on a red car, a bus waits.",
    "Ein Hund läuft über die Straße",
    "",
]

TOKENIZER = train_tokenizer(CAPTIONS * 3)


# What web archives have for captions, and what tokens a sound neighbour of theirs must keep.
HOSTILE = {
    "100 kB of words": "the dog " * 12_500,
    "100 kB in a word": "x" * 100_000,
    "100 kB of accents": "a" + "\u0301" * 100_000,
    "100 kB of Chinese": "\u4e2d" * 100_000,
    "zeros": "\0" * 100,
    "control characters": "".join(map(chr, range(32))) + "\x7f\x80\x9f\u2028\u202e\ufeff",
    "half a pair": "a dog \ud83d",
    "a pair in halves": "a dog \ud83e\udd93",
    "special tokens": "[PAD] [MASK] [SEP] a dog [CLS]",
    "no character": "\ufffe\uffff\U0010ffff",
}


def ids(captions, max_tokens=64, tokenizer=TOKENIZER):
    return tokenize(tokenizer, captions, max_tokens)[0].tolist()


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
    ],
    ids=str,
)
def test_bytes_that_are_not_utf8_are_replaced_and_the_other_captions_stay(kind):
    spoilt = [b"caf\xe9", b"\xff\xfe", b"cut \xe4\xb8", b"\xed\xa0\xbd half a pair"]
    column = pa.array([b"a dog", *spoilt, None, b"", "Stra\u00dfe \0".encode()], pa.binary())
    column = column.view(pa.string()).cast(kind)
    expected = ["caf\ufffd", "\ufffd\ufffd", "cut \ufffd", "\ufffd\ufffd\ufffd half a pair"]
    expected = ["a dog", *expected, None, "", "Stra\u00dfe \0"]
    assert text_values(column) == expected
    assert text_values(pa.chunked_array([column, column[:1]])) == [*expected, "a dog"]
    assert text_values(column[5:]) == expected[5:]


def test_a_column_of_nothing_holds_no_captions():
    assert text_values(pa.nulls(2)) == [None, None]


@pytest.mark.parametrize("caption", [None, "", " ", "\t\r\n", "\u00a0\u2003"])
def test_a_caption_of_nothing_or_white_space_is_blank(caption):
    assert is_blank(caption)


@pytest.mark.parametrize("caption", ["a", " . ", "0", "\u200bx"])
def test_a_caption_that_says_something_is_not_blank(caption):
    assert not is_blank(caption)


def test_a_saved_tokenizer_gives_the_same_ids(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    captions = [*CAPTIONS, None, "words nobody trained on: zebra 🦓"]
    for one, other in zip(tokenize(TOKENIZER, captions, 16), tokenize(loaded, captions, 16), strict=True):
        assert (one == other).all()


def test_captions_are_padded_to_the_longest_of_them():
    input_ids, mask = tokenize(TOKENIZER, ["a dog", "a dog on the grass", None], 64)
    assert input_ids.dtype == mask.dtype == np.int64
    lengths = mask.sum(1).tolist()
    assert lengths == [4, 7, 2] and input_ids.shape == mask.shape == (3, 7)
    assert ((input_ids == TOKENIZER.pad_token_id) == (mask == 0)).all()
    assert (mask == np.sort(mask)[:, ::-1]).all()  # padding stands at the end


def test_a_caption_is_cut_to_the_most_tokens_and_still_ends():
    (row,) = ids(["the dog " * 50], max_tokens=8)
    assert len(row) == 8
    assert (row[0], row[-1]) == (TOKENIZER.cls_token_id, TOKENIZER.sep_token_id)
    assert row[:-1] == ids(["the dog " * 50])[0][:7]


def test_a_caption_of_any_length_is_taken():
    assert ids(["x" * MAX_CHARACTERS * 100], 16) == ids(["x" * MAX_CHARACTERS], 16)


@pytest.mark.parametrize("caption", HOSTILE.values(), ids=HOSTILE)
def test_whatever_a_caption_holds_it_becomes_tokens_and_changes_no_neighbour(caption):
    input_ids, mask = tokenize(TOKENIZER, ["a dog", caption, None], 12)
    assert input_ids.shape == mask.shape and input_ids.shape[1] <= 12
    assert [row[kept].tolist() for row, kept in zip(input_ids, mask.astype(bool), strict=True)] == [
        *ids(["a dog"]),
        *ids([caption], 12),
        *ids([None]),
    ]
    assert (input_ids < len(TOKENIZER)).all()


def test_halves_of_a_pair_are_as_good_as_whole_and_cost_only_themselves():
    assert ids(["a \ud83d dog"]) == ids(["a \ufffd dog"])
    assert ids(["a \ud83e\udd93"]) == ids(["a \U0001f993"])


def test_words_behind_much_white_space_are_read():
    assert ids([" \n" * MAX_CHARACTERS + "a dog"]) == ids(["a dog"])


@pytest.mark.parametrize("caption", HOSTILE.values(), ids=HOSTILE)
def test_whatever_a_caption_holds_it_may_train_a_tokenizer(caption):
    tokenizer = train_tokenizer([*CAPTIONS, caption] * 2)
    assert ids(["a dog"], tokenizer=tokenizer)[0][1:-1] == [tokenizer.vocab["a"], tokenizer.vocab["dog"]]


def test_no_caption_is_an_empty_one():
    assert ids([None]) == ids([""]) == ids(["  "]) == [[TOKENIZER.cls_token_id, TOKENIZER.sep_token_id]]


def test_case_and_accents_do_not_matter():
    assert ids(["A DOG LÄUFT"]) == ids(["a dog lauft"])


def test_what_was_never_seen_is_unknown_and_not_an_error():
    assert TOKENIZER.unk_token_id in ids(["🦓"])[0]


def test_captions_that_say_nothing_still_train_a_tokenizer():
    tokenizer = train_tokenizer(["", " "])
    assert ids(["a dog"], tokenizer=tokenizer)[0][0] == tokenizer.cls_token_id


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.none() | st.text(st.characters(), max_size=40), min_size=1, max_size=5), st.integers(4, 32)
)
def test_neighbours_never_change_the_ids_of_a_caption(captions, max_tokens):
    input_ids, mask = tokenize(TOKENIZER, captions, max_tokens)
    assert input_ids.shape[1] == mask.sum(1).max() <= max_tokens
    for caption, row, kept in zip(captions, input_ids, mask.astype(bool), strict=True):
        assert row[kept].tolist() == ids([caption], max_tokens)[0]


def test_a_folder_without_a_tokenizer_is_refused_in_one_line(tmp_path):
    with pytest.raises(ConfigError, match="--text") as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_the_same_captions_in_any_order_give_the_same_vocabulary():
    words = ["red", "blue", "dog", "cat", "runs", "sleeps", "ground", "underground", "café"]
    captions = [f"a {one} {other} {number % 7}" for number, one in enumerate(words * 3) for other in words]
    vocabulary = train_tokenizer(captions).get_vocab()
    assert train_tokenizer(captions[::-1]).get_vocab() == vocabulary
    assert train_tokenizer(captions[::2] + captions[1::2]).get_vocab() == vocabulary
