"""Folders, local or in object storage: list, read, publish.

Publishing is atomic: a reader sees the whole new object or the old state, never a part. Locally that is a
temporary file and a rename, in object storage one PUT or a completed multipart upload. Credentials, region
and endpoint come from the environment (`AWS_ENDPOINT_URL`, profiles, instance roles) on whichever machine
opens the folder; a `Folder` holds and pickles its URI alone.

What is asked of a store, and what its errors become, stands in `mmray.stores`.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from mmray import disk, stores
from mmray.errors import ConfigError, DataError, StorageError
from mmray.faults import moment
from mmray.remote import RemoteFile

REMOVALS_AT_ONCE = 16


@dataclass(frozen=True)
class Folder:
    """A place for files, named by a local path or a URI such as `s3://bucket/prefix`.

    Paths that its methods take are relative to it, with `/` between parts.
    """

    uri: str

    def __post_init__(self) -> None:
        """Make a local path absolute, since workers have other working directories.

        Raises:
            ConfigError: the URI is empty, carries credentials, or lacks its bucket.
        """
        if not self.uri:
            raise ConfigError("an empty path or URI; give a folder such as ./out or s3://bucket/prefix")
        if "://" not in self.uri or self.uri.startswith("file://"):
            path = Path(self.uri.removeprefix("file://")).expanduser()
            object.__setattr__(self, "uri", str(path.absolute()))
            return
        parts = urlsplit(self.uri)
        if "@" in parts.netloc or (":" in parts.netloc and "@" in parts.path):  # a secret may hold a slash
            raise ConfigError("a URI with credentials in it; give them through the environment instead")
        if not parts.netloc:
            raise ConfigError(f"{self.uri!r} names no bucket; write {parts.scheme}://bucket/prefix")
        object.__setattr__(self, "uri", self.uri.rstrip("/"))

    def __truediv__(self, path: str) -> Folder:
        return Folder(f"{self.uri}/{path}")

    def __str__(self) -> str:
        return self.uri

    @property
    def is_local(self) -> bool:
        """Whether the folder is on a disk of this machine."""
        return "://" not in self.uri

    @property
    def filesystem(self) -> stores.FileSystem:
        """The fsspec file system that holds the folder."""
        return stores.open_filesystem("file" if self.is_local else self.uri.partition("://")[0])

    @property
    def root(self) -> str:
        """The folder's path in its file system."""
        return self.uri if self.is_local else self.uri.partition("://")[2]

    def path(self, relative: str) -> str:
        """Give a file's path in the file system.

        Raises:
            DataError: the path leads out of the folder.
        """
        parts = PurePosixPath(relative).parts
        if not parts or ".." in parts or parts[0] == "/":
            raise DataError(f"{relative!r} leads out of {self.uri}")
        return f"{self.root}/{relative}"

    def check(self) -> None:
        """Ask the store for the folder, before there is any work that could be lost.

        Raises:
            ConfigError: nothing that speaks its protocol answers at the endpoint; or, as elsewhere, the
                bucket or the credentials are missing, or access is denied.
        """
        if not self.is_local:
            with stores.translated(self.uri, first_contact=True):
                stores.ask_size(self.filesystem, self.root)

    def list(self, suffix: str = "") -> dict[str, int]:
        """List all files below, in sorted order: relative path -> size in bytes.

        Nothing is cached: what another process published is seen. A folder that does not exist is empty.
        """
        with stores.translated(self.uri):
            if self.is_local:
                found = dict(disk.walk(self.root))
            else:
                found = {path: info["size"] for path, info in self._find().items()}
        start = len(self.root) + 1
        return {
            path[start:]: size
            for path, size in sorted(found.items())
            if path.startswith(self.root + "/") and path.endswith(suffix)
        }

    def times(self) -> dict[str, float]:
        """Tell when files below were put in place, as far as a store does: relative path -> s since 1970."""
        with stores.translated(self.uri):
            if self.is_local:
                found = {path: Path(path).lstat().st_mtime for path, _ in disk.walk(self.root)}
            else:
                told = {path: stores.time_of(info) for path, info in self._find().items()}
                found = {path: time for path, time in told.items() if time is not None}
        return {path.removeprefix(f"{self.root}/"): time for path, time in found.items()}

    def _find(self) -> dict[str, dict[str, Any]]:
        """List a store's files by prefix: of an empty folder s3fs would ask HEAD."""
        bucket, _, prefix = self.root.partition("/")
        prefix = f"{prefix}/" if prefix else ""
        infos: dict[str, dict[str, Any]] = self.filesystem.find(bucket, prefix=prefix, detail=True)
        return infos

    def read(self, path: str) -> bytes:
        """Read a file: one request.

        Raises:
            FileNotFoundError: it does not exist.
        """
        with stores.translated(f"{self.uri}/{path}"):
            data: bytes = self.filesystem.cat_file(self.path(path))
        return data

    def read_range(self, path: str, start: int, end: int) -> bytes:
        """Read bytes from `start` up to `end`, which must be in the file: one request.

        Raises:
            FileNotFoundError: it does not exist.
            StorageError: it is shorter.
        """
        if start == end:
            return b""
        with stores.translated(f"{self.uri}/{path}"):
            data: bytes = self.filesystem.cat_file(self.path(path), start=start, end=end)
        if len(data) < end - start and not self.is_local:
            raise StorageError(f"{self.uri}/{path}: bytes {start} to {end} came back as {len(data)} bytes")
        return data

    def read_start(self, path: str, num_bytes: int) -> bytes:
        """Read the first bytes of a file, or all where it has no more: one request.

        Raises:
            FileNotFoundError: it does not exist.
        """
        with stores.translated(f"{self.uri}/{path}"):
            try:
                data: bytes = self.filesystem.cat_file(self.path(path), start=0, end=num_bytes)
            except Exception as error:
                if stores.error_code(error) != "InvalidRange":  # what an empty object answers
                    raise
                return b""
        return data

    def tail(self, path: str, size: int, num_bytes: int) -> bytes:
        """Read the last bytes of a file of known size: one request."""
        return self.read_range(path, max(0, size - num_bytes), size)

    def open(self, path: str, size: int | None = None) -> BinaryIO:
        """Open a file for reading at random places; a store is asked for its size unless it is given.

        Raises:
            FileNotFoundError: it does not exist; where its size is given, only when it is read.
        """
        target = self.path(path)
        if self.is_local:
            with stores.translated(f"{self.uri}/{path}"):
                return open(target, "rb")
        size = self._size(path) if size is None else size
        if size is None:
            raise FileNotFoundError(f"{self.uri}/{path}: no such file")
        return cast(BinaryIO, RemoteFile(functools.partial(self.read_range, path), size))

    def publish(self, path: str, data: bytes | Path) -> None:
        """Put a file in place at once, over what was there: the bytes, or a local file's."""
        target = self.path(path)
        moment("before publish", path)
        with stores.translated(f"{self.uri}/{path}"):
            if self.is_local:
                with disk.prepared(target, data) as temporary:
                    os.replace(temporary, target)
            else:
                stores.put(self.filesystem, target, data)
        moment("after publish", path)

    def create(self, path: str, data: bytes) -> bool:
        """Publish a file only if there is none; tell whether it is there by this call.

        Of several that try at once, one creates it: locally, and in a store that knows `If-None-Match`. A
        store that refuses this header, or does not heed it, is asked for the file just before: no more.

        Args:
            path: of the file.
            data: what tells this caller from others. A store that is asked again because its answer was lost
                finds the file there already, and whose it is can be told by its bytes alone.
        """
        target = self.path(path)
        moment("before publish", path)
        with stores.translated(f"{self.uri}/{path}"):
            if self.is_local:
                with disk.prepared(target, data) as temporary:
                    created = disk.link(temporary, target)
            else:
                created = self._size(path) is None and (
                    stores.put_new(self.filesystem, target, data) or self.read_or_none(path) == data
                )
        moment("after publish", path)
        return created

    def remove(self, paths: Iterable[str]) -> None:
        """Remove files; those that are gone already do not matter."""
        targets = {path: self.path(path) for path in paths}
        with stores.translated(self.uri):
            for path, target in targets.items():
                moment("before remove", path)
                if self.is_local:
                    Path(target).unlink(missing_ok=True)
                    disk.prune(Path(target).parent, Path(self.root))
            if targets and not self.is_local:
                # One by one: Swift refuses a DELETE of many without the MD5 that botocore no longer sends.
                with ThreadPoolExecutor(REMOVALS_AT_ONCE) as threads:
                    list(threads.map(functools.partial(stores.remove, self.filesystem), targets.values()))

    def _size(self, path: str) -> int | None:
        """Give a file's size in bytes, None where there is none."""
        with stores.translated(f"{self.uri}/{path}"):
            return stores.ask_size(self.filesystem, self.path(path))

    def arrow(self) -> tuple[Any, str]:
        """Give the folder as pyarrow and Ray Train take it: a pyarrow file system, and a path in it."""
        import pyarrow.fs

        if self.is_local:
            return pyarrow.fs.LocalFileSystem(), self.root
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(self.filesystem)), self.root

    def read_or_none(self, path: str) -> bytes | None:
        """Read a file; None when there is none."""
        try:
            return self.read(path)
        except FileNotFoundError:
            return None

    def read_json(self, path: str) -> Any:
        """Read a JSON file; None when there is none.

        Raises:
            DataError: it is not JSON.
        """
        data = self.read_or_none(path)
        try:
            return None if data is None else json.loads(data)
        except ValueError as error:
            raise DataError(f"{self.uri}/{path} is not JSON: {error}") from None

    def publish_json(self, path: str, record: Any) -> None:
        """Publish a record as JSON that a person can read."""
        self.publish(path, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())


def visible(path: str) -> bool:
    """Tell whether a relative path is data: no part of it begins with `_` or `.`, as in Hive and Spark."""
    return not any(part.startswith(("_", ".")) for part in path.split("/"))
