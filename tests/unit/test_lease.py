"""A lease keeps two jobs from one output, outlives none that holds it, and loses nothing of anyone's."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest

from mmray.errors import BudgetError, OutputError, StorageError
from mmray.lease import LEASE, Lease, is_dead, this_process
from mmray.storage import Folder

ELSEWHERE = {"owner": "another", "host": "elsewhere", "machine": "boot pid:[1]", "pid": 7, "renewed": 3}


@pytest.fixture
def output(tmp_path):
    return Folder(str(tmp_path / "output"))


def wait_until(holds):
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_lease_is_there_while_it_is_held_and_gone_after(output):
    with Lease(output) as lease:
        lease.check()
        assert output.read_json(LEASE)["pid"] == os.getpid()
    assert output.list() == {}


def test_a_lease_is_given_back_when_the_job_fails(output):
    with pytest.raises(ZeroDivisionError), Lease(output):
        raise ZeroDivisionError
    assert output.list() == {}


def test_a_second_job_is_refused_with_who_holds_the_output_and_leaves_the_lease_alone(output):
    with Lease(output, renewal_s=0.05):
        with pytest.raises(OutputError, match=rf"is being labeled by process {os.getpid()} on "):
            Lease(output, patience_s=20).__enter__()
        assert output.read_json(LEASE)["pid"] == os.getpid()
    assert output.list() == {}


def test_a_lease_that_is_not_renewed_is_taken_over_after_a_while(output):
    output.publish_json(LEASE, ELSEWHERE)
    with Lease(output, patience_s=0.2):
        assert output.read_json(LEASE)["pid"] == os.getpid()
    assert output.list() == {}


def test_a_lease_of_a_process_that_is_gone_is_taken_over_at_once(output):
    script = "import json; from mmray.lease import this_process; print(json.dumps(this_process()))"
    gone = json.loads(subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout)
    assert is_dead(gone)
    output.publish_json(LEASE, ELSEWHERE | gone)
    with Lease(output, patience_s=1e6):
        assert output.read_json(LEASE)["pid"] == os.getpid()


def test_a_process_that_runs_or_that_is_elsewhere_is_not_dead():
    here = this_process()
    assert not is_dead(here)
    assert not is_dead(here | {"pid": 1})
    assert not is_dead(here | {"host": "elsewhere", "pid": 2**22 + 1})
    assert not is_dead(here | {"machine": "another boot", "pid": 2**22 + 1})


def test_a_job_whose_lease_was_taken_over_notices_and_leaves_the_new_one(output):
    with pytest.raises(OutputError, match="process 7 on elsewhere"), Lease(output, renewal_s=0.02) as lease:
        output.publish_json(LEASE, ELSEWHERE)
        wait_until(lambda: not lease._thread.is_alive())
        lease.check()
    assert output.read_json(LEASE) == ELSEWHERE


def test_a_lease_is_renewed(output):
    with Lease(output, renewal_s=0.02):
        wait_until(lambda: output.read_json(LEASE)["renewed"] >= 3)


def test_a_lease_that_vanished_is_taken_again(output):
    with Lease(output, renewal_s=0.02) as lease:
        output.remove([LEASE])
        wait_until(lambda: output.read_json(LEASE))
        lease.check()
    assert output.list() == {}


def test_of_jobs_that_begin_at_once_one_has_the_output_and_the_others_are_told(output):
    def take(_):
        try:
            with Lease(output, renewal_s=0.05, patience_s=5) as lease:
                time.sleep(3)
                lease.check()
        except OutputError as error:
            return str(error)

    with ThreadPoolExecutor(6) as threads:
        told = list(threads.map(take, range(6)))
    assert told.count(None) == 1
    assert all("is being labeled by process" in text for text in told if text)


def test_storage_that_fails_as_a_lease_is_given_back_does_not_change_how_the_job_ends(output, monkeypatch):
    def fail(*_):
        raise StorageError("the store keeps failing")

    with pytest.raises(BudgetError), Lease(output):
        monkeypatch.setattr(Folder, "remove", fail)
        raise BudgetError("too many rows failed")


def test_storage_that_hangs_as_a_lease_is_given_back_does_not_keep_the_job(output, monkeypatch):
    monkeypatch.setattr("mmray.lease.GIVING_BACK_S", 0.1)
    hanging = Event()
    with Lease(output):
        monkeypatch.setattr(Folder, "read_json", lambda *_: hanging.wait(60))
        started = time.monotonic()
    assert time.monotonic() - started < 30
    hanging.set()
