"""The protocol of labeling without a model: plan, pieces, joins, manifest."""

import io
import json
import threading
from dataclasses import replace
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmray.errors import DataError, OutputError
from mmray.parquet import DataFile
from mmray.plan import PIECES, PLAN, Plan, Shard, cut_to, find_work, shards_of
from mmray.shards import (
    MANIFEST,
    RECORDS,
    REJECTIONS,
    SUCCESS,
    Committer,
    FileRecord,
    Records,
    finish,
    finished_manifest,
    read_record,
)
from mmray.storage import Folder

light = settings(deadline=None, max_examples=60)

SETTINGS = {"bundle": "b1", "labels": [1, "é"], "scores": "all", "limit": None, "columns": {"image": "image"}}


def make_file(path, units):
    return DataFile(path, 10 + units[-1][-1], units[-1][-1], f"sha of {path}", 7, units)


@st.composite
def units_of(draw):
    sizes = draw(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), max_size=4))
    units, first = [], 0
    for unit in sizes:
        units.append((first, *(first := first + size for size in unit)))
    return tuple(units) or ((0, 0),)


PATHS = st.lists(st.sampled_from(["a", "b=1", "c d", "é[*]"]), min_size=1, max_size=3)
NAMES = PATHS.map(lambda parts: "/".join(parts) + ".parquet")
FILES = st.dictionaries(NAMES, units_of(), max_size=5).map(
    lambda files: tuple(make_file(path, units) for path, units in sorted(files.items()))
)


class Meddled(Folder):
    """A folder that notes what is published, and does something just before the n-th read of a piece."""

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "published", [])
        object.__setattr__(self, "actions", {})
        object.__setattr__(self, "num_reads", 0)

    def read(self, path):
        if path.startswith(PIECES):
            object.__setattr__(self, "num_reads", self.num_reads + 1)
            self.actions.pop(self.num_reads, lambda: None)()
        return super().read(path)

    def publish(self, path, data):
        self.published.append(path)
        super().publish(path, data)


@pytest.fixture
def output(tmp_path):
    return Folder(str(tmp_path / "output"))


def labeled(first, end, status=lambda row: "ok"):
    """Make labeled rows: row numbers, statuses, and an error where the status is not ok."""
    rows = range(first, end)
    statuses = [status(row) for row in rows]
    return pa.table(
        {
            "row": pa.array(rows, pa.int64()),
            "kind": pa.array([f"kind {row % 3}" for row in rows], pa.string()).dictionary_encode(),
            "nothing": pa.nulls(end - first),
            "status": pa.array(statuses, pa.string()),
            "error": pa.array([None if s == "ok" else f"{s} é" for s in statuses], pa.string()),
        }
    )


def commit(committer, shard, rows, file):
    """Commit a shard and have its file joined if it was the last one, as a run does."""
    return committer.commit(shard, rows, file) or (committer.join(file) if len(file.shards) > 1 else None)


def rows_of(output, path):
    return pq.read_table(pa.BufferReader(output.read(path)))["row"].to_pylist()


def piece(first, end, path="a/x.parquet"):
    return f"{PIECES}/{path}/{first}-{end}.parquet"


THREE = make_file("a/x.parquet", ((0, 3), (3, 5, 9)))
ONE = make_file("b.parquet", ((0, 4),))


@light
@given(parts=st.lists(FILES, max_size=3))
def test_a_plan_is_read_back_as_it_was_appended(tmp_path_factory, parts):
    output = Folder(str(tmp_path_factory.mktemp("output")))
    plan = Plan((), SETTINGS)
    for number, files in enumerate(parts):
        plan = plan.append(output, files)
        assert plan.parts == number + 1
        assert Plan.load(output) == plan
        assert plan.fingerprint == Plan((), SETTINGS).fingerprint
    assert plan.files == tuple(file for files in parts for file in files)
    assert plan.num_rows == sum(file.num_rows for file in plan.files)
    assert plan.num_shards == sum(len(shards_of(file, file.units)) for file in plan.files)


