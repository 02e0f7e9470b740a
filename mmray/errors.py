"""What can go wrong, as one tree.

    MmrayError                 every error that a user can act on; its text is one line: value, place, remedy
    ├── ConfigError            an option or recipe that cannot work
    ├── DataError              input that cannot be read or means nothing
    │   └── UnfetchedError     an image that its URI does not lead to: costs its row alone
    ├── BundleError            a bundle that is damaged, incomplete or of another version
    ├── StorageError           a store that keeps failing; the same command resumes
    ├── ClusterError           a cluster that is not there yet; the same command later
    └── OutputError            an output that belongs to another job
        └── BudgetError        more failed rows than the budget allows: the job ran and its result is bad

    SpoiltError                a process that can do no more work (HungError, DeviceError); another may

A job ends with the `exit_status` of the error that reached its edge (see `mmray.cli`).
"""

from __future__ import annotations

import json
import logging
import os
import re
from typing import Any
from urllib.parse import urlsplit


class MmrayError(Exception):
    """Base of all errors that a user can act on."""

    exit_status = 2

    def __init__(self, text: str = "") -> None:
        """Take the text; what a terminal obeys, such as a line break in a file's name, is escaped."""
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))

    def __reduce__(self) -> tuple[Any, ...]:
        """Be pickled as it is: `find_error` cuts off the lines that Ray Data puts behind the text."""
        return BaseException.__new__, (type(self), *self.args), self.__dict__


class ConfigError(MmrayError):
    """An option or a recipe that cannot work."""


class DataError(MmrayError):
    """Input that cannot be read, or whose values mean nothing here."""


class BundleError(MmrayError):
    """A bundle that is damaged, incomplete or of another schema version."""


class StorageError(MmrayError):
    """A store that keeps failing, after all retries.

    Not an `OSError`: readers of Parquet take that for damaged pages.
    """

    exit_status = 3


class ClusterError(MmrayError):
    """A cluster on which nothing can run yet."""

    exit_status = 3


class OutputError(MmrayError):
    """An output that belongs to another job."""


class BudgetError(OutputError):
    """More rows failed than `--max-failed-fraction` allows. The job ran, and its result is bad."""

    exit_status = 1


class SpoiltError(Exception):
    """This process can do no more work; another one may. Not a user's error."""


_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")
_ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
_SIGNED = re.compile(  # name=value and 'name': 'value', in URLs, headers and records
    r"""(?ix) (x-amz-[\w-]+ | signature | credential | authorization | aws_?access_?key_?id
    | secret_?(?:access_?)?key | session_?token) (['"]? \s* [=:] \s* b?['"]?) [^\s&,;'"<>]+"""
)
_KEY_ID = re.compile(r"\bA[KS]IA[A-Z0-9]{12,}\b")
_USER = re.compile(r"(?<=://)[^/@\s]+@")


def redact(text: str) -> str:
    """Take credentials, signatures and the endpoint out of a text, whoever wrote it."""
    for name in _SECRETS:
        if value := os.environ.get(name):
            # A short one, such as "test", would be found inside of words that have nothing to do with it.
            secret = re.escape(value) if len(value) >= 8 else rf"(?<!\w){re.escape(value)}(?!\w)"
            text = re.sub(secret, f"<{name}>", text)
    for name in _ENDPOINTS:
        value = os.environ.get(name, "")
        for part in filter(None, (value, urlsplit(value).netloc)):
            text = text.replace(part, f"<{name}>")
    return _USER.sub("", _KEY_ID.sub("<redacted>", _SIGNED.sub(r"\1\2<redacted>", text)))


class RedactingFormatter(logging.Formatter):
    """Writes log records without credentials, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        """Lay a record out."""
        return redact(super().format(record))


def one_line(text: object, limit: int | None = 300) -> str:
    """Write what is said in several lines as one, of so many characters at most."""
    return " ".join(str(text).split())[:limit]


def find_error(error: BaseException) -> MmrayError | None:
    """Find the user's error inside what Ray wrapped around it."""
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        candidate = queue.pop()
        if candidate is None or id(candidate) in seen:
            continue
        seen.add(id(candidate))
        if isinstance(candidate, MmrayError):
            # Ray's RayTaskError(X) is an X too, but its text is a traceback: go on to what it wraps.
            cause = getattr(candidate, "cause", None)
            if not isinstance(cause, MmrayError):
                candidate.args = (str(candidate).partition("\n")[0],)  # Ray Data appends advice of its own
                return candidate
        queue += [candidate.__cause__, candidate.__context__, getattr(candidate, "cause", None)]
        failures = getattr(candidate, "worker_failures", None)  # Ray Train keeps the workers' errors here
        queue += list(failures.values()) if isinstance(failures, dict) else []
    return None


def to_json(error: Exception) -> str:
    """Write an error as its kind and its text: one that Ray raises holds frames, actors and their CPUs."""
    return json.dumps({"kind": type(error).__name__, "message": one_line(error, None)})


def from_json(text: str) -> Exception:
    """Read what `to_json` wrote: a user's error as it was, any other as a RuntimeError naming its kind."""
    record = json.loads(text)
    kinds: list[type[MmrayError]] = [MmrayError]
    for kind in kinds:  # grows by the subclasses of what it has
        if kind.__name__ == record["kind"]:
            return kind(record["message"])
        kinds += kind.__subclasses__()
    return RuntimeError(f"{record['kind']}: {record['message']}")
