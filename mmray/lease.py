"""A lease on an output, so that two jobs do not work on it at once.

It spares work and confusion; that nothing is lost or doubled does not rest on it, but on the names and the
atomic publishing of `mmray.shards`.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import time
import uuid
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any, Self

from mmray.errors import OutputError
from mmray.storage import Folder

log = logging.getLogger(__name__)

LEASE = "_mmray/lease.json"
RENEWAL_S = 10.0
PATIENCE_S = 30.0
SETTLING_S = 2.0
GIVING_BACK_S = 5.0


class Lease:
    """Held while a job works on an output, and renewed by a thread.

    Usage::

        with Lease(output) as lease:
            ...
            lease.check()
    """

    def __init__(self, output: Folder, renewal_s: float = RENEWAL_S, patience_s: float = PATIENCE_S) -> None:
        """Set how often the lease is renewed, and after how long one that is not counts as left behind."""
        self.output, self.renewal_s, self.patience_s = output, renewal_s, patience_s
        self.record: dict[str, Any] = {"owner": uuid.uuid4().hex, **this_process(), "renewed": 0}
        self._lost, self._done = Event(), Event()
        self._thread = Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Self:
        """Take the lease.

        Raises:
            OutputError: another job holds it.
        """
        while not (found := self.output.read_json(LEASE)):
            if self.output.create(LEASE, self._content()):
                break
            time.sleep(0.1)  # another job was quicker
        if found:
            if not is_dead(found):
                self._wait_for(found)
            self.output.publish(LEASE, self._content())
            time.sleep(SETTLING_S)  # another job may be taking it over too: the last one to write has it
        if not self._is_mine():
            raise self._refusal(self.output.read_json(LEASE) or {})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Give the lease back, unless storage takes too long: it runs out by itself."""
        self._done.set()
        self._thread.join(GIVING_BACK_S)

    def check(self) -> None:
        """Make sure that the lease is still held.

        Raises:
            OutputError: another job has taken it over, since it was not renewed for long.
        """
        if self._lost.is_set():
            raise self._refusal(self.output.read_json(LEASE) or {})

    def _wait_for(self, found: dict[str, Any]) -> None:
        """Wait until a lease counts as left behind."""
        where, who = self._told(found)
        log.info("%s has a lease of %s: waiting %.0f s for a sign of life", where, who, self.patience_s)
        deadline = time.monotonic() + self.patience_s
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self.patience_s / 10))
            now = self.output.read_json(LEASE)
            if now is None:
                return
            if now != found:
                raise self._refusal(now)

    def _renew(self) -> None:
        while not self._done.wait(self.renewal_s):
            with suppress(Exception):  # storage that fails for a while is not the end
                holder = self.output.read_json(LEASE)
                if holder and holder["owner"] != self.record["owner"]:
                    self._lost.set()
                    return
                self.record["renewed"] += 1
                self.output.publish(LEASE, self._content())
        with suppress(Exception):
            if self._is_mine():
                self.output.remove([LEASE])

    def _is_mine(self) -> bool:
        record = self.output.read_json(LEASE)
        return bool(record and record["owner"] == self.record["owner"])

    def _content(self) -> bytes:
        return json.dumps(self.record).encode()

    def _refusal(self, holder: dict[str, Any]) -> OutputError:
        where, who = self._told(holder)
        return OutputError(f"{where} is being labeled by {who}; wait for it, or label to another --output")

    def _told(self, holder: dict[str, Any]) -> tuple[str, str]:
        return str(self.output), f"process {holder.get('pid')} on {holder.get('host')}"


def this_process() -> dict[str, Any]:
    """Say which process this is, so that others on the same machine can tell whether it still runs."""
    return {"host": platform.node(), "machine": _machine(), "pid": os.getpid()}


def is_dead(process: dict[str, Any]) -> bool:
    """Tell whether a process ran on this machine and is gone; False where that cannot be known."""
    if (process["host"], process["machine"]) != (platform.node(), _machine()):
        return False
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _machine() -> str:
    """Name this boot of this machine, and the namespace that its process ids are of."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""
