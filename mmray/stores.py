"""Object stores through fsspec: the client, what is asked of it, and what its errors mean.

The only place that knows s3fs. Of a store no more is asked than LIST, GET, PUT, multipart uploads and DELETE:
no HEAD, which some answer wrongly where nothing is, and no `If-None-Match` that must be understood.

What goes wrong, in the words of `mmray.errors`:

- Requests that a store answers with 500, 503 or SlowDown, that time out or lose their connection are repeated
  after pauses that grow and are random. At last it is a `StorageError`, exit status 3: the infrastructure
  failed, the same command resumes. An endpoint that cannot be reached is one too, since it could before:
- `Folder.check`, which jobs call for each URI before anything else, tells a wrong endpoint: `ConfigError`.
- A missing bucket, a denied key and credentials that are missing or have expired are a `ConfigError` at any
  time: no repetition mends them, and schedulers repeat a job that ends with 3.

Their text names the URI, never the endpoint, and holds no credentials.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec

from mmray.errors import ConfigError, MmrayError, StorageError, one_line, redact

FileSystem = Any
"""An `fsspec.AbstractFileSystem`; fsspec declares no types."""

SHARED_VARIABLES = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"),
    *("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"),
    *("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION"),
)
"""What means the same on every machine, unlike paths of files and addresses of credential services."""

ATTEMPTS = 5
"""How often botocore makes a request; between them it waits up to 1, 2, 4 and 8 seconds, at random."""

ROUNDS = 2
"""How often s3fs makes a request that botocore gave up, and a read whose answer broke off."""

CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 30
"""Without a byte, that is, not for the whole answer."""

NO_CREDENTIALS = (
    *("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"),
    *("TokenRetrievalError", "SSOTokenLoadError", "UnauthorizedSSOTokenError"),
)
NO_CONDITIONS = ("NotImplemented", "InvalidRequest", "InvalidArgument")
"""What stores say that do not know `If-None-Match`."""


def shared_environment() -> dict[str, str]:
    """Give what other machines need in their environment to reach the same stores as this process.

    The profile in use is given by its keys, region and endpoint, since its file may be on this machine alone.
    A profile without keys (a role, single sign-on) is given by its name and must exist there too. Where
    nothing is set the machines use their own roles, which is better: then there is no secret to hand on.
    """
    import botocore.session

    variables = {name: value for name in SHARED_VARIABLES if (value := os.environ.get(name))}
    if "AWS_ACCESS_KEY_ID" in variables:
        return variables
    try:
        profile = botocore.session.Session().get_scoped_config()
    except botocore.exceptions.BotoCoreError:
        return variables  # the first request will say what is wrong with the profile
    keys = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
    names = {key: key.upper() for key in keys}
    names |= {"region": "AWS_DEFAULT_REGION", "endpoint_url": "AWS_ENDPOINT_URL"}
    if keys[0] in profile:
        variables.pop("AWS_PROFILE", None)
    return {names[key]: value for key, value in profile.items() if key in names} | variables


@contextmanager
def translated(uri: str, *, first_contact: bool = False) -> Iterator[None]:
    """Turn what a store says, or its client of the network, into one line that a person can act on."""
    try:
        yield
    except MmrayError:
        raise
    except Exception as error:
        if "://" in uri:
            raise _meaning(uri, error, first_contact) from None  # the client's own text names the endpoint
        if isinstance(error, PermissionError):
            raise ConfigError(f"{uri}: access denied; check the path and its owner") from None
        raise


def _meaning(uri: str, error: Exception, first_contact: bool) -> Exception:
    kind, response = type(error).__name__, _response(error)
    code = response.get("Error", {}).get("Code", "")
    reason = one_line(redact(f"{code} {error}"), 160) if code else kind
    if kind in NO_CREDENTIALS:
        return ConfigError(f"{uri}: no credentials found; set AWS_PROFILE or AWS_ACCESS_KEY_ID")
    if code in ("ExpiredToken", "TokenRefreshRequired"):
        return ConfigError(f"{uri}: the credentials have expired; with new ones the same command resumes")
    if isinstance(error, PermissionError):
        return ConfigError(f"{uri}: access denied; check the credentials and the path ({reason})")
    if code in ("NoSuchBucket", "InvalidBucketName") or kind == "ParamValidationError":
        return ConfigError(f"{uri}: there is no such bucket")
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{uri}: no such file")
    if first_contact and response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) < 500:
        return ConfigError(
            f"{uri}: no store answers as it should; check AWS_ENDPOINT_URL and AWS_REGION ({reason})"
        )
    return StorageError(f"{uri}: the store keeps failing ({reason}); the same command resumes")


def _response(error: BaseException) -> dict[str, Any]:
    """Give what a store answered, as botocore keeps it, below s3fs's error; empty if there was no answer."""
    return getattr(error, "response", None) or getattr(error.__cause__, "response", None) or {}


