"""Folders on a store that fails, and on the way to it: what is repeated, what is told, and how."""

import os
import socket
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faulty_proxy import ANSWERS, FAULTS

from mmray.config import LabelConfig
from mmray.errors import ConfigError, StorageError
from mmray.labeling import label_dataset
from mmray.parquet import describe_files, find_files, read_units
from mmray.storage import Folder
from mmray.verify import verify_dataset

ROWS = os.urandom(50_000)


@pytest.fixture
def folder(bucket):
    folder = Folder(f"{bucket}/some/where")
    folder.publish("rows", ROWS)
    return folder


def created(folder):
    assert folder.create("new", b"mine")
    return folder.read("new")


def reading(folder):
    with folder.open("rows") as file:
        file.seek(-10, os.SEEK_END)
        return file.read()


def published(folder):
    folder.publish("rows", ROWS[::-1])
    return folder.read("rows")


def removed(folder):
    folder.remove(["rows", "never/there"])
    return folder.list()


USES = {
    "check": (Folder.check, None),
    "list": (Folder.list, {"rows": 50_000}),
    "read": (lambda folder: folder.read("rows"), ROWS),
    "tail": (lambda folder: folder.tail("rows", 50_000, 10), ROWS[-10:]),
    "open": (reading, ROWS[-10:]),
    "read_or_none": (lambda folder: folder.read_or_none("nothing"), None),
    "publish": (published, ROWS[::-1]),
    "create": (created, b"mine"),
    "remove": (removed, {}),
}


@pytest.fixture
def folders(bucket):
    """Give a folder for each use."""
    folders = {use: Folder(f"{bucket}/{use}") for use in USES}
    for folder in folders.values():
        folder.publish("rows", ROWS)
    return folders


@pytest.mark.parametrize("fault", FAULTS)
def test_whichever_request_fails_is_repeated_and_the_result_is_right(folders, proxy, impatient, fault):
    del proxy.requests[:]
    with proxy.each_once(fault), ThreadPoolExecutor(len(USES)) as callers:
        results = callers.map(lambda use: USES[use][0](folders[use]), USES)
        assert dict(zip(USES, results, strict=True)) == {use: result for use, (_, result) in USES.items()}
    assert min(Counter(proxy.requests).values()) > 1


def test_no_use_of_a_folder_asks_head(folders, proxy):
    del proxy.requests[:]
    for use, (act, result) in USES.items():
        assert act(folders[use]) == result
    assert {request.method for request in proxy.requests} == {"GET", "PUT", "DELETE"}


def test_a_missing_file_costs_one_get(folder, proxy):
    del proxy.requests[:]
    with pytest.raises(FileNotFoundError, match="/some/where/nothing: no such file"):
        folder.read("nothing")
    (request,) = proxy.requests
    assert request.method == "GET" and request.target.split("?")[0].endswith("/some/where/nothing")
    with pytest.raises(FileNotFoundError, match="nothing"):
        folder.open("nothing")


def test_a_file_of_a_store_reads_like_one_on_disk(folder, tmp_path):
    (tmp_path / "rows").write_bytes(ROWS)
    with folder.open("rows") as remote, open(tmp_path / "rows", "rb") as local:
        for file in (remote, local):
            file.seek(49_990)
        assert remote.read(100) == local.read(100) and remote.read(1) == local.read(1) == b""
        assert remote.seek(-5, os.SEEK_CUR) == local.seek(-5, os.SEEK_CUR)
        assert remote.read() == local.read()
        assert remote.seek(60_000) == local.seek(60_000) and remote.read() == local.read() == b""
    folder.publish("empty", b"")
    with folder.open("empty") as file:
        assert file.read() == b"" == folder.tail("empty", 0, 10) == folder.read("empty")