def test_an_append_leaves_the_earlier_parts_as_they_are(output):
    plan = Plan((), SETTINGS).append(output, [THREE])
    before = output.read(f"{PLAN}/00000.parquet")
    plan.append(output, [ONE])
    assert output.read(f"{PLAN}/00000.parquet") == before
    assert list(output.list()) == [f"{PLAN}/00000.parquet", f"{PLAN}/00001.parquet"]


def test_an_output_without_a_plan_has_none(output):
    assert Plan.load(output) is None
    output.publish("a.parquet", b"")
    assert Plan.load(output) is None


def test_a_plan_of_another_schema_version_is_refused(output):
    Plan((), SETTINGS).append(output, [ONE])
    table = pq.read_table(pa.BufferReader(output.read(f"{PLAN}/00000.parquet")))
    record = json.loads(table.schema.metadata[b"mmray"]) | {"schema_version": 99}
    part = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"mmray": json.dumps(record)}), part)
    output.publish(f"{PLAN}/00000.parquet", part.getvalue())
    with pytest.raises(OutputError, match="schema version 99"):
        Plan.load(output)


def test_other_settings_are_refused_by_name_and_the_same_ones_are_not(output):
    plan = Plan((), SETTINGS).append(output, [ONE])
    plan.refuse_other(json.loads(json.dumps(SETTINGS)), output)
    other = SETTINGS | {"scores": "none", "columns": {"image": "jpg"}}
    with pytest.raises(OutputError) as caught:
        plan.refuse_other(other, output)
    for part in (
        output.uri,
        "scores: 'all' -> 'none'",
        "columns.image: 'image' -> 'jpg'",
        "another --output",
    ):
        assert part in str(caught.value)
    assert "bundle" not in str(caught.value)


def test_an_input_that_only_grew_is_fine_and_its_new_files_are_told():
    plan = Plan((THREE, ONE), SETTINGS)
    listing = {THREE.path: THREE.size_bytes, "c.parquet": 5, ONE.path: ONE.size_bytes}
    assert plan.compare_input(listing) == {"c.parquet": 5}


def test_an_input_file_that_is_gone_or_changed_is_refused_by_path():
    plan = Plan((THREE, ONE), SETTINGS)
    with pytest.raises(DataError, match=r"b\.parquet was planned and is gone"):
        plan.compare_input({THREE.path: THREE.size_bytes})
    with pytest.raises(DataError, match=r"b\.parquet has 1 bytes and was planned with 14"):
        plan.compare_input({THREE.path: THREE.size_bytes, ONE.path: 1})


@light
@given(FILES, st.integers(1, 60))
def test_a_limit_keeps_just_the_first_rows_and_the_cuts_before_them(files, limit):
    kept = cut_to(files, limit)
    assert sum(file.num_rows for file in kept) == min(limit, sum(file.num_rows for file in files))
    assert [file.path for file in kept] == [file.path for file in files][: len(kept)]
    for before, after in zip(files, kept, strict=False):
        assert after.units[-1][-1] == after.num_rows
        assert (after.size_bytes, after.footer_sha256) == (before.size_bytes, before.footer_sha256)
        assert all(end == first for (*_, end), (first, *_) in pairwise(after.units))
        assert after.shards[:-1] == before.shards[: len(after.shards) - 1]
        first, end = after.shards[-1]
        assert first == before.shards[len(after.shards) - 1][0]
        assert first < end or before.num_rows == 0
    for before, after in zip(files, kept[:-1], strict=False):
        assert before == after


@given(FILES)
def test_no_limit_keeps_everything(files):
    assert cut_to(iter(files), None) == files


