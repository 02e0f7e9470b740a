"""A real S3 protocol over HTTP: a store, and a proxy before it that can spoil the way there.

The store is moto's server, or whatever `MMRAY_TEST_S3` names by host and port. Jobs and their workers know
the proxy alone, which listens on the socket that tests/conftest.py settled beforehand.
"""

import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from faulty_proxy import FaultyProxy

STORE = os.environ.get("MMRAY_TEST_S3")
if STORE:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        os.environ[name] = os.environ[f"MMRAY_TEST_{name}"]


@contextmanager
def moto() -> Iterator[str]:
    """Serve S3 from memory; gives host and port."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    application = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", 0, application, threaded=True)
    thread = threading.Thread(target=server.serve_forever, name="s3", daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


@contextmanager
def proxied(listener: socket.socket, store: str) -> Iterator[FaultyProxy]:
    """Put a proxy before a store."""
    proxy = FaultyProxy(listener, store)
    yield proxy
    proxy.close()


@pytest.fixture(scope="session")
def proxy(s3_socket: socket.socket) -> Iterator[FaultyProxy]:
    """Serve S3 until the tests end."""
    if STORE:
        with proxied(s3_socket, STORE) as proxy:
            yield proxy
    else:
        with moto() as store, proxied(s3_socket, store) as proxy:
            yield proxy


@pytest.fixture
def bucket(proxy: FaultyProxy, request: pytest.FixtureRequest) -> str:
    """Give the URI of a new bucket."""
    import fsspec

    name = f"bucket-{abs(hash(request.node.nodeid)) % 10**10}"
    fsspec.filesystem("s3", use_listings_cache=False).mkdir(name)
    return f"s3://{name}"


@pytest.fixture
def new_clients(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let folders connect anew, by what the environment and the storage module say in this test."""
    import s3fs

    from mmray import stores

    def forget() -> None:
        stores.open_filesystem.cache_clear()
        s3fs.S3FileSystem.clear_instance_cache()

    forget()
    yield
    forget()


@pytest.fixture
def impatient(new_clients: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up early on a store that keeps failing, and on an answer that does not come."""
    monkeypatch.setattr("mmray.stores.ATTEMPTS", 2)
    monkeypatch.setattr("mmray.stores.READ_TIMEOUT_S", 1)
