"""Errors on their way between processes, as text."""

import pytest

from mmray.errors import BudgetError, BundleError, DataError, MmrayError, from_json, to_json


@pytest.mark.parametrize("kind", [MmrayError, DataError, BundleError, BudgetError])
def test_a_users_error_comes_out_as_it_went_in(kind):
    error = from_json(to_json(kind("row 7: é is none of a, b")))
    assert type(error) is kind
    assert str(error) == "row 7: é is none of a, b"


def test_any_other_error_keeps_its_kind_and_its_text_in_one_line():
    error = from_json(to_json(ConnectionResetError(104, "reset\nby peer")))
    assert type(error) is RuntimeError
    assert str(error) == "ConnectionResetError: [Errno 104] reset by peer"