@light
@given(files=FILES, data=st.data())
def test_work_is_what_the_listing_lacks(tmp_path_factory, files, data):
    output = Folder(str(tmp_path_factory.mktemp("output")))
    plan = Plan((), SETTINGS).append(output, files)
    missing, there = [], []
    for file in files:
        shards = shards_of(file, file.units)
        committed = set(data.draw(st.sets(st.sampled_from(shards)))) if len(shards) > 1 else set()
        for shard in committed:
            output.publish(shard.piece, b"")
        if data.draw(st.booleans()):
            output.publish(file.path, b"")
        elif len(committed) == len(shards):
            there.append(file)
        else:
            missing += [shard for shard in shards if shard not in committed]
    work = find_work(output, plan)
    assert list(work.shards()) == missing
    assert work.num_pending == len(missing)
    assert work.num_rows == sum(shard.end - shard.first for shard in missing)
    assert work.unjoined == there
    for file, units in work.pending:
        for unit in units:
            assert set(shards_of(file, [unit])) - work.committed


def test_a_file_of_one_shard_is_committed_as_itself(output):
    record = commit(Committer(output, "f1"), Shard("b.parquet", 0, 4), labeled(0, 4), ONE)
    assert list(output.list()) == ["b.parquet"]
    assert record.num_rows == 4 and record.counts == {"ok": 4}
    assert record.size_bytes == len(output.read("b.parquet"))


@light
@given(st.permutations(shards_of(THREE, THREE.units)))
def test_pieces_are_joined_in_row_order_whatever_the_order_of_commits(tmp_path_factory, order):
    output = Folder(str(tmp_path_factory.mktemp("output")))
    committer = Committer(output, "f1")
    records = [commit(committer, shard, labeled(shard.first, shard.end), THREE) for shard in order]
    assert records[:-1] == [None, None]
    assert list(output.list()) == ["a/x.parquet"]
    table = pq.read_table(pa.BufferReader(output.read("a/x.parquet")))
    assert table["row"].to_pylist() == list(range(9))
    assert table.schema.remove_metadata() == labeled(0, 1).schema
    assert table.drop_columns("kind").equals(labeled(0, 9).drop_columns("kind"))
    assert table["kind"].to_pylist() == labeled(0, 9)["kind"].to_pylist()
    record = read_record(pq.read_metadata(pa.BufferReader(output.read("a/x.parquet"))))
    assert record == {"fingerprint": "f1", "input": THREE.footer_sha256, "num_rows": 9, "counts": {"ok": 9}}
    assert records[-1] == committer.describe(THREE)


def test_until_the_last_piece_is_there_no_file_appears(output):
    committer = Committer(output, "f1")
    for shard in shards_of(THREE, THREE.units)[1:]:
        assert commit(committer, shard, labeled(shard.first, shard.end), THREE) is None
    assert list(output.list()) == [piece(3, 5), piece(5, 9)]
    assert committer.join(THREE) is None


def test_a_shard_that_is_committed_again_changes_nothing(output):
    committer = Committer(output, "f1")
    shards = shards_of(THREE, THREE.units)
    for shard in (shards[0], shards[0], shards[1]):
        commit(committer, shard, labeled(shard.first, shard.end), THREE)
    before = output.read(shards[0].piece)
    commit(committer, shards[0], labeled(0, 3), THREE)
    assert output.read(shards[0].piece) == before
    record = commit(committer, shards[2], labeled(5, 9), THREE)

    content = output.read("a/x.parquet")
    for shard in shards[:2]:  # a zombie comes late
        assert commit(committer, shard, labeled(shard.first, shard.end), THREE) is None
    assert output.read("a/x.parquet") == content
    assert committer.describe(THREE) == record
    assert commit(committer, shards[2], labeled(5, 9), THREE) == record
    assert output.read("a/x.parquet") == content
    assert list(output.list()) == ["a/x.parquet"]


def test_a_shard_with_a_row_too_few_or_many_is_never_committed(output):
    for num_rows in (2, 4):
        with pytest.raises(AssertionError):
            commit(Committer(output, "f1"), Shard("a/x.parquet", 0, 3), labeled(0, num_rows), THREE)
    assert output.list() == {}


