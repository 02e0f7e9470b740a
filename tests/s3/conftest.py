"""A real S3 protocol over HTTP: moto's server, on the socket that tests/conftest.py settled beforehand."""

import socket
import threading
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def s3_server(s3_socket: socket.socket) -> Iterator[None]:
    """Serve S3 until the tests end; all it holds is in memory."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    application = DomainDispatcherApplication(create_backend_app)
    s3_socket.listen(128)
    host, port = s3_socket.getsockname()
    server = make_server(host, port, application, threaded=True, fd=s3_socket.fileno())
    thread = threading.Thread(target=server.serve_forever, name="s3", daemon=True)
    thread.start()
    yield
    server.shutdown()
    thread.join()


@pytest.fixture
def bucket(s3_server: None, request: pytest.FixtureRequest) -> str:
    """Give the URI of a new bucket."""
    import fsspec

    name = f"bucket-{abs(hash(request.node.nodeid)) % 10**10}"
    fsspec.filesystem("s3", use_listings_cache=False).mkdir(name)
    return f"s3://{name}"
