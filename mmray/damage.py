"""Labeled files that are gone or damaged, told as the user's."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from mmray.errors import MmrayError, OutputError, one_line


@contextmanager
def reading_labels(where: str) -> Iterator[None]:
    """Read a labeled file, whose bytes may be anything.

    Raises:
        OutputError: it is gone or damaged.
    """
    try:
        yield
    except MmrayError:
        raise
    except (pa.ArrowException, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
            raise  # the disk's, or the network's
        raise OutputError(f"{where} is gone or damaged ({one_line(error)}); verify.py says more") from None