@pytest.mark.parametrize("num_threads", [2, 6])
def test_joins_at_the_same_time_agree(output, num_threads):
    committer = Committer(output, "f1")
    contents = set()
    for _ in range(25):
        shards = shards_of(THREE, THREE.units)
        for shard in shards[:-1]:
            commit(committer, shard, labeled(shard.first, shard.end), THREE)
        start = threading.Barrier(num_threads)
        records, errors = [], []

        def run(start=start, shard=shards[-1], records=records, errors=errors):
            start.wait()
            try:
                records.append(commit(committer, shard, labeled(shard.first, shard.end), THREE))
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run) for _ in range(num_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        records = [record for record in records if record]
        assert records and records == [committer.describe(THREE)] * len(records)
        assert rows_of(output, "a/x.parquet") == list(range(9))
        contents.add(output.read("a/x.parquet"))
        output.remove(output.list())
    assert len(contents) == 1


@pytest.mark.parametrize("moment", [1, 2, 3])
def test_a_join_that_another_overtakes_gives_way_to_it(output, moment):
    slow, fast = Meddled(output.uri), Committer(output, "f1")
    for shard in shards_of(THREE, THREE.units)[:-1]:
        commit(fast, shard, labeled(shard.first, shard.end), THREE)
    won = []
    slow.actions[moment] = lambda: won.append(fast.join(THREE))
    late = commit(Committer(slow, "f1"), Shard(THREE.path, 5, 9), labeled(5, 9), THREE)
    assert late is None
    assert won == [fast.describe(THREE)]
    assert rows_of(output, THREE.path) == list(range(9))
    assert list(output.list()) == [THREE.path]


def test_a_join_that_finds_the_file_joined_by_another_writes_the_same_bytes(output):
    committer = Committer(output, "f1")
    for shard in shards_of(THREE, THREE.units):
        record = commit(committer, shard, labeled(shard.first, shard.end), THREE)
    content = output.read(THREE.path)
    pieces = Committer(output / "elsewhere", "f1")
    for shard in shards_of(THREE, THREE.units)[:-1]:
        commit(pieces, shard, labeled(shard.first, shard.end), THREE)
        output.publish(shard.piece, (output / "elsewhere").read(shard.piece))
    assert commit(committer, Shard(THREE.path, 5, 9), labeled(5, 9), THREE) == record
    assert output.read(THREE.path) == content


def test_a_piece_of_another_job_is_thrown_away_and_labeled_again(output):
    plan = Plan((), SETTINGS).append(output, [THREE])
    first, second, third = shards_of(THREE, THREE.units)
    commit(Committer(output, "other"), second, labeled(13, 15), THREE)
    committer = Committer(output, plan.fingerprint)
    commit(committer, first, labeled(0, 3), THREE)
    assert commit(committer, third, labeled(5, 9), THREE) is None
    assert THREE.path not in output.list()
    assert list(find_work(output, plan).shards()) == [second]
    assert commit(committer, second, labeled(3, 5), THREE) is not None
    assert rows_of(output, THREE.path) == list(range(9))


def test_a_piece_of_another_input_is_thrown_away_and_labeled_again(output):
    committer = Committer(output, "f1")
    commit(committer, Shard("a/x.parquet", 0, 3), labeled(0, 3), replace(THREE, footer_sha256="of another"))
    for shard in shards_of(THREE, THREE.units)[1:]:
        commit(committer, shard, labeled(shard.first, shard.end), THREE)
    assert committer.join(THREE) is None
    assert piece(0, 3) not in output.list()
    commit(committer, Shard("a/x.parquet", 0, 3), labeled(0, 3), THREE)
    assert committer.join(THREE) or "a/x.parquet" in output.list()


@pytest.mark.parametrize("other", ["fingerprint", "rows", "origin"])
def test_a_file_that_is_not_of_this_job_is_refused_by_path(output, other):
    committer = Committer(output, "f1")
    if other == "origin":
        target = io.BytesIO()
        pq.write_table(labeled(0, 4), target)
        output.publish(ONE.path, target.getvalue())
    elif other == "rows":
        commit(committer, Shard(ONE.path, 0, 3), labeled(0, 3), make_file(ONE.path, ((0, 3),)))
    else:
        commit(Committer(output, "f2"), Shard(ONE.path, 0, 4), labeled(0, 4), ONE)
    with pytest.raises(OutputError, match=r"b\.parquet is not of this job: remove it"):
        committer.describe(ONE)


def status_of(row):
    return {1: "bad_image", 3: "failed", 4: "no_caption", 8: "failed"}.get(row, "ok")


def test_rejected_rows_are_listed_with_file_row_and_reason(output):
    committer = Committer(output, "f1")
    for shard in reversed(shards_of(THREE, THREE.units)):
        record = commit(committer, shard, labeled(shard.first, shard.end, status_of), THREE)
    assert record.counts == {"bad_image": 1, "failed": 2, "no_caption": 1, "ok": 5}
    lines = output.read(f"{REJECTIONS}/a/x.parquet.jsonl").decode().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"file": "a/x.parquet", "row": row, "status": status, "reason": f"{status} é"}
        for row, status in ((1, "bad_image"), (3, "failed"), (8, "failed"))
    ]


