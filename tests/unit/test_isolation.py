"""Decoding in a process of its own: the same rows, and a row that kills or hangs the process costs itself."""

import io
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from mmray.decoding import decode_row
from mmray.isolation import IsolatedDecoder
from mmray.schema import Status


def encoded(seed):
    pixels = np.random.default_rng(seed).integers(256, size=(20, 30, 3), dtype=np.uint8)
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "PNG")
    return target.getvalue()


@pytest.fixture(scope="module")
def decoder():
    return IsolatedDecoder()


@pytest.mark.parametrize(
    ("image", "caption"),
    [
        (encoded(1), "a dog\n on a beach é"),
        (encoded(2), None),
        (encoded(3), " "),
        (None, "a dog"),
        (b"", "a dog"),
        (b"no image", None),
        (None, None),
        (encoded(4), "half a pair \ud83d and \x00"),
    ],
)
@pytest.mark.parametrize("fusion", ["concat", "image"])
def test_a_row_is_decoded_as_without_isolation(decoder, image, caption, fusion):
    apart, here = decoder(image, caption, fusion, 16), decode_row(image, caption, fusion, 16)
    assert apart[1:] == here[1:]
    assert (apart.pixels is None) == (here.pixels is None)
    assert here.pixels is None or np.array_equal(apart.pixels, here.pixels)


def test_a_row_that_kills_its_process_has_failed_and_the_next_one_is_decoded(monkeypatch):
    monkeypatch.setenv("MMRAY_FAULT", "exit decode poison*")
    decoder = IsolatedDecoder()
    assert decoder(encoded(1), "sound", "concat", 16).status is Status.OK
    row = decoder(encoded(2), "poison", "concat", 16)
    assert row == (None, None, Status.FAILED, "decoding this row killed its process (-9)")
    assert decoder(encoded(3), "sound too", "concat", 16).status is Status.OK


def test_threads_that_ask_at_once_get_their_own_rows(monkeypatch):
    monkeypatch.setenv("MMRAY_FAULT", "exit decode poison*")
    decoder = IsolatedDecoder()
    rows = [(encoded(seed), "poison" if seed % 5 == 0 else f"row {seed}") for seed in range(40)]
    with ThreadPoolExecutor(4) as threads:
        apart = list(threads.map(lambda row: decoder(*row, "concat", 16), rows))
    for (image, caption), row in zip(rows, apart, strict=True):
        if caption == "poison":
            assert row.status is Status.FAILED
        else:
            assert np.array_equal(row.pixels, decode_row(image, caption, "concat", 16).pixels)


def test_a_row_that_hangs_has_failed(monkeypatch):
    monkeypatch.setenv("MMRAY_FAULT", "hang decode poison*")
    decoder = IsolatedDecoder(timeout_s=2)
    row = decoder(encoded(2), "poison", "concat", 16)
    assert row == (None, None, Status.FAILED, "decoding this row took more than 2 s")
    assert decoder(encoded(3), "sound", "concat", 16).status is Status.OK


def test_a_row_whose_process_another_kills_is_decoded_by_the_next(monkeypatch, tmp_path):
    monkeypatch.setenv("MMRAY_FAULT", "pause decode victim")
    monkeypatch.setenv("MMRAY_FAULT_FOLDER", str(tmp_path))
    decoder, reached = IsolatedDecoder(), tmp_path / "reached-0"
    with ThreadPoolExecutor(1) as threads:
        row = threads.submit(decoder, encoded(1), "victim", "concat", 16)
        while not (reached.exists() and reached.read_text()):
            time.sleep(0.01)
        os.kill(int(reached.read_text()), signal.SIGKILL)
        assert row.result().status is Status.OK