def test_an_upload_in_parts_survives_faults_in_each_of_its_steps(folder, proxy, tmp_path):
    large = tmp_path / "large"
    large.write_bytes(ROWS * 2_200)  # past 100 MB s3fs uploads in parts
    with proxy.faults("500", "reset after", method="P") as left:  # of the start, and of a part
        folder.publish("large", large)
    assert left == []
    assert folder.list() == {"large": 110_000_000, "rows": 50_000}
    assert folder.tail("large", 110_000_000, 50_000) == ROWS


def test_an_upload_whose_completion_was_answered_to_nobody_is_there(folder, proxy, tmp_path):
    large = tmp_path / "large"
    large.write_bytes(ROWS * 2_200)
    completions = []

    def lost(request, headers):
        if request.method == "POST" and "uploadId=" in request.target:
            completions.append(request)
            return "reset after" if len(completions) == 1 else None
        return None

    with proxy.spoiling(lost):
        folder.publish("large", large)
    assert len(completions) > 1
    assert folder.list() == {"large": 110_000_000, "rows": 50_000}


def create_at_once(folder, num_callers):
    with ThreadPoolExecutor(num_callers) as callers:
        return list(callers.map(lambda caller: folder.create("lease", b"%d" % caller), range(num_callers)))


def test_of_many_that_create_a_file_one_does(folder, proxy):
    if not conditional(folder, proxy):
        pytest.skip("this store knows no If-None-Match")
    made = create_at_once(folder, 8)
    assert made.count(True) == 1
    assert folder.read("lease") == b"%d" % made.index(True)


def conditional(folder, proxy):
    """Tell whether the store heeds If-None-Match, from whether it was asked to do without."""
    del proxy.requests[:]
    folder.create("asked", b"1")
    return [request.method for request in proxy.requests].count("PUT") == 1


def test_a_file_is_created_once_where_the_store_knows_no_conditions(folder, proxy):
    with proxy.refusing_conditions():
        assert folder.create("lease", b"first")
        assert not folder.create("lease", b"second")
    assert folder.read("lease") == b"first"


def test_a_creation_that_was_answered_to_nobody_is_still_the_callers(folder, proxy):
    with proxy.faults("reset after", method="PUT") as left:
        assert folder.create("lease", b"mine")
    assert left == []
    assert not folder.create("lease", b"yours") and folder.read("lease") == b"mine"


@pytest.mark.parametrize(
    ("use", "fault"),
    [("list", "503"), ("publish", "reset before"), ("open", "500"), ("list", "stall"), ("read", "truncate")],
)
def test_a_store_that_keeps_failing_is_the_infrastructures_fault(folder, proxy, impatient, use, fault):
    with proxy.always(fault), pytest.raises(StorageError) as caught:
        USES[use][0](folder)
    assert caught.value.exit_status == 3
    assert told(caught.value, folder).endswith("; the same command resumes")