def test_rejected_rows_are_listed_before_the_file_appears(output):
    meddled = Meddled(output.uri)
    commit(Committer(meddled, "f1"), Shard(ONE.path, 0, 4), labeled(0, 4, status_of), ONE)
    assert meddled.published == [f"{REJECTIONS}/b.parquet.jsonl", "b.parquet"]


def test_a_file_without_rejected_rows_has_no_list(output):
    commit(Committer(output, "f1"), Shard(ONE.path, 0, 4), labeled(0, 4), ONE)
    assert list(output.list()) == [ONE.path]


def test_a_finished_output_has_no_pieces_a_manifest_and_then_success(output):
    meddled = Meddled(output.uri)
    plan = Plan((), SETTINGS).append(output, [THREE, ONE])
    committer = Committer(output, plan.fingerprint)
    shards = [*shards_of(THREE, THREE.units), Shard(ONE.path, 0, 4)]
    done = [
        commit(
            committer,
            shard,
            labeled(shard.first, shard.end, status_of),
            THREE if shard != shards[-1] else ONE,
        )
        for shard in shards
    ]
    records = [record for record in done if record]
    commit(committer, shards[1], labeled(3, 5, status_of), THREE)  # a zombie's, and one of no planned shard
    output.publish(piece(0, 99), b"")
    manifest = finish(meddled, plan, reversed(records), {"python": "3"})
    assert meddled.published == [MANIFEST, SUCCESS]
    assert output.read_json(MANIFEST) == manifest
    assert set(output.list()) == {
        *(THREE.path, ONE.path, MANIFEST, SUCCESS, f"{PLAN}/00000.parquet"),
        *(f"{REJECTIONS}/{file.path}.jsonl" for file in (THREE, ONE)),
    }
    assert manifest["num_rows"] == 13
    assert manifest["counts"] == {"bad_image": 2, "failed": 3, "no_caption": 1, "ok": 7}
    assert manifest["fingerprint"] == plan.fingerprint and manifest["settings"] == SETTINGS
    assert [file["path"] for file in manifest["files"]] == [THREE.path, ONE.path]
    assert manifest["files"][1] == committer.describe(ONE)._asdict()


def test_a_file_called_like_the_folder_of_anothers_pieces_is_not_joined_early(output):
    outer, inner = make_file("x.parquet", ((0, 2, 4),)), make_file("x.parquet/x.parquet", ((0, 2, 4),))
    committer = Committer(output, "f1")
    for file in (inner, outer):
        assert commit(committer, Shard(file.path, 0, 2), labeled(0, 2), file) is None
    assert committer.join(outer) is None


def test_records_of_done_files_outlive_a_run_as_far_as_it_published_them(output):
    first = Records(output)
    assert first.found == {}
    for number in range(4):
        first.add(FileRecord(f"{number}.parquet", number, {"ok": number}, 10, "sha"))
        if number in (1, 2):
            first.publish()
    second = Records(output)
    assert second.found == {path: first.found[path] for path in ("0.parquet", "1.parquet", "2.parquet")}
    second.add(FileRecord("3.parquet", 3, {"ok": 3}, 10, "sha"))
    second.publish()
    second.publish()
    assert Records(output).found == first.found

    before = (output / RECORDS).list()
    second.forget(["elsewhere.parquet"])
    assert (output / RECORDS).list() == before
    second.forget(["1.parquet", "elsewhere.parquet"])
    left = {path: record for path, record in first.found.items() if path != "1.parquet"}
    assert second.found == Records(output).found == left
    assert len((output / RECORDS).list()) == 1


