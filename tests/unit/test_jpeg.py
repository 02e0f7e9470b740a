"""What JPEGs' headers tell: which ones any decoder shows alike."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmray.jpeg import plain_size


def encoded(mode="RGB", kind="JPEG", size=(40, 30), **settings):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **settings)
    return buffer.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


JPEG = encoded()
FRAME = JPEG[JPEG.index(b"\xff\xc0") :][:19]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mode": "L"},
        {"size": (1, 70)},
        {"progressive": True},
        {"subsampling": 0},
        {"comment": b"of a dog"},
        {"exif": turned(1)},
        {"exif": Image.Exif()},
    ],
)
def test_plain_jpegs_tell_their_size(settings):
    assert plain_size(encoded(**settings)) == settings.get("size", (40, 30))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8\xff\xd9",
        b"\xff\xd8\xff\xe0\x00\x00\xff\xd9",
        b"<html>404 not found</html>",
        encoded(kind="PNG"),
        encoded(mode="CMYK"),
        encoded(keep_rgb=True),
        encoded(exif=turned(6)),
        JPEG[:-2],
        JPEG[:100] + b"\xff\xd9",
        encoded(xmp=b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"/>'),
        JPEG.replace(FRAME, FRAME * 2),
        JPEG[:4] + b"\x00\x07" + JPEG[6:],
        JPEG[:2] + b"\xff\x01\x00\x02" + JPEG[2:],
        JPEG.replace(b"\xff\xdb", b"\xff\xfe"),
        JPEG.replace(b"\xff\xc4", b"\xff\xfe"),
        JPEG.replace(b"\xff\xc0", b"\xff\xc9"),
    ],
)
def test_all_else_is_left_to_pillow(data):
    assert plain_size(data) is None


@given(st.integers(0, len(JPEG)), st.integers(0, 40), st.binary(max_size=8))
def test_damage_is_survived(at, length, put):
    size = plain_size(JPEG[:at] + put + JPEG[at + length :])
    assert size is None or min(size) > 0
