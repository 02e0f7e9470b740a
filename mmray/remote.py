"""A file in object storage, as Parquet's reader wants it: read and sought like a local one."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import Any


class RemoteFile(io.RawIOBase):
    """A file in a store, of known size: a ranged GET for each read."""

    def __init__(self, read_range: Callable[[int, int], bytes], size: int) -> None:
        """Take what reads the bytes from one place to another, and their number."""
        self._read_range, self._size, self._place = read_range, size, 0

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def seekable(self) -> bool:
        """Tell that it can be read at any place."""
        return True

    def tell(self) -> int:
        """Give the place of the next byte."""
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes into a buffer."""
        data = self._next(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        """Read what is left."""
        return self._next(self._size)

    def _next(self, num_bytes: int) -> bytes:
        start = min(self._place, self._size)
        end = min(start + num_bytes, self._size)
        data = self._read_range(start, end)
        self._place += len(data)
        return data
