"""An HTTP proxy that writes down what is asked of a store, and spoils answers on demand."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

FAULTS = ("500", "503", "reset before", "reset after", "stall", "truncate")
"""What a store or the way to it may do to a request; "before" and "after" it has reached the store."""

ANSWERS = {
    "500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "503": (503, "SlowDown", "Please reduce your request rate."),
    "denied": (403, "AccessDenied", "Access Denied"),
    "expired": (400, "ExpiredToken", "The provided token has expired."),
    "no condition": (501, "NotImplemented", "A header you provided implies functionality not implemented."),
}
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "te", "trailer", "upgrade"}


class Request(NamedTuple):
    """What a client asked for."""

    method: str
    target: str
    """Path and query."""


Spoil = Callable[[Request, Message], str | None]


class FaultyProxy:
    """Listens on a socket, and passes on to an upstream what it does not spoil."""

    def __init__(self, listener: socket.socket, upstream: str) -> None:
        self.upstream = upstream
        self.requests: list[Request] = []
        self.num_faults = 0
        self.latency_s = 0.0
        """That every request waits, as on the way to a store that is far."""
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._spoil = self._nothing
        self._server = ThreadingHTTPServer(("", 0), _handler(self), bind_and_activate=False)
        self._server.daemon_threads = True
        self._server.socket.close()
        self._server.socket = listener
        self._server.server_address = listener.getsockname()
        listener.listen(128)
        threading.Thread(target=self._server.serve_forever, name="proxy", daemon=True).start()

    def close(self) -> None:
        self._done.set()
        self._server.shutdown()

    @contextmanager
    def faults(self, *script: str, method: str = "") -> Iterator[list[str]]:
        """Spoil the next requests, in the order of the script; gives what is left of it."""
        left = list(script)

        def spoil(request: Request, headers: Message) -> str | None:
            return left.pop(0) if left and request.method.startswith(method) else None

        with self.spoiling(spoil):
            yield left

    @contextmanager
    def each_once(self, fault: str) -> Iterator[None]:
        """Spoil each request the first time that it is made."""
        seen = set()

        def spoil(request: Request, headers: Message) -> str | None:
            known = request in seen
            seen.add(request)
            return None if known else fault

        with self.spoiling(spoil):
            yield

    @contextmanager
    def always(self, fault: str) -> Iterator[None]:
        """Spoil every request."""
        with self.spoiling(lambda request, headers: fault):
            yield

    @contextmanager
    def at_random(self, fraction: float, seed: int, kinds: tuple[str, ...]) -> Iterator[None]:
        """Spoil a fraction of the requests."""
        generator = random.Random(seed)
        with self.spoiling(
            lambda request, headers: generator.choice(kinds) if generator.random() < fraction else None
        ):
            yield

    @contextmanager
    def refusing_conditions(self) -> Iterator[None]:
        """Answer as a store does that knows no `If-None-Match`."""
        with self.spoiling(lambda request, headers: "no condition" if headers["If-None-Match"] else None):
            yield

    @contextmanager
    def spoiling(self, spoil: Spoil) -> Iterator[None]:
        """Spoil requests as a function says that sees them and their headers, one at a time."""
        self._spoil = spoil
        try:
            yield
        finally:
            self._spoil = self._nothing

    def _nothing(self, request: Request, headers: Message) -> None:
        return None

    def choose(self, request: Request, headers: Message) -> str | None:
        """Write a request down, and say what shall go wrong with it."""
        with self._lock:
            self.requests.append(request)
            fault = self._spoil(request, headers)
            self.num_faults += fault is not None
            return fault

    def stall(self) -> None:
        """Wait for longer than any client does."""
        self._done.wait(60)


def _handler(proxy: FaultyProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except OSError:  # the client has gone
                self.close_connection = True

        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            time.sleep(proxy.latency_s)
            fault = proxy.choose(Request(self.command, self.path), self.headers)
            if fault == "reset before":
                return self.reset()
            if fault in ANSWERS:
                return self.answer(*ANSWERS[fault])
            connection = HTTPConnection(proxy.upstream, timeout=60)
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in HOP_BY_HOP:
                    connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            content, headers = response.read(), response.getheaders()
            connection.close()
            if fault == "reset after" or (fault == "truncate" and not content):
                return self.reset()
            if fault == "stall":
                proxy.stall()
                self.close_connection = True
                return None
            return self.send(response.status, headers, content, truncated=fault == "truncate")

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = pass_on

        def send(
            self, status: int, headers: list[tuple[str, str]], content: bytes, *, truncated: bool = False
        ) -> None:
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in HOP_BY_HOP | {"content-length"}:
                    self.send_header(name, value)
            length = dict((name.lower(), value) for name, value in headers).get("content-length", "0")
            self.send_header("Content-Length", length if self.command == "HEAD" else str(len(content)))
            self.end_headers()
            if truncated:
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
            elif self.command != "HEAD":
                self.wfile.write(content)

        def answer(self, status: int, code: str, message: str) -> None:
            content = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
            self.send(status, [("Content-Type", "application/xml")], content.encode())

        def reset(self) -> None:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True

        def log_message(self, *arguments: object) -> None:
            pass

    return Handler
