"""Local folders: listing, atomic publishing, removal, and what may be a folder at all."""

import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmray.errors import ConfigError, DataError
from mmray.files import split_uri
from mmray.storage import Folder, visible
from mmray.stores import shared_environment

light = settings(deadline=None, max_examples=100)

NAMES = st.text(st.sampled_from("ab_.=[*? 0é"), min_size=1, max_size=4).filter(
    lambda name: name.strip(".") != ""
)
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)


@pytest.fixture
def folder(tmp_path):
    return Folder(str(tmp_path / "folder"))


def test_a_folder_that_does_not_exist_is_empty(folder):
    assert folder.list() == {} and folder.read_json("a.json") is None


def test_files_are_listed_below_in_sorted_order_with_their_sizes(folder):
    for path in ("b/2.parquet", "b/10.parquet", "a.parquet", "b/c/d=1/x.json", "é.parquet"):
        folder.publish(path, b"x" * len(path))
    assert list(folder.list().items()) == [
        ("a.parquet", 9),
        ("b/10.parquet", 12),
        ("b/2.parquet", 11),
        ("b/c/d=1/x.json", 14),
        ("é.parquet", 9),
    ]
    assert list(folder.list(".json")) == ["b/c/d=1/x.json"]
    assert list((folder / "b").list()) == ["10.parquet", "2.parquet", "c/d=1/x.json"]


def test_a_listing_shows_what_came_since_the_last(folder):
    folder.publish("a", b"1")
    assert folder.list() == {"a": 1}
    Folder(folder.uri).publish("b", b"22")
    folder.remove(["a"])
    assert folder.list() == {"b": 2}


def test_times_tell_when_files_were_put_in_place(folder):
    assert folder.times() == {}
    before = time.time()
    folder.publish("a/b", b"1")
    assert folder.times().keys() == {"a/b"}
    assert before - 1 < folder.times()["a/b"] < time.time() + 1


def test_links_to_files_are_listed_and_links_to_folders_are_not_followed(folder):
    folder.publish("a/b", b"22")
    root = Path(folder.uri)
    for name, target in {"file": "a/b", "gone": "nowhere", "folder": "a", "circle": "."}.items():
        (root / name).symlink_to(root / target)
    listed = folder.list()
    assert listed["file"] == 2 and listed["gone"] == 0
    assert not [path for path in listed if path.startswith(("folder/", "circle/"))]


def test_a_listing_leaves_out_folders_whose_names_begin_alike(folder):
    folder.publish("a", b"1")
    Folder(f"{folder.uri}-other").publish("b", b"1")
    assert list(folder.list()) == ["a"]


@light
@given(path=PATHS, data=st.binary(max_size=20))
def test_what_is_published_is_read_listed_and_removed_under_its_name(tmp_path_factory, path, data):
    folder = Folder(str(tmp_path_factory.mktemp("folder")))
    folder.publish(path, data)
    assert folder.read(path) == data
    assert folder.list() == {path: len(data)}
    with folder.open(path) as file:
        assert file.read() == data
    folder.remove([path])
    assert folder.list() == {}


