"""Images that rows name by URI, fetched from where the user allowed it and from nowhere else.

From object storage they come through `mmray.storage`, with the environment's credentials; from web servers
without credentials, cookies or proxies. A redirect must lead to an allowed place too. A host's name is
resolved once, and the address that was checked is the one that is asked: no later answer of a name server
leads elsewhere.

What will not mend is the row's: `no_image` where there is none (404), `bad_image` where it is refused, too
large, or not allowed. What may mend is repeated after pauses that grow and are random, and at last it is a
`StorageError`: never written down as a bad row.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any
from urllib.parse import urljoin

import pyarrow as pa
import urllib3

from mmray.columns import holds_uris, image_bytes, text_values
from mmray.errors import DataError, StorageError
from mmray.schema import Status
from mmray.storage import Folder
from mmray.stores import ATTEMPTS, CONNECT_TIMEOUT_S, READ_TIMEOUT_S
from mmray.uris import Prefixes, UnfetchedError, Uri, find_address

MAX_IMAGE_BYTES = 32 << 20
"""Larger ones are refused: a shard of them must fit into memory."""

REDIRECTS = 5
TOTAL_TIMEOUT_S = 120.0
FETCHES_AT_ONCE = 16
PASSING = (408, 425, 429, 500, 502, 503, 504)
GONE = (HTTPStatus.NOT_FOUND, HTTPStatus.GONE)

_FETCHED = pa.struct([("bytes", pa.large_binary()), ("status", pa.string()), ("reason", pa.string())])


class Fetcher:
    """Fetches images from below some prefixes."""

    def __init__(self, prefixes: Prefixes) -> None:
        """Take what the user allowed."""
        self.prefixes = prefixes

    def __call__(self, uri: str) -> bytes:
        """Fetch an image.

        Raises:
            UnfetchedError: it cannot be had, neither now nor later.
            StorageError: its server keeps failing.
            ConfigError: a store refuses the credentials.
        """
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(random.uniform(0, 2.0 ** (attempt - 1)))
            try:
                return self._fetch(uri)
            except (urllib3.exceptions.HTTPError, OSError) as error:
                reason = str(error) if isinstance(error, OSError) else type(error).__name__
        raise StorageError(f"image URI {_shown(uri)} cannot be fetched ({reason}); the same command resumes")

    def fetch_column(self, uris: pa.ChunkedArray) -> pa.Array:
        """Fetch the images of a column of URIs.

        Returns:
            struct<bytes: large_binary, status: string, reason: string>; the latter two of an image that
            cannot be had. All three are null where there is no URI.
        """
        with ThreadPoolExecutor(FETCHES_AT_ONCE, "fetch") as threads:
            return pa.array(threads.map(self._entry, text_values(uris)), _FETCHED)

    def _entry(self, uri: str | None) -> dict[str, Any]:
        try:
            return {} if uri is None else {"bytes": self(uri)}
        except UnfetchedError as error:
            return {"status": str(error.status), "reason": str(error)}

    def _fetch(self, first: str) -> bytes:
        """Ask once, along redirects."""
        uri = first
        try:
            for _ in range(1 + REDIRECTS):
                allowed = self.prefixes.allowed(uri)
                answer = _read_object(allowed) if allowed.scheme == "s3" else _get(allowed)
                if isinstance(answer, bytes):
                    return answer
                uri = urljoin(uri, answer)
            raise UnfetchedError(f"is redirected more than {REDIRECTS} times")
        except UnfetchedError as error:
            way = _shown(first) if uri == first else f"{_shown(first)}, redirected to {_shown(uri)},"
            raise UnfetchedError(f"image URI {way} {error}", error.status) from None


def fetch_images(rows: pa.Table, image_column: str, prefixes: Sequence[str]) -> pa.Table:
    """Put images into a table in place of their URIs; a table that holds the images stays as it is."""
    index = rows.schema.get_field_index(image_column)
    if not holds_uris(rows.schema.field(index).type):
        return rows
    fetcher = Fetcher(Prefixes.parse(tuple(prefixes)))
    return rows.set_column(index, image_column, fetcher.fetch_column(rows[image_column]))


def image_values(column: pa.Array | pa.ChunkedArray) -> list[bytes | UnfetchedError | None]:
    """Take the encoded images out of a column; of one that was fetched also what could not be had.

    Raises:
        DataError: the column holds no images.
    """
    images: list[bytes | UnfetchedError | None] = [*image_bytes(column)]
    if column.type == _FETCHED:
        for row, entry in enumerate(column.to_pylist()):
            if entry["reason"] is not None:
                images[row] = UnfetchedError(entry["reason"], Status(entry["status"]))
    return images


def _get(uri: Uri) -> bytes | str:
    """Ask a web server for an image; gives it, or the place that the server names instead."""
    pool = _pool(uri.scheme, find_address(uri), uri.port, uri.host)
    target = (uri.path or "/") + (f"?{uri.query}" if uri.query else "")
    headers = {"Host": uri.netloc, "User-Agent": "mmray", "Accept-Encoding": "identity"}
    deadline = time.monotonic() + TOTAL_TIMEOUT_S
    with pool.urlopen("GET", target, headers=headers, redirect=False, preload_content=False) as response:
        if place := response.get_redirect_location():
            return place
        if response.status in PASSING:
            raise ConnectionError(f"status {response.status}")
        if response.status != HTTPStatus.OK:
            status = Status.NO_IMAGE if response.status in GONE else Status.BAD_IMAGE
            raise UnfetchedError(f"is answered with status {response.status}", status)
        data = bytearray()
        for part in response.stream(1 << 16, decode_content=False):
            data += part
            if time.monotonic() > deadline:
                raise TimeoutError(f"not whole after {TOTAL_TIMEOUT_S:.0f} s")
            if len(data) > MAX_IMAGE_BYTES:
                raise _too_large()
    return bytes(data)


@functools.lru_cache(maxsize=64)
def _pool(scheme: str, address: str, port: int, host: str) -> urllib3.HTTPConnectionPool:
    """Give the connections to an address, which must prove to be the host's where it speaks TLS."""
    settings: dict[str, Any] = {
        "timeout": urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=READ_TIMEOUT_S),
        "maxsize": FETCHES_AT_ONCE,
        "retries": False,
    }
    if scheme == "http":
        return urllib3.HTTPConnectionPool(address, port, **settings)
    return urllib3.HTTPSConnectionPool(address, port, server_hostname=host, assert_hostname=host, **settings)


def _read_object(uri: Uri) -> bytes:
    try:
        data = Folder(f"s3://{uri.host}").read_start(uri.path.removeprefix("/"), MAX_IMAGE_BYTES + 1)
    except FileNotFoundError:
        raise UnfetchedError("names an object that does not exist", Status.NO_IMAGE) from None
    except DataError:
        raise UnfetchedError("has dots or slashes in its key that lead elsewhere") from None
    if len(data) > MAX_IMAGE_BYTES:
        raise _too_large()
    return data


def _too_large() -> UnfetchedError:
    return UnfetchedError(f"names more than {MAX_IMAGE_BYTES >> 20} MiB")


def _shown(text: str) -> str:
    try:
        return str(Uri.parse(text))
    except UnfetchedError:
        return repr(text.partition("?")[0][:80])