@light
@given(st.lists(st.integers(0, 40), max_size=60))
def test_however_often_records_are_published_they_are_few_parts_to_read(tmp_path_factory, sizes):
    output = Folder(str(tmp_path_factory.mktemp("output")))
    records = Records(output)
    for turn, size in enumerate(sizes):
        for number in range(size):
            records.add(FileRecord(f"{turn}-{number}.parquet", number, {"ok": number}, 10, "sha"))
        records.publish()
    assert Records(output).found == records.found
    assert 2 ** len((output / RECORDS).list()) <= 2 * max(1, sum(sizes))


@pytest.mark.parametrize("change", [Records.publish, lambda records: records.forget(["0.parquet"])])
def test_a_job_that_dies_as_it_puts_records_together_loses_none(output, change):
    class Deadly(Folder):
        def remove(self, paths):
            assert not [*paths], "died"

    records = Records(Deadly(output.uri))
    records.add(FileRecord("0.parquet", 0, {"ok": 0}, 10, "sha"))
    records.publish()
    records.add(FileRecord("1.parquet", 1, {"ok": 1}, 10, "sha"))
    with pytest.raises(AssertionError, match="died"):
        change(records)
    assert records.found.items() <= Records(output).found.items()


def test_an_extended_output_knows_its_files_from_the_manifest_and_drops_that(output):
    plan = Plan((), SETTINGS).append(output, [ONE])
    record = commit(Committer(output, plan.fingerprint), Shard(ONE.path, 0, 4), labeled(0, 4), ONE)
    finish(output, plan, [record], {})
    records = Records(output)
    assert records.found == {ONE.path: record}
    records.forget([])
    assert MANIFEST in output.list()
    records.forget([THREE.path])
    assert not {MANIFEST, SUCCESS} & output.list().keys()
    assert Records(output).found == {ONE.path: record}


def test_a_piece_of_a_file_of_one_shard_is_nobodys(output):
    plan = Plan((), SETTINGS).append(output, [ONE])
    output.publish(Shard(ONE.path, 0, 4).piece, b"")
    work = find_work(output, plan)
    assert [*work.shards()] == [Shard(ONE.path, 0, 4)] and not work.unjoined


def test_a_job_that_lost_its_lease_does_not_plan_over_another_one(output):
    Plan((), SETTINGS | {"precision": "bf16"}).append(output, [THREE])
    with pytest.raises(OutputError, match="planned by another job meanwhile"):
        Plan((), SETTINGS).append(output, [ONE])
    assert Plan.load(output).files == (THREE,)


def test_lists_of_rows_that_are_rejected_no_more_go_and_those_of_other_files_stay(output):
    plan = Plan((), SETTINGS).append(output, [ONE])
    record = commit(Committer(output, plan.fingerprint), Shard(ONE.path, 0, 4), labeled(0, 4), ONE)
    for path in (ONE.path, "later.parquet"):  # the latter of a job that took this one's place and went on
        output.publish(f"{REJECTIONS}/{path}.jsonl", b"{}")
    finish(output, plan, [record], {})
    assert [*(output / REJECTIONS).list()] == ["later.parquet.jsonl"]


def test_an_output_is_not_whole_when_its_plan_came_to_skip_files(output):
    plan = Plan((), SETTINGS).append(output, [ONE])
    record = commit(Committer(output, plan.fingerprint), Shard(ONE.path, 0, 4), labeled(0, 4), ONE)
    manifest = finish(output, plan, [record], {})
    assert finished_manifest(output, plan) == manifest
    assert finished_manifest(output, plan.append(output, [], {"c.parquet": "no Parquet"})) is None