def test_a_local_file_is_published_by_its_path(folder, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(os.urandom(3_000_000))
    folder.publish("deep/copy", source)
    assert folder.read("deep/copy") == source.read_bytes()


def test_a_reader_never_sees_a_part(folder):
    versions = [bytes([digit]) * 300_000 for digit in range(8)]
    folder.publish("file", versions[0])
    seen, done = [], threading.Event()

    def read():
        while not done.is_set():
            seen.append(folder.read("file"))

    reader = threading.Thread(target=read)
    reader.start()
    for version in versions * 5:
        folder.publish("file", version)
    done.set()
    reader.join()
    assert seen and set(seen) <= set(versions)


def test_a_failed_publish_leaves_the_old_file_and_no_other(folder, tmp_path):
    folder.publish("a/file", b"old")
    with pytest.raises(FileNotFoundError):
        folder.publish("a/file", tmp_path / "nothing")
    with pytest.raises(TypeError):
        folder.publish("a/file", "text")
    assert folder.read("a/file") == b"old"
    assert folder.list() == {"a/file": 3}


def test_a_publish_that_is_under_way_is_not_data(folder, monkeypatch):
    replace, under_way = os.replace, []

    def watched(source, target):
        under_way.extend(folder.list())
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    folder.publish("year=1/rows.parquet", b"rows")
    (temporary,) = under_way
    assert not visible(temporary) and not temporary.endswith(".parquet")
    assert visible("year=1/rows.parquet") and list(folder.list()) == ["year=1/rows.parquet"]


def test_a_publish_outlives_the_removal_of_its_folder_by_another(folder, monkeypatch):
    make, interferences = os.makedirs, [1, 2]

    def interrupted(path, *args, **kwargs):
        make(path, *args, **kwargs)
        if path.endswith("pieces/b") and interferences:
            interferences.pop()
            folder.remove(["pieces/b/other"])

    monkeypatch.setattr(os, "makedirs", interrupted)
    folder.publish("pieces/b/file", b"rows")
    assert folder.read("pieces/b/file") == b"rows" and not interferences


def test_a_file_is_created_where_there_is_none_and_stays_as_it_was_where_there_is(folder):
    assert folder.create("a/lease", b"first")
    assert not folder.create("a/lease", b"second") and not folder.create("a/lease", b"first")
    assert folder.read("a/lease") == b"first" and folder.list() == {"a/lease": 5}
    folder.remove(["a/lease"])
    assert folder.create("a/lease", b"third")


def create_at_once(folder, size):
    """Let eight create the same file; give whether each did, and what they would write."""
    contents = [bytes([caller]) * size for caller in range(8)]
    with ThreadPoolExecutor(len(contents)) as callers:
        return list(callers.map(lambda content: folder.create("lease", content), contents)), contents


def test_of_many_that_create_a_file_one_does_and_no_reader_sees_a_part(folder):
    seen, done = [], threading.Event()

    def read():
        while not done.is_set():
            seen.append(folder.read_or_none("lease"))

    with ThreadPoolExecutor(1) as readers:
        reader = readers.submit(read)
        for _ in range(20):
            made, contents = create_at_once(folder, 300_000)
            assert made.count(True) == 1
            assert folder.read("lease") == contents[made.index(True)]
            folder.remove(["lease"])
        done.set()
        reader.result()
    assert set(seen) <= {None, *contents}


def test_a_disk_without_hard_links_creates_once_too(folder, monkeypatch):
    def refuse(*arguments):
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert folder.create("lease", b"first") and not folder.create("lease", b"second")
    assert folder.read("lease") == b"first" and folder.list() == {"lease": 5}


def test_a_store_without_conditions_creates_once(request):
    folder = Folder(f"memory://{request.node.name}")
    assert folder.create("lease", b"first") and not folder.create("lease", b"second")
    assert folder.read("lease") == b"first"


def test_a_file_where_a_folder_should_be_is_an_error_and_stays(folder):
    folder.publish("a", b"1")
    with pytest.raises(OSError):
        folder.publish("a/b", b"2")
    assert folder.list() == {"a": 1}


def test_removal_prunes_empty_folders_and_no_others(folder):
    for path in ("a/b/c/file", "a/kept", "d/e/file"):
        folder.publish(path, b"1")
    folder.remove(["a/b/c/file", "d/e/file"])
    assert sorted(path.name for path in Path(folder.root).rglob("*")) == ["a", "kept"]
    folder.remove(["a/kept"])
    assert Path(folder.root).is_dir()


def test_removal_of_what_is_gone_does_not_matter(folder):
    folder.publish("a/b", b"1")
    folder.remove(["a/c", "x/y/z", "a/b"])
    folder.remove(["a/b"])
    folder.remove([])
    assert folder.list() == {}


@pytest.mark.parametrize("name", ["a*", "a?", "[ab]1", "a[!0]", "a1"])
def test_a_name_that_reads_as_a_pattern_removes_itself_alone_from_a_store(name, request):
    folder = Folder(f"memory://{request.node.name.encode().hex()}")
    for other in ("a1", "b1", name):
        folder.publish(other, b"1")
    folder.remove([name, "gone"])
    folder.remove([name])
    for other in {"a1", "b1"} - {name}:
        assert folder.read(other) == b"1"
    with pytest.raises(FileNotFoundError):
        folder.read(name)


@pytest.mark.parametrize("path", ["", ".", "..", "../x", "a/../../x", "a/..", "/etc/passwd"])
def test_paths_that_lead_out_of_the_folder_are_refused(folder, path):
    for use in (
        folder.read,
        folder.open,
        lambda path: folder.publish(path, b""),
        lambda path: folder.create(path, b""),
        lambda path: folder.remove([path]),
    ):
        with pytest.raises(DataError, match="leads out of"):
            use(path)


def test_reading_what_is_not_there_says_so(folder):
    for read in (folder.read, folder.open):
        with pytest.raises(FileNotFoundError):
            read("nothing")


def test_a_record_survives_the_way_through_json(folder):
    record = {"labels": ["é", 1, None], "deep": {"x": 0.1}}
    folder.publish_json("_mmray/record.json", record)
    assert folder.read_json("_mmray/record.json") == record
    assert "é" in folder.read("_mmray/record.json").decode()


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe\x00"])
def test_what_is_not_json_is_refused_by_path(folder, data):
    folder.publish("a/record.json", data)
    with pytest.raises(DataError, match=r"folder/a/record\.json is not JSON"):
        folder.read_json("a/record.json")


@pytest.mark.parametrize(("num_bytes", "tail"), [(4, b"6789"), (10, b"0123456789"), (99, b"0123456789")])
def test_a_tail_is_the_last_bytes_or_all_of_them(folder, num_bytes, tail):
    folder.publish("file", b"0123456789")
    assert folder.tail("file", 10, num_bytes) == tail


@pytest.mark.parametrize(
    "uri", ["s3://key:secret@bucket/prefix", "s3://key:se/cret@bucket/prefix", "s3://secret@bucket"]
)
def test_a_uri_with_credentials_is_refused_without_repeating_them(uri):
    with pytest.raises(ConfigError, match="environment") as caught:
        Folder(uri)
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize("uri", ["", "s3://", "s3:///prefix"])
def test_a_uri_without_a_bucket_is_refused(uri):
    with pytest.raises(ConfigError, match="s3://bucket/prefix"):
        Folder(uri)


def test_a_store_that_is_not_known_is_refused_by_scheme():
    with pytest.raises(ConfigError, match="nosuch://"):
        Folder("nosuch://bucket/prefix").list()


def test_a_uri_may_hold_what_credentials_also_hold():
    assert Folder("s3://bucket/user@host/year=1/").uri == "s3://bucket/user@host/year=1"


def test_local_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert (
        Folder("here").uri
        == Folder("here/").uri
        == Folder(f"file://{tmp_path}/here").uri
        == f"{tmp_path}/here"
    )
    assert Folder("~/x").uri == "/home/somebody/x"
    assert Folder("here").is_local and not Folder("s3://bucket").is_local


def test_a_folder_travels_as_its_uri_alone(folder):
    folder.publish("a", b"1")
    sent = pickle.dumps(folder)
    assert len(sent) < len(folder.uri) + 200 and b"fsspec" not in sent
    received = pickle.loads(sent)
    assert received == folder and received.read("a") == b"1"
    assert vars(received) == {"uri": folder.uri}


def test_arrow_reads_what_was_published(folder):
    folder.publish("a/b", b"rows")
    filesystem, root = folder.arrow()
    with filesystem.open_input_file(f"{root}/a/b") as file:
        assert file.read() == b"rows"


PROFILES = """
[profile keys]
region = eu-central-1
endpoint_url = https://store:9000
aws_access_key_id = the-key
aws_secret_access_key = the-secret
output = json

[profile role]
role_arn = arn:aws:iam::1:role/labeler
source_profile = keys
"""


@pytest.fixture
def aws(tmp_path, monkeypatch):
    """Give `set(**variables)`: these are all of AWS in the environment, with a file of profiles."""
    (tmp_path / "config").write_text(PROFILES)

    def set_variables(**variables):
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        files = {"AWS_CONFIG_FILE": "config", "AWS_SHARED_CREDENTIALS_FILE": "none"}
        for name, value in (variables | {name: str(tmp_path / file) for name, file in files.items()}).items():
            monkeypatch.setenv(name, value)

    return set_variables


def test_what_the_environment_says_of_stores_is_shared_without_what_holds_here_alone(aws):
    shared = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_ENDPOINT_URL": "http://c"}
    aws(**shared, AWS_CONTAINER_CREDENTIALS_RELATIVE_URI="/here", AWS_REGION="")
    assert shared_environment() == shared


def test_a_profile_is_shared_as_what_it_holds(aws):
    aws(AWS_PROFILE="keys", AWS_ENDPOINT_URL="https://another")
    assert shared_environment() == {
        "AWS_ACCESS_KEY_ID": "the-key",
        "AWS_SECRET_ACCESS_KEY": "the-secret",
        "AWS_DEFAULT_REGION": "eu-central-1",
        "AWS_ENDPOINT_URL": "https://another",
    }


@pytest.mark.parametrize("profile", ["role", "nobody"])
def test_a_profile_without_keys_is_shared_by_its_name(aws, profile):
    aws(AWS_PROFILE=profile)
    assert shared_environment() == {"AWS_PROFILE": profile}


def test_where_nothing_is_set_nothing_is_shared(aws):
    aws()
    assert shared_environment() == {}


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127])
def test_a_file_may_have_the_longest_name_that_a_disk_knows(tmp_path, name):
    folder = Folder(str(tmp_path))
    folder.publish(name, b"1")
    assert folder.read(name) == b"1" and not folder.create(name, b"2")
    assert [*folder.list()] == [name]


@pytest.mark.parametrize(
    ("path", "is_data"),
    [
        ("rows.parquet", True),
        ("year=1/rows.parquet", True),
        ("a_b/c.d/e_", True),
        ("_SUCCESS", False),
        ("_mmray/plan.json", False),
        (".rows.parquet.1f.tmp", False),
        ("year=1/_metadata", False),
        ("a/.git/b", False),
    ],
)
def test_a_path_with_a_part_that_begins_with_a_dot_or_underscore_is_no_data(path, is_data):
    assert visible(path) == is_data


@pytest.mark.parametrize(
    ("uri", "folder"), [("/t.json", "/"), ("file:///t.json", "/"), ("s3://bucket/t.json", "s3://bucket")]
)
def test_a_file_at_the_root_is_not_taken_for_one_of_the_working_directory(uri, folder):
    found, name = split_uri(uri)
    assert (found.uri, name) == (folder, "t.json")
