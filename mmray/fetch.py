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

import http.client
import random
import re
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http import HTTPStatus
from typing import Any
from urllib.parse import urljoin

import pyarrow as pa
import pyarrow.compute as pc
import urllib3
import urllib3.connection

from mmray.columns import FETCHED, holds_uris, image_bytes, text_values
from mmray.errors import ConfigError, DataError, MmrayError, StorageError
from mmray.schema import Status
from mmray.storage import Folder
from mmray.stores import ATTEMPTS, READ_TIMEOUT_S
from mmray.uris import Prefixes, UnfetchedError, Uri, find_address

MAX_IMAGE_BYTES = 32 << 20
"""Larger ones are refused: a shard of them must fit into memory."""

REDIRECTS = 5
TOTAL_TIMEOUT_S = 120.0
FETCHES_AT_ONCE = 16
PASSING = (408, 425, 429)
"""Statuses that may pass, beside all from 500 on."""

GONE = (HTTPStatus.NOT_FOUND, HTTPStatus.GONE)


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
            except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError) as error:
                reason = str(error) if isinstance(error, OSError) else type(error).__name__
        raise StorageError(f"image URI {_shown(uri)} cannot be fetched ({reason}); the same command resumes")

    def fetch_column(self, column: pa.ChunkedArray) -> pa.Array:
        """Fetch the images of a column of URIs.

        A server that keeps failing for one image while it gives others out is not down: it is that row's
        image which cannot be had. Where it gives out none, nothing is written down.

        Returns:
            `FETCHED`; all null where there is no URI.

        Raises:
            StorageError: a server keeps failing; or ConfigError: a store refuses the credentials.
        """
        uris = text_values(column)
        with ThreadPoolExecutor(FETCHES_AT_ONCE, "fetch") as threads:
            answers = list(zip(uris, threads.map(self._answer, uris), strict=True))
        serving = {_place(uri) for uri, answer in answers if isinstance(answer, bytes)}
        return pa.array([_entry(answer, _place(uri) in serving) for uri, answer in answers], FETCHED)

    def _answer(self, uri: str | None) -> bytes | MmrayError | None:
        try:
            return None if uri is None else self(uri)
        except (UnfetchedError, StorageError, ConfigError) as error:
            return error

    def _fetch(self, first: str) -> bytes:
        """Ask once, along redirects."""
        uri = first
        try:
            for _ in range(1 + REDIRECTS):
                allowed = self.prefixes.allowed(uri)
                answer = _read_object(allowed) if allowed.scheme == "s3" else _get(allowed)
                if isinstance(answer, bytes):
                    return answer
                try:
                    uri = urljoin(uri, answer)
                except ValueError:
                    raise UnfetchedError("is redirected to what is no URI") from None
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
    if column.type == FETCHED:
        told = (pc.struct_field(column, name).to_pylist() for name in ("_mmray_status", "_mmray_reason"))
        for row, (status, reason) in enumerate(zip(*told, strict=True)):
            if reason is not None:
                images[row] = UnfetchedError(reason, Status(status))
    return images


def _entry(answer: bytes | MmrayError | None, serves_others: bool) -> dict[str, Any]:
    if answer is None or isinstance(answer, bytes):
        return {"bytes": answer}
    if not (serves_others or isinstance(answer, UnfetchedError)):
        raise answer
    status = answer.status if isinstance(answer, UnfetchedError) else Status.BAD_IMAGE
    return {
        "_mmray_status": str(status),
        "_mmray_reason": str(answer).removesuffix("; the same command resumes"),
    }


def _place(uri: str | None) -> tuple[str, str, int] | None:
    """Give the server or bucket that is asked first."""
    try:
        return None if uri is None else Uri.parse(uri)[:3]
    except UnfetchedError:
        return None


def _get(uri: Uri) -> bytes | str:
    """Ask a web server for an image; gives it, or the place that the server names instead."""
    connection = _connect(uri, find_address(uri))
    # Timeouts of a socket end with each byte: only this ends an answer that trickles.
    deadline = time.monotonic() + TOTAL_TIMEOUT_S
    watchdog = threading.Timer(TOTAL_TIMEOUT_S, _shut, (connection,))
    watchdog.daemon = True
    watchdog.start()
    try:
        target = (uri.path or "/") + (f"?{uri.query}" if uri.query else "")
        headers = {"Host": uri.netloc, "User-Agent": "mmray", "Accept-Encoding": "identity"}
        connection.request("GET", target, headers=headers, preload_content=False)
        response = connection.getresponse()
        if place := response.get_redirect_location():
            return place
        if response.status in PASSING or response.status >= 500:
            raise ConnectionError(f"status {response.status}")
        if response.status != HTTPStatus.OK:
            status = Status.NO_IMAGE if response.status in GONE else Status.BAD_IMAGE
            raise UnfetchedError(f"is answered with status {response.status}", status)
        data = bytearray()
        for part in response.stream(1 << 16, decode_content=False):
            data += part
            if len(data) > MAX_IMAGE_BYTES:
                raise _too_large()
        if time.monotonic() > deadline:
            raise TimeoutError(f"not whole after {TOTAL_TIMEOUT_S:.0f} s")
        if not data and "Content-Length" not in response.headers:
            raise ConnectionError("the answer broke off")
        return bytes(data)
    finally:
        watchdog.cancel()
        connection.close()


def _connect(uri: Uri, address: str) -> urllib3.connection.HTTPConnection:
    """Make a connection to an address, which must prove to be the host's where it speaks TLS."""
    if uri.scheme == "http":
        return urllib3.connection.HTTPConnection(address, uri.port, timeout=READ_TIMEOUT_S)
    return urllib3.connection.HTTPSConnection(
        address, uri.port, timeout=READ_TIMEOUT_S, server_hostname=uri.host, assert_hostname=uri.host
    )


def _shut(connection: urllib3.connection.HTTPConnection) -> None:
    with suppress(OSError):
        if connection.sock is not None:
            connection.sock.shutdown(socket.SHUT_RDWR)


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
        return repr(re.sub(r"//[^/]*@", "//", text).partition("?")[0][:80])