def told(error, folder):
    """Give an error's text, which is one line that names the place and nothing that is secret."""
    text = str(error)
    assert len(text.splitlines()) == 1 and folder.uri in text
    port = os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2]
    secrets = [os.environ[f"AWS_{name}"] for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")]
    assert not [secret for secret in [*secrets, port] if secret in text], text
    assert error.__suppress_context__  # which Ray would write into its logs
    return text


@pytest.mark.parametrize(("fault", "said"), [("denied", "access denied"), ("expired", "have expired")])
@pytest.mark.parametrize("use", ["check", "list", "read", "open", "publish", "create", "remove"])
def test_what_no_repetition_mends_is_the_users_at_any_time(folder, proxy, use, fault, said):
    with proxy.always(fault), pytest.raises(ConfigError, match=said) as caught:
        USES[use][0](folder)
    told(caught.value, folder)


def test_what_a_store_says_is_told_without_secrets(folder, proxy, monkeypatch):
    secrets = ["AKIAIOSFODNN7EXAMPLE", "c2lnbmF0dXJl", os.environ["AWS_SECRET_ACCESS_KEY"]]
    said = "Denied\nto {}, X-Amz-Signature={}, {}".format(*secrets)
    monkeypatch.setitem(ANSWERS, "denied", (403, "AccessDenied", said))
    with proxy.always("denied"), pytest.raises(ConfigError) as caught:
        folder.read("rows")
    text = told(caught.value, folder)
    assert "Denied to" in text and not [secret for secret in secrets if secret in text]


def test_a_missing_bucket_is_told_by_every_use(proxy):
    folder = Folder("s3://no-such-bucket-anywhere/rows")
    for act, _ in USES.values():
        with pytest.raises(ConfigError, match="there is no such bucket") as caught:
            act(folder)
        told(caught.value, folder)


@pytest.fixture
def endpoint(new_clients, monkeypatch):
    """Give `set(URL)`: from now on this is the endpoint."""
    return lambda url: monkeypatch.setenv("AWS_ENDPOINT_URL", url)


@pytest.fixture
def closed_port():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield unused.getsockname()[1]


def test_an_endpoint_that_cannot_be_reached_is_the_users_at_first_and_then_not(
    endpoint, impatient, closed_port
):
    endpoint(f"http://127.0.0.1:{closed_port}")
    folder = Folder("s3://bucket/rows")
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL") as caught:
        folder.check()
    told(caught.value, folder)
    with pytest.raises(StorageError) as caught:
        folder.list()
    told(caught.value, folder)


@pytest.mark.parametrize(("status", "page"), [(404, b"<html>Not here</html>"), (200, b"<html>Hello</html>")])
def test_an_endpoint_that_is_no_store_is_the_users(endpoint, impatient, status, page):
    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint(f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL"):
            Folder("s3://bucket/rows").check()
        server.shutdown()


@pytest.mark.parametrize("url", ["not a url", "localhost:9000", "https://127.0.0.1:{port}"])
def test_an_endpoint_that_is_none_is_the_users(endpoint, impatient, proxy, url):
    endpoint(url.format(port=os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2]))
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL"):
        Folder("s3://bucket/rows").check()


def test_missing_credentials_are_the_users(endpoint, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    for act in (Folder.check, Folder.list):
        with pytest.raises(ConfigError, match="no credentials found"):
            act(Folder("s3://bucket/rows"))
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(ConfigError, match="no credentials found"):
        Folder("s3://bucket/other").list()


def test_a_store_that_fails_under_a_parquet_reader_does_not_look_like_a_damaged_file(
    folder, proxy, impatient, tmp_path
):
    pq.write_table(pa.table({"image": [ROWS] * 4}), tmp_path / "a.parquet", row_group_size=1)
    folder.publish("a.parquet", tmp_path / "a.parquet")
    source, files = find_files(folder.uri)
    ((file, _),) = describe_files(source, files, "image")
    shards = read_units(source, file, file.units)
    next(shards)
    with proxy.always("503"), pytest.raises(StorageError):
        list(read_units(source, file, file.units))
    with proxy.faults("truncate", "503") as left:
        assert sum(rows.num_rows for _, _, rows in read_units(source, file, file.units)) == 4
    assert left == []


@pytest.mark.usefixtures("cluster")
def test_a_job_whose_every_tenth_request_fails_ends_verified(bucket, proxy, bundle_uri, draw_rows, tmp_path):
    for index in range(4):
        pq.write_table(draw_rows(60, index), tmp_path / "rows.parquet", row_group_size=20)
        Folder(f"{bucket}/rows").publish(f"part={index}/rows.parquet", tmp_path / "rows.parquet")
    before, num_requests = proxy.num_faults, len(proxy.requests)
    passing = tuple(set(FAULTS) - {"stall"})  # which would take half a minute each time
    with proxy.at_random(0.1, seed=0, kinds=passing):
        result = label_dataset(f"{bucket}/rows", bundle_uri, f"{bucket}/labeled", config=LabelConfig())
        assert result.counts == {"ok": 240}
        assert verify_dataset(f"{bucket}/rows", f"{bucket}/labeled").problems == []
    assert proxy.num_faults - before >= 3
    assert not [request for request in proxy.requests[num_requests:] if request.method == "HEAD"]
