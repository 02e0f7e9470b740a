"""Images fetched from a web server that redirects, fails, lies and trickles."""

import socket
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pytest

from mmray.errors import StorageError
from mmray.fetch import Fetcher, fetch_images, image_values
from mmray.schema import Status
from mmray.uris import Prefixes, UnfetchedError

IMAGE = b"an image"


class Site(BaseHTTPRequestHandler):
    """Answers as the path says, and remembers who asked for what."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.append((self.path, self.headers["Host"]))
        _, kind, *rest = self.path.split("/", 2)
        if kind == "image":
            self.answer(200, IMAGE)
        elif kind == "status":
            self.answer(int(rest[0]), b"no")
        elif kind == "redirect":
            self.answer(302, b"", Location=self.path.partition("?")[2])
        elif kind == "flaky":  # fails twice, then does not
            times = sum(path == self.path for path, _ in self.server.asked)
            self.answer(*((200, IMAGE) if times > 2 else (503, b"busy")))
        elif kind == "short":
            self.answer(200, IMAGE, **{"Content-Length": "100"})
            self.close_connection = True
        elif kind == "large":
            self.answer(200, bytes(2000))
        elif kind == "garbage":
            self.wfile.write(b"no HTTP at all\r\n\r\n")
            self.close_connection = True
        elif kind == "drip":
            head = b"HTTP/1.1 200 OK\r\n"
            self.drip({"body": head + b"\r\n" + bytes(200), "headers": head + b"x: " + b"y" * 200}[rest[0]])

    def answer(self, status, body, **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def drip(self, data):
        self.close_connection = True
        with suppress(OSError):
            for place in range(len(data)):
                self.wfile.write(data[place : place + 1])
                time.sleep(0.05)

    def log_message(self, *_):
        pass


def serve():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture
def site(monkeypatch):
    """Give a web site, whose failures are repeated without pauses."""
    monkeypatch.setattr("mmray.fetch.random.uniform", lambda low, high: low)
    server = serve()
    yield server
    server.shutdown()


def uri_of(server, path):
    return f"http://127.0.0.1:{server.server_port}{path}"


@pytest.fixture
def fetch(site):
    """Give a fetcher that may ask the site for all but what lies below /private."""
    places = ("image", "status", "redirect", "flaky", "short", "large", "garbage", "drip")
    return Fetcher(Prefixes.parse(tuple(uri_of(site, f"/{place}") for place in places)))


def test_an_image_is_fetched_from_the_host_that_its_uri_names(site, fetch):
    assert fetch(uri_of(site, "/image/a%20b.jpg?size=3")) == IMAGE
    assert site.asked == [("/image/a%20b.jpg?size=3", f"127.0.0.1:{site.server_port}")]


def test_a_name_is_looked_up_once_and_stands_in_the_request(site, monkeypatch):
    looked_up = []

    def resolve(host, port, *_, **__):
        looked_up.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port or 0))]

    monkeypatch.setattr("socket.getaddrinfo", resolve)
    uri = f"http://images.example:{site.server_port}/image/a.jpg"
    assert Fetcher(Prefixes.parse((uri,)))(uri) == IMAGE
    assert looked_up == ["images.example", "127.0.0.1"], (
        "the address that was checked is the one to connect to"
    )
    assert site.asked[0][1] == f"images.example:{site.server_port}"


@pytest.mark.parametrize(
    ("answer", "status"), [(404, Status.NO_IMAGE), (410, Status.NO_IMAGE), (403, Status.BAD_IMAGE)]
)
def test_what_will_not_mend_is_the_rows_at_once(site, fetch, answer, status):
    with pytest.raises(UnfetchedError, match=str(answer)) as raised:
        fetch(uri_of(site, f"/status/{answer}"))
    assert raised.value.status is status
    assert len(site.asked) == 1


def test_what_fails_in_passing_is_repeated(site, fetch):
    assert fetch(uri_of(site, "/flaky/a.jpg")) == IMAGE
    assert len(site.asked) == 3


@pytest.mark.parametrize(
    "path", ["/status/500", "/status/429", "/status/520", "/short/a.jpg", "/garbage/a.jpg"]
)
def test_a_server_that_keeps_failing_is_not_the_rows_fault(site, fetch, path):
    with pytest.raises(StorageError, match="cannot be fetched"):
        fetch(uri_of(site, path))
    assert len(site.asked) == 5


def test_a_server_that_is_not_there_is_not_the_rows_fault(site, fetch):
    site.shutdown()
    site.server_close()
    with pytest.raises(StorageError, match="cannot be fetched"):
        fetch(uri_of(site, "/image/a.jpg"))


def test_a_redirect_is_followed_where_it_leads_to_an_allowed_place(site, fetch):
    assert fetch(uri_of(site, f"/redirect/?{uri_of(site, '/image/a.jpg')}")) == IMAGE
    assert fetch(uri_of(site, "/redirect/?/image/a.jpg")) == IMAGE


@pytest.mark.parametrize(
    "place",
    [
        "http://169.254.169.254/latest/meta-data/",
        "file:///etc/passwd",
        "/private/a.jpg",
        "/image/../private/a.jpg",
        "//images.example/image/a.jpg",
        "http://[",
    ],
)
def test_a_redirect_that_leads_elsewhere_is_not_followed(site, fetch, place):
    with pytest.raises(UnfetchedError, match="redirected") as raised:
        fetch(uri_of(site, f"/redirect/?{place}"))
    assert raised.value.status is Status.BAD_IMAGE
    assert len(site.asked) == 1


def test_redirects_without_end_are_given_up(site, fetch):
    uri = uri_of(site, "/redirect/?" * 10 + "/image/a.jpg")
    with pytest.raises(UnfetchedError, match="redirected more than"):
        fetch(uri)


def test_an_image_above_the_limit_is_refused(site, fetch, monkeypatch):
    monkeypatch.setattr("mmray.fetch.MAX_IMAGE_BYTES", 1999)
    with pytest.raises(UnfetchedError, match="more than"):
        fetch(uri_of(site, "/large/a.jpg"))


@pytest.mark.parametrize("part", ["headers", "body"])
def test_an_answer_that_trickles_is_given_up(site, fetch, monkeypatch, part):
    """It goes on for ten seconds, and each byte must not count as a sign of life."""
    monkeypatch.setattr("mmray.fetch.TOTAL_TIMEOUT_S", 0.2)
    monkeypatch.setattr("mmray.fetch.ATTEMPTS", 1)
    started = time.monotonic()
    with pytest.raises(StorageError, match="cannot be fetched"):
        fetch(uri_of(site, f"/drip/{part}"))
    assert time.monotonic() - started < 8


def test_a_server_that_fails_for_one_image_alone_costs_that_row(site, monkeypatch):
    monkeypatch.setattr("mmray.fetch.ATTEMPTS", 2)
    column = pa.array([uri_of(site, "/status/500"), uri_of(site, "/image/a.jpg")])
    fetched = fetch_images(pa.table({"image": column}), "image", [uri_of(site, "/")])
    failed, image = image_values(fetched["image"])
    assert image == IMAGE
    assert failed.status is Status.BAD_IMAGE
    assert "status 500" in str(failed)


def test_a_server_that_gives_out_nothing_is_nobodys_fault(site, monkeypatch):
    monkeypatch.setattr("mmray.fetch.ATTEMPTS", 2)
    column = pa.array([uri_of(site, "/status/500"), uri_of(site, "/status/404"), None])
    with pytest.raises(StorageError, match="status 500"):
        fetch_images(pa.table({"image": column}), "image", [uri_of(site, "/")])


def test_a_column_of_uris_becomes_images_and_reasons_in_its_rows(site):
    uris = [uri_of(site, "/image/a.jpg"), None, uri_of(site, "/status/404"), "file:///etc/passwd"]
    rows = pa.table({"image": uris, "other": [1, 2, 3, 4]})
    fetched = fetch_images(rows, "image", [uri_of(site, "/")])
    first, second, third, fourth = image_values(fetched["image"])
    assert (first, second) == (IMAGE, None)
    assert (third.status, fourth.status) == (Status.NO_IMAGE, Status.BAD_IMAGE)
    assert fetched["other"] == rows["other"]


def test_a_column_of_images_stays_as_it_is():
    rows = pa.table({"image": [b"1", None]})
    assert fetch_images(rows, "image", []) is rows
    assert image_values(rows["image"]) == [b"1", None]
