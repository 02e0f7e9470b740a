"""Folders, local or in object storage: list, read, publish. The only place that knows s3fs.

Publishing is atomic: a reader sees the whole new object or the old state, never a part. Locally that is a
temporary file and a rename, in object storage one PUT or a completed multipart upload. Credentials, region
and endpoint come from the environment (`AWS_ENDPOINT_URL`, profiles, instance roles) on whichever machine
opens the folder; a `Folder` holds and pickles its URI alone.
"""

from __future__ import annotations

import functools
import glob
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import fsspec

from mmray.errors import ConfigError, DataError
from mmray.faults import moment

LIST_PAGE = 1000
"""Keys that one LIST request of S3 returns."""


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
    def filesystem(self) -> fsspec.AbstractFileSystem:
        """The fsspec file system that holds the folder."""
        return _filesystem("file" if self.is_local else self.uri.partition("://")[0])

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

    def list(self, suffix: str = "") -> dict[str, int]:
        """List all files below, in sorted order: relative path -> size in bytes.

        Nothing is cached: what another process published is seen. A folder that does not exist is empty.
        """
        with translated(self.uri):
            if self.is_local:
                found = self.filesystem.find(self.root, detail=True)
            else:  # by prefix: of an empty folder s3fs would ask HEAD, which some stores answer wrongly
                bucket, _, prefix = self.root.partition("/")
                found = self.filesystem.find(bucket, prefix=f"{prefix}/" if prefix else "", detail=True)
        start = len(self.root) + 1
        return {
            path[start:]: info["size"]
            for path, info in sorted(found.items())
            if path.startswith(self.root + "/") and path.endswith(suffix)
        }

    def read(self, path: str) -> bytes:
        """Read a file.

        Raises:
            FileNotFoundError: it does not exist.
        """
        with translated(self.uri):
            data: bytes = self.filesystem.cat_file(self.path(path))
        return data

    def tail(self, path: str, size: int, num_bytes: int) -> bytes:
        """Read the last bytes of a file of known size: one request."""
        with translated(self.uri):
            start = max(0, size - num_bytes)
            data: bytes = self.filesystem.cat_file(self.path(path), start=start, end=size)
        return data

    def open(self, path: str) -> BinaryIO:
        """Open a file for reading at random places."""
        with translated(self.uri):
            if self.is_local:
                return open(self.path(path), "rb")
            file: BinaryIO = self.filesystem.open(self.path(path), "rb", cache_type="none")
            return file

    def publish(self, path: str, data: bytes | Path) -> None:
        """Put a file in place at once, over what was there: the bytes, or a local file's."""
        target = self.path(path)
        moment("before publish", path)
        with translated(self.uri):
            if self.is_local:
                _publish_locally(target, data)
            elif isinstance(data, Path):
                self.filesystem.put_file(str(data), target)
            else:
                self.filesystem.pipe_file(target, data)
        moment("after publish", path)

    def create(self, path: str, data: bytes) -> bool:
        """Publish a file where there is none; tells whether there was none."""
        if self.read_or_none(path) is not None:
            return False
        self.publish(path, data)
        return True

    def remove(self, paths: Iterable[str]) -> None:
        """Remove files; those that are gone already do not matter."""
        targets = {path: self.path(path) for path in paths}
        with translated(self.uri):
            for path, target in targets.items():
                moment("before remove", path)
                if self.is_local:
                    Path(target).unlink(missing_ok=True)
                    _prune(Path(target).parent, Path(self.root))
            if targets and not self.is_local:
                with suppress(FileNotFoundError):
                    self.filesystem.rm([glob.escape(target) for target in targets.values()])  # takes patterns

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


@contextmanager
def translated(uri: str) -> Iterator[None]:
    """Turn what a store says of a wrong bucket, key or endpoint into one line that a person can act on."""
    try:
        yield
    except PermissionError as error:
        raise ConfigError(
            f"{uri}: access denied; check the credentials and the path ({_brief(error)})"
        ) from None
    except Exception as error:
        kind = type(error).__name__
        if kind in (
            "NoCredentialsError",
            "PartialCredentialsError",
            "ProfileNotFound",
            "TokenRetrievalError",
        ):
            raise ConfigError(f"{uri}: no credentials found; set AWS_PROFILE or AWS_ACCESS_KEY_ID") from None
        if kind in ("EndpointConnectionError", "ConnectTimeoutError"):
            raise ConfigError(
                f"{uri}: the storage endpoint cannot be reached; check AWS_ENDPOINT_URL"
            ) from None
        if "NoSuchBucket" in str(error) or "bucket does not exist" in str(error):
            raise ConfigError(f"{uri}: there is no such bucket") from None
        raise


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]


@functools.cache
def _filesystem(scheme: str) -> fsspec.AbstractFileSystem:
    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme == "s3":
        options["config_kwargs"] = {
            "retries": {"mode": "standard", "max_attempts": 8},
            "max_pool_connections": 64,
        }
    try:
        return fsspec.filesystem(scheme, **options)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"storage {scheme}:// is not supported here: {error}") from None


def _publish_locally(target: str, data: bytes | Path) -> None:
    folder, name = os.path.split(target)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with _create(temporary) as file:
            if isinstance(data, Path):
                with open(data, "rb") as source:
                    while part := source.read(1 << 20):
                        file.write(part)
            else:
                file.write(data)
            file.flush()
            os.fsync(file.fileno())  # or a power cut leaves an empty file under the final name
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _create(path: str) -> BinaryIO:
    """Create a file and its folders; again where somebody's `_prune` removes one of these in between."""
    folder = os.path.dirname(path)
    for _ in range(100):
        with suppress(FileNotFoundError, FileExistsError):
            os.makedirs(folder, exist_ok=True)
            return open(path, "wb")
    os.makedirs(folder, exist_ok=True)
    return open(path, "wb")


def _prune(folder: Path, root: Path) -> None:
    """Remove folders that have become empty, up to the root: object storage has no empty folders either."""
    while folder != root:
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent
