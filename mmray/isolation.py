"""Decoding in a process of its own, so that a row that kills or hangs it costs itself alone.

Both sides speak over pipes: a JSON line with the sizes of what follows, then the bytes. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from contextlib import nullcontext
from typing import IO, Any

import numpy as np

from mmray.decoding import DECODE_TIMEOUT_S, Image, Row, decode_row
from mmray.schema import Status
from mmray.uris import UnfetchedError


class _GoneError(Exception):
    def __init__(self, how: str, *, hung: bool = False) -> None:
        super().__init__(how)
        self.hung = hung


class IsolatedDecoder:
    """Decodes rows in child processes, one for each thread; a row that kills or hangs its process has failed.

    A child is replaced when it is gone. It loads no torch, so it is small and there in half a second.
    """

    def __init__(self, timeout_s: float = DECODE_TIMEOUT_S) -> None:
        """Set how long a row may take."""
        self.timeout_s = timeout_s
        self.thread, self.alone = threading.local(), threading.Lock()

    def __call__(self, image: Image, caption: str | None, fusion: str, size_px: int) -> Row:
        """Decode a row, as `decode_row` does; the row that kills or hangs the process has failed.

        One that killed it is tried once more, one at a time: memory may have run short by another's fault.
        """
        if isinstance(image, UnfetchedError):  # nothing to decode
            return decode_row(image, caption, fusion, size_px)
        for again in (False, True):
            try:
                with self.alone if again else nullcontext():
                    return self._decode(image, caption, fusion, size_px)
            except _GoneError as error:
                reason = error
            if reason.hung:
                break
        return Row(None, None, Status.FAILED, f"decoding this row {reason}")

    def _decode(self, image: bytes | None, caption: str | None, fusion: str, size_px: int) -> Row:
        """Decode a row in a child.

        Raises:
            _GoneError: the child has ended.
        """
        child = self._running()
        assert child.stdin and child.stdout
        timer = threading.Timer(self.timeout_s, child.kill)
        timer.start()
        try:
            _send(child.stdin, {"fusion": fusion, "size_px": size_px}, image, _encoded(caption))
            record, pixels, kept = _receive(child.stdout)
        except (EOFError, BrokenPipeError):
            status = child.wait()
            if timer.is_alive():
                raise _GoneError(f"killed its process ({status})") from None
            raise _GoneError(f"took more than {self.timeout_s:.0f} s", hung=True) from None
        finally:
            timer.cancel()
        image_pixels = np.frombuffer(pixels, np.uint8).reshape(size_px, size_px, 3) if pixels else None
        return Row(image_pixels, _decoded(kept), Status(record["status"]), record["error"])

    def _running(self) -> subprocess.Popen[bytes]:
        child: subprocess.Popen[bytes] | None = getattr(self.thread, "child", None)
        if child is None or child.poll() is not None:
            child = self.thread.child = subprocess.Popen(
                [sys.executable, "-m", "mmray.isolation"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            )
            assert child.stdout
            _receive(child.stdout)  # it is up; only now the clock may run
        return child


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Decode what is asked for, until nobody asks."""
    _send(answers, {})
    while True:
        try:
            record, image, caption = _receive(requests)
        except EOFError:
            return
        row = decode_row(image, _decoded(caption), record["fusion"], record["size_px"])
        pixels = None if row.pixels is None else np.ascontiguousarray(row.pixels).tobytes()
        _send(answers, {"status": str(row.status), "error": row.error}, pixels, _encoded(row.caption))


def _send(pipe: IO[bytes], record: dict[str, Any], *parts: bytes | None) -> None:
    sizes = [None if part is None else len(part) for part in parts]
    pipe.write(json.dumps(record | {"sizes": sizes}).encode() + b"\n")
    for part in parts:
        pipe.write(part or b"")
    pipe.flush()


def _receive(pipe: IO[bytes]) -> tuple[Any, ...]:
    line = pipe.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    record = json.loads(line)
    parts = [None if size is None else pipe.read(size) for size in record["sizes"]]
    if any(part is not None and len(part) < size for part, size in zip(parts, record["sizes"], strict=True)):
        raise EOFError
    return record, *parts


def _encoded(text: str | None) -> bytes | None:
    return None if text is None else text.encode("utf-8", "surrogatepass")


def _decoded(data: bytes | None) -> str | None:
    return None if data is None else data.decode("utf-8", "surrogatepass")


if __name__ == "__main__":
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not end up between the answers
    serve(sys.stdin.buffer, channel)
