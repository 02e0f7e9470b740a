"""Labels of encoded images and captions: statuses, errors, neighbours, decisions."""

import io
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from mmray import gpu_decoding
from mmray.bundle import save_bundle, tokenizer_files
from mmray.captions import tokenize, train_tokenizer
from mmray.config import FUSIONS, Columns, ModelConfig
from mmray.decisions import Calibration, decide
from mmray.decoding import HungError, RowDecoder, decode_row
from mmray.errors import BundleError, ConfigError
from mmray.images import decode_image
from mmray.labeler import Labeler, make_inputs
from mmray.model import build_model
from mmray.rowgroups import DAMAGE
from mmray.schema import KeptScores, Status, Vocabulary
from mmray.storage import Folder
from mmray.tables import TableLabeler
from mmray.towers import describe_encoder

SIZE_PX = 32
CAPTIONS = [
    "a dog on the grass",
    "a cat on a red car",
    "the bus waits",
    "two dogs and a cat on a long red bus",
]
LABELS = ("bus", "cat", "dog", "person")
OK, NO_CAPTION, NO_IMAGE, BAD_IMAGE, FAILED = Status


pytestmark = pytest.mark.usefixtures("one_thread")


def image(seed, kind="PNG"):
    """Give an encoded image that no other seed gives."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((40, 30)).save(buffer, kind)
    return buffer.getvalue()


IMAGES = [image(seed) for seed in range(4)]
JPEG = image(4, "JPEG")
TOKENIZER = train_tokenizer(CAPTIONS * 2)
TEXT = b"<html>404 not found</html>"


@pytest.fixture(scope="module")
def labelers(tmp_path_factory):
    """Give one tiny labeler for each fusion."""
    made = {}
    for fusion in FUSIONS:
        torch.manual_seed(0)
        config = ModelConfig(
            vision="test_efficientnet",
            fusion=fusion,
            image_size=SIZE_PX,
            max_tokens=12,
            width=16,
            num_heads=2,
            pretrained=False,
        )
        text_config = describe_encoder(config, len(TOKENIZER))
        bundle = save_bundle(
            Folder(str(tmp_path_factory.mktemp(fusion))),
            model_config=config,
            text_config=text_config,
            vocabulary=Vocabulary(LABELS),
            thresholds=np.full(len(LABELS), 0.5),
            calibration=Calibration.identity(len(LABELS)),
            tokenizer_files=tokenizer_files(TOKENIZER),
            weights=build_model(config, len(LABELS), text_config).state_dict(),
            metrics={},
            card="",
        )
        made[fusion] = Labeler(bundle, batch_size=3, device="cpu", num_threads=2)
    return made


def like(labeler, **changes):
    """Give a labeler of the same bundle with other settings."""
    settings = {"bundle": labeler.bundle, "device": "cpu", "num_threads": 1} | changes
    return Labeler(settings.pop("bundle"), **settings)


ROWS = {  # (image, caption) -> status for image alone, text alone, both; and what the errors say for both
    "both": (IMAGES[0], "a dog", OK, OK, OK, []),
    "null caption": (IMAGES[0], None, OK, FAILED, NO_CAPTION, ["caption is null"]),
    "empty caption": (IMAGES[0], "", OK, FAILED, NO_CAPTION, ["caption is empty"]),
    "blank caption": (IMAGES[0], " \t\n", OK, FAILED, NO_CAPTION, ["caption is empty"]),
    "null image": (None, "a dog", FAILED, OK, NO_IMAGE, ["image is null"]),
    "text for an image": (TEXT, "a dog", FAILED, OK, BAD_IMAGE, ["not an image"]),
    "half an image": (IMAGES[0][:200], "a dog", FAILED, OK, BAD_IMAGE, ["cannot be decoded"]),
    "image of no bytes": (b"", "a dog", FAILED, OK, BAD_IMAGE, ["no bytes"]),
    "nothing": (None, None, FAILED, FAILED, FAILED, ["image is null", "caption is null"]),
    "bad image, no caption": (TEXT, "", FAILED, FAILED, FAILED, ["not an image", "caption is empty"]),
}


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_status_says_what_a_row_was_labeled_from(labelers, fusion):
    labeled = labelers[fusion]([row[0] for row in ROWS.values()], [row[1] for row in ROWS.values()])
    column = {"image": 2, "text": 3}.get(fusion, 4)
    expected = {name: row[column] for name, row in ROWS.items()}
    assert dict(zip(ROWS, labeled.statuses, strict=True)) == expected
    assert labeled.valid.tolist() == [status != FAILED for status in expected.values()]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_an_error_says_why_and_only_where_something_is_wrong(labelers, fusion):
    labeled = labelers[fusion]([row[0] for row in ROWS.values()], [row[1] for row in ROWS.values()])
    for status, error, row in zip(labeled.statuses, labeled.errors, ROWS.values(), strict=True):
        assert (error is None) == (status is OK)
        reasons = [part for part in row[5] if fusion not in ("image", "text") or part.startswith(fusion)]
        assert all(part in (error or "") for part in reasons)
        assert "\n" not in (error or "")


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_failed_row_has_no_labels_and_scores_of_zero(labelers, fusion):
    labeled = labelers[fusion]([IMAGES[0], None, TEXT], ["a dog", None, ""])
    assert labeled.statuses == [OK, FAILED, FAILED]
    assert not labeled.scores[1:].any() and not labeled.decided[1:].any() and not labeled.fell_back[1:].any()
    assert labeled.scores[0].all() and labeled.decided[0].any()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_neither_batch_size_nor_neighbours_change_a_rows_scores(labelers, fusion):
    images = [*IMAGES, None, TEXT, IMAGES[1], None, IMAGES[2]]
    captions = [*CAPTIONS, "a dog", "a cat", None, None, ""]
    whole = labelers[fusion](images, captions)
    assert np.unique(whole.scores[:4], axis=0).shape[0] == 4
    for batch_size in (1, 2, 64):
        other = like(labelers[fusion], batch_size=batch_size)(images, captions)
        assert np.allclose(other.scores, whole.scores, atol=1e-5)
        assert (other.statuses, other.errors) == (whole.statuses, whole.errors)
    backwards = labelers[fusion](images[::-1], captions[::-1])
    assert np.allclose(backwards.scores[::-1], whole.scores, atol=1e-5)
    assert backwards.statuses[::-1] == whole.statuses


@pytest.mark.parametrize("fusion", ["image", "text", "cross-attention"])
def test_a_bad_row_does_not_disturb_its_neighbours(labelers, fusion):
    good = labelers[fusion](IMAGES[:2], CAPTIONS[:2])
    mixed = labelers[fusion]([IMAGES[0], TEXT, None, IMAGES[1]], [CAPTIONS[0], None, "", CAPTIONS[1]])
    assert np.allclose(mixed.scores[[0, 3]], good.scores, atol=1e-5)
    assert [mixed.statuses[0], mixed.statuses[3]] == good.statuses == [OK, OK]


@pytest.mark.parametrize("fusion", ["image", "cross-attention"])
def test_several_threads_may_call_it(labelers, fusion):
    labeler = labelers[fusion]
    images, captions = IMAGES * 5, [*CAPTIONS, None] * 4
    alone = labeler(images, captions)
    with ThreadPoolExecutor(8) as callers:
        calls = [callers.submit(labeler, images, captions) for _ in range(40)]
    for call in calls:
        assert np.allclose(call.result().scores, alone.scores, atol=1e-6)
        assert call.result().statuses == alone.statuses


def test_a_row_hangs_when_it_is_decoded_for_too_long_not_when_it_waits_for_a_thread(labelers):
    labeler, released = like(labelers["image"], batch_size=8), threading.Event()
    labeler.decoder.timeout_s = 1.0

    def slowly(data, *given):
        if data == TEXT:
            released.wait(60)
        time.sleep(0.2)
        return decode_row(data, *given)

    labeler.decoder.decode = slowly
    with ThreadPoolExecutor(2) as callers:  # of 16 rows the last ones wait for more than two seconds
        calls = [callers.submit(labeler, IMAGES * 2, CAPTIONS * 2) for _ in range(2)]
    assert all(call.result().statuses == [OK] * 8 for call in calls)
    try:
        with pytest.raises(HungError, match="within 1 s"):
            labeler([IMAGES[0], TEXT], CAPTIONS[:2])
        assert labeler(IMAGES[:2], CAPTIONS[:2]).statuses == [OK] * 2, "others are decoded as before"
    finally:
        released.set()


def test_what_waits_behind_a_row_that_hangs_is_given_up_with_it():
    decoder, released = RowDecoder("image", 32, 1), threading.Event()
    decoder.timeout_s, decoder.decode = 0.5, lambda *given: released.wait(60)
    hung, behind = (decoder.submit([TEXT], [None]) for _ in range(2))
    try:
        with pytest.raises(HungError, match="not decoded within"):
            hung()
        with pytest.raises(HungError, match="another one hung"):
            behind()
    finally:
        released.set()


def test_of_two_rows_that_hang_one_renews_the_threads():
    decoder, released = RowDecoder("image", 32, 2), threading.Event()
    decoder.timeout_s, decoder.decode = 0.5, lambda *given: released.wait(60)
    waiting = [decoder.submit([TEXT], [None]) for _ in range(2)]
    try:
        threads = [decoder.threads]
        for wait in waiting:
            with pytest.raises(HungError, match="not decoded within"):
                wait()
            threads.append(decoder.threads)
        assert threads[0] is not threads[1] is threads[2]
    finally:
        released.set()


def test_rows_that_take_turns_hang_nothing(monkeypatch):
    monkeypatch.setattr("mmray.decoding.DECODE_TIMEOUT_S", 0.5)
    monkeypatch.setattr("mmray.decoding.TURN_S", 1.0)
    decoder, turn = RowDecoder("image", 32, 8), threading.Lock()

    def in_turn(*given):
        with turn:
            time.sleep(0.2)
            return decode_row(*given)

    decoder.decode = in_turn
    assert [row.status for row in decoder.submit([JPEG] * 8, [None] * 8)()] == [OK] * 8


def test_as_many_large_images_as_there_are_threads_have_the_time_to_take_turns():
    seconds = {num_threads: RowDecoder("image", 32, num_threads).timeout_s for num_threads in (1, 4, 64)}
    assert seconds == {1: 30, 4: 30, 64: 320}


@st.composite
def images_of_any_kind(draw):
    """Give None, random bytes, or an image of which bytes are changed, cut off and added."""
    data = draw(st.none() | st.binary(max_size=40) | st.sampled_from([JPEG, IMAGES[1]]))
    if not data:
        return data
    changed = bytearray(data)
    places = st.dictionaries(st.integers(0, len(data) - 1), st.integers(0, 255), max_size=12)
    for place, value in draw(places).items():
        changed[place] = value
    end = draw(st.integers(0, len(data)) | st.just(len(data)))
    return bytes(changed[:end]) + draw(st.binary(max_size=8))


CAPTIONS_OF_ANY_KIND = (
    st.none() | st.text(st.characters(), max_size=40) | st.text(" \t\0\x1b\ud83d", max_size=4)
)


@settings(deadline=None, max_examples=400)
@given(images_of_any_kind(), CAPTIONS_OF_ANY_KIND, st.sampled_from(FUSIONS))
def test_whatever_a_row_holds_it_ends_in_a_status_with_its_reason(image, caption, fusion):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = decode_row(image, caption, fusion, SIZE_PX)
    assert row.pixels is None or (row.pixels.shape, row.pixels.dtype) == ((SIZE_PX, SIZE_PX, 3), np.uint8)
    assert row.caption in (None, caption)
    no_image = fusion != "text" and row.pixels is None
    no_caption = fusion != "image" and row.caption is None
    nothing = row.pixels is None and row.caption is None
    bad = NO_IMAGE if image is None else BAD_IMAGE
    assert row.status == (FAILED if nothing else bad if no_image else NO_CAPTION if no_caption else OK)
    assert (row.error is None) == (row.status is OK)
    reasons = ["image"] * no_image + ["caption"] * no_caption
    assert [part.split()[0] for part in (row.error or "").split("; ") if part][: len(reasons)] == reasons
    assert (row.error or "").isprintable()
    tokenize(TOKENIZER, [row.caption], 12)


def test_captions_that_no_tokenizer_takes_as_they_are_are_labeled_and_disturb_no_neighbour(labelers):
    labeler = labelers["cross-attention"]
    good = labeler(IMAGES[:2], CAPTIONS[:2])
    hostile = ["half a pair \ud83d", "\0\x1b[2J\x7f", "x" * 100_000]
    mixed = labeler([IMAGES[0], *[IMAGES[3]] * len(hostile), IMAGES[1]], [CAPTIONS[0], *hostile, CAPTIONS[1]])
    assert mixed.statuses == [OK] * len(mixed.statuses)
    assert np.isfinite(mixed.scores).all()
    assert np.allclose(mixed.scores[[0, -1]], good.scores, atol=1e-5)


def test_scores_are_those_of_the_model(labelers):
    labeler = labelers["image"]
    pixels = [decode_image(data, SIZE_PX) for data in IMAGES]
    ids = np.ones((4, 2), np.int64)
    with torch.inference_mode():
        logits = labeler.predictor.model(
            make_inputs(pixels, ids, ids, has_caption=[False] * 4, size_px=SIZE_PX)
        )
    labeled = labeler(IMAGES, CAPTIONS)
    assert labeled.scores.dtype == np.float32
    assert np.allclose(labeled.scores, logits.sigmoid().numpy(), atol=1e-5)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_no_rows_give_no_labels(labelers, fusion):
    labeled = labelers[fusion]([], [])
    assert labeled.scores.shape == labeled.decided.shape == (0, len(LABELS))
    assert labeled.scores.dtype == np.float32 and labeled.decided.dtype == labeled.fell_back.dtype == bool
    assert (labeled.statuses, labeled.errors, labeled.valid.tolist()) == ([], [], [])


def with_thresholds(labeler, thresholds):
    bundle = replace(labeler.bundle, thresholds=np.array(thresholds))
    return like(labeler, bundle=bundle)


def test_a_label_is_decided_where_its_score_reaches_its_threshold(labelers):
    scores = labelers["concat"](IMAGES, CAPTIONS).scores
    thresholds = np.median(scores, axis=0).astype(np.float64)
    labeled = with_thresholds(labelers["concat"], thresholds)(IMAGES, CAPTIONS)
    reached = scores >= thresholds.astype(np.float32)
    decided_otherwise = (labeled.decided != reached).any(1)
    assert reached.any() and (decided_otherwise == labeled.fell_back).all()
    assert (labeled.decided == decide(scores, thresholds)[0]).all()


def test_a_row_that_reaches_no_threshold_gets_its_top_label(labelers):
    labeled = with_thresholds(labelers["concat"], [1.0] * len(LABELS))(IMAGES, CAPTIONS)
    assert labeled.fell_back.all() and (labeled.decided.sum(1) == 1).all()
    assert (labeled.decided.argmax(1) == labeled.scores.argmax(1)).all()


def test_half_precision_gives_nearly_the_same_scores(labelers):
    labeler = labelers["cross-attention"]
    half = like(labeler, precision="bf16")(IMAGES, CAPTIONS)
    assert half.scores.dtype == np.float32
    assert np.allclose(half.scores, labeler(IMAGES, CAPTIONS).scores, atol=0.03)


def test_scores_are_calibrated(labelers):
    plain = labelers["concat"]
    calibration = Calibration(np.array([2.0, 1.0, 0.5, 1.0]), np.array([0.0, -1.0, 0.0, 0.0]))
    fitted = like(plain, bundle=replace(plain.bundle, calibration=calibration))
    before, after = (each(IMAGES, CAPTIONS).scores.astype(np.float64) for each in (plain, fitted))
    logits = np.log(before) - np.log1p(-before)
    expected = 1 / (1 + np.exp(-(logits * calibration.scales + calibration.offsets)))
    assert np.allclose(after, expected, atol=1e-5)


def mirrored(data):
    buffer = io.BytesIO()
    ImageOps.mirror(Image.open(io.BytesIO(data))).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("fusion", ["image", "cross-attention"])
def test_flip_averaging_sees_an_image_and_its_mirror_image_alike(labelers, fusion):
    plain, flipping = labelers[fusion], like(labelers[fusion], flip=True)
    mirror_images = [mirrored(data) for data in IMAGES]
    one, other = flipping(IMAGES, CAPTIONS).scores, flipping(mirror_images, CAPTIONS).scores
    assert np.allclose(one, other, atol=1e-5)
    logits = [np.log(s) - np.log1p(-s) for s in (plain(i, CAPTIONS).scores for i in (IMAGES, mirror_images))]
    assert not np.allclose(*logits, atol=1e-3)
    assert np.allclose(np.log(one) - np.log1p(-one), np.mean(logits, axis=0), atol=1e-4)


def table(images, captions):
    return pa.table(
        {
            "image": pa.array(images, pa.binary()),
            "caption": captions,
            DAMAGE: pa.nulls(len(images), pa.string()),
        }
    )


@pytest.mark.parametrize("hidden", ["image", "caption"])
def test_what_is_hidden_is_as_if_it_were_not_there(labelers, hidden):
    kept, nothing = KeptScores.parse("all"), [None] * 4
    label = TableLabeler(labelers["concat"], Columns(), kept)
    hiding = TableLabeler(labelers["concat"], Columns(), kept, hidden)
    shown = label(table(nothing, CAPTIONS) if hidden == "image" else table(IMAGES, nothing))
    for name in ("scores", "status", "predicted_labels"):
        assert hiding(table(IMAGES, CAPTIONS))[name].to_pylist() == shown[name].to_pylist()


@pytest.mark.parametrize("full", [False, True])
def test_images_from_both_decoders_meet_in_a_batch(labelers, monkeypatch, full):
    def no_room(*given):
        raise torch.OutOfMemoryError("as on a GPU that is full")

    if full:
        monkeypatch.setattr(gpu_decoding, "on_device", no_room)
    images, captions = [JPEG, IMAGES[1], None, TEXT, JPEG], [*CAPTIONS, None]
    for fusion in FUSIONS:
        labeler = labelers[fusion]
        beside = labeler(images, captions)
        decoder = gpu_decoding.GpuDecoder(labeler.decoder, torch.device("cpu"))
        monkeypatch.setattr(labeler, "decoder", decoder)
        together = labeler(images, captions)
        assert (together.statuses, together.errors) == (beside.statuses, beside.errors)
        assert np.allclose(together.scores, beside.scores, atol=0.02)


def test_without_a_gpu_none_decodes(labelers):
    with pytest.raises(ConfigError, match="cannot be decoded on a GPU: the device is cpu"):
        Labeler(labelers["image"].bundle, device="cpu", decode_on_gpu=True)


def test_an_unknown_precision_is_refused_by_name(labelers):
    with pytest.raises(ConfigError, match="int4"):
        like(labelers["text"], precision="int4")


def test_a_labeler_loads_from_the_bundles_path(labelers, tmp_path):
    labeler = labelers["logits"]
    loaded = Labeler.load(labeler.bundle.folder.uri, device="cpu", batch_size=2)
    assert np.allclose(loaded(IMAGES, CAPTIONS).scores, labeler(IMAGES, CAPTIONS).scores, atol=1e-5)
    with pytest.raises(BundleError, match="no complete bundle"):
        Labeler.load(str(tmp_path))