def error_code(error: BaseException) -> str:
    """Give the code of a store's answer, such as `NoSuchKey`; empty if there was none."""
    return str(_response(error).get("Error", {}).get("Code", ""))


@functools.cache
def open_filesystem(scheme: str) -> FileSystem:
    """Give the file system of a scheme, such as `file` or `s3`.

    Raises:
        ConfigError: fsspec knows none, or a package is missing for it.
    """
    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme == "s3":
        options["max_concurrency"] = (
            1  # or each read would begin with a HEAD, to see if it is worth splitting
        )
        options["config_kwargs"] = {
            "retries": {"mode": "standard", "total_max_attempts": ATTEMPTS},
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            "max_pool_connections": 64,
            # Stores other than AWS may refuse checksums in trailers. The signature covers the content anyway.
            "request_checksum_calculation": os.environ.get(
                "AWS_REQUEST_CHECKSUM_CALCULATION", "when_required"
            ),
        }
    try:
        filesystem = fsspec.filesystem(scheme, **options)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"storage {scheme}:// is not supported here: {error}") from None
    if scheme == "s3":
        filesystem.retries = ROUNDS
    return filesystem


def ask_size(filesystem: FileSystem, target: str) -> int | None:
    """Ask for a file's size in bytes by listing it: one request; None where there is none."""
    if not hasattr(filesystem, "call_s3"):
        try:
            return int(filesystem.info(target)["size"])
        except FileNotFoundError:
            return None
    # Keys are listed in their order, where a key comes before all others that begin with it.
    bucket, _, key = target.partition("/")
    answer = filesystem.call_s3("list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=1)
    if "IsTruncated" not in answer:
        raise OSError("the answer is no listing")  # but somebody's web page
    return next((int(found["Size"]) for found in answer.get("Contents", ()) if found["Key"] == key), None)


def time_of(info: dict[str, Any]) -> float | None:
    """Give the time, in seconds since 1970, that a store's list tells of a file; None where it tells none."""
    time: datetime | None = info.get("LastModified") or info.get("mtime")  # s3fs, and gcsfs
    return time.timestamp() if time else None


def remove(filesystem: FileSystem, target: str) -> None:
    """Remove a file, or find it gone."""
    try:
        filesystem.rm_file(target)
    except (FileNotFoundError, KeyError) as error:  # the latter from memory://
        if error_code(error) == "NoSuchBucket":
            raise


def put(filesystem: FileSystem, target: str, data: bytes | Path) -> None:
    """Write a file by one PUT or a multipart upload: the bytes, or a local file's."""

    def once() -> None:
        if isinstance(data, Path):
            filesystem.put_file(str(data), target)
        else:
            filesystem.pipe_file(target, data)

    try:
        once()
    except FileNotFoundError as error:
        if error_code(error) != "NoSuchUpload":
            raise
        once()  # the answer to the completion of an upload was lost; its repetition found nothing to complete


def put_new(filesystem: FileSystem, target: str, data: bytes) -> bool:
    """Write a file unless the store says that there is one; tell whether it was written."""
    try:
        filesystem.pipe_file(target, data, mode="create")
    except Exception as error:
        code = error_code(error)
        if isinstance(error, FileExistsError) or code in ("PreconditionFailed", "ConditionalRequestConflict"):
            return False
        if code not in NO_CONDITIONS:
            raise
        put(filesystem, target, data)
    return True
