"""Errors on their way between processes, as text; and what no text may hold: credentials, the endpoint."""

import pickle

import pytest

from mmray.errors import (
    BudgetError,
    BundleError,
    DataError,
    MmrayError,
    find_error,
    from_json,
    redact,
    to_json,
)
from mmray.schema import Status
from mmray.uris import UnfetchedError

SECRET = "wJalrXUtnFEMI/K7MDENG"


@pytest.mark.parametrize(
    "text",
    [
        f"Authorization: AWS4-HMAC-SHA256 Credential={SECRET}/20261123/us-east-1, Signature={SECRET}",
        f"GET http://127.0.0.1/a?X-Amz-Credential={SECRET}&X-Amz-Signature={SECRET}&list-type=2",
        f"{{'X-Amz-Security-Token': b'{SECRET}', \"AWSAccessKeyId\": \"{SECRET}\"}}",
        f"https://user:{SECRET.replace('/', '')}@store/bucket",
        f"aws_secret_access_key = {SECRET}\naws_session_token={SECRET}",
        f"secret_key='{SECRET}'",
    ],
)
def test_what_is_named_as_a_secret_is_taken_out(text):
    assert SECRET not in redact(text) and SECRET.replace("/", "") not in redact(text)


@pytest.mark.parametrize("key", ["AKIAIOSFODNN7EXAMPLE", "ASIAIOSFODNN7EXAMPLE"])
def test_key_ids_are_known_by_their_form(key):
    assert redact(f"no such key {key}.") == "no such key <redacted>."


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID"])
def test_what_the_environment_holds_is_taken_out_wherever_it_stands(name, monkeypatch):
    monkeypatch.setenv(name, SECRET)
    assert redact(f"before{SECRET}after") == f"before<{name}>after"


def test_a_short_secret_is_taken_out_as_a_word_and_leaves_others_whole(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    assert redact("the latest 'test' fails") == "the latest '<AWS_ACCESS_KEY_ID>' fails"


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_the_endpoint_is_taken_out_as_url_and_as_host(name, monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setenv(name, "https://store.internal:9000")
    text = redact('cannot reach "https://store.internal:9000/bucket" at store.internal:9000')
    assert "internal" not in text and "/bucket" in text


def test_what_is_no_secret_stays():
    text = "s3://bucket/user@host/year=1: 3 of 40 rows (signature of a function), token ids: 7"
    assert redact(text) == text


@pytest.mark.parametrize("kind", [MmrayError, DataError, BundleError, BudgetError])
def test_a_users_error_comes_out_as_it_went_in(kind):
    error = from_json(to_json(kind("row 7: é is none of a, b")))
    assert type(error) is kind
    assert str(error) == "row 7: é is none of a, b"


def test_any_other_error_keeps_its_kind_and_its_text_in_one_line():
    error = from_json(to_json(ConnectionResetError(104, "reset\nby peer")))
    assert type(error) is RuntimeError
    assert str(error) == "ConnectionResetError: [Errno 104] reset by peer"


def test_a_text_is_one_line_that_no_terminal_obeys_whatever_a_file_is_called():
    error = DataError("/rows/a\n\x1b[2J\udce9 \u202eé%20.parquet: no column 'x'")
    assert str(error) == r"/rows/a\n\x1b[2J\udce9 \u202eé%20.parquet: no column 'x'"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(from_json(to_json(error))) == str(error)


def test_what_ray_data_puts_behind_a_text_is_cut_off_on_the_way_to_the_user():
    error = UnfetchedError("a\nb", Status.NO_IMAGE)
    error.args = (f"{error.args[0]}\nTo change retry attempts, configure",)
    came = pickle.loads(pickle.dumps(error))
    assert came.status is Status.NO_IMAGE
    wrapped = RuntimeError("a task failed")
    wrapped.__cause__ = came
    assert str(find_error(wrapped)) == r"a\nb"
