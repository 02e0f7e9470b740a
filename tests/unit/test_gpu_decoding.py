"""JPEGs decoded in batches: pixels near to Pillow's, and everything else as Pillow has it.

On a machine without a GPU torchvision's decoder for CPUs stands in for the GPU's.
"""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from mmray import gpu_decoding
from mmray.decoding import RowDecoder
from mmray.gpu_decoding import GpuDecoder
from mmray.images import decode_image
from mmray.schema import Status

SIZE_PX = 96


def encoded(seed, size=(320, 240), kind="JPEG", **settings):
    """Give a picture of soft colours, with some grain."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), np.uint8))
    pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
    grain = generator.integers(-8, 9, pixels.shape)
    buffer = io.BytesIO()
    Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(buffer, kind, **settings)
    return buffer.getvalue()


@pytest.fixture(params=["cpu", "cuda"])
def decoder(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    return GpuDecoder(RowDecoder("cross-attention", SIZE_PX, 2), torch.device(request.param))


def on_host(row):
    assert isinstance(row.pixels, torch.Tensor)
    return row.pixels.cpu().numpy()


@pytest.mark.parametrize(
    ("settings", "mean", "most"),
    [
        ({}, 1, 6),
        ({"quality": 95, "subsampling": 0}, 1, 6),
        ({"size": (1600, 1200)}, 1, 6),
        ({"progressive": True}, 1, 6),
        # Enlarged, colours show how they were held at half the size: a GPU repeats, libjpeg blends them.
        ({"size": (30, 700)}, 8, 60),
        ({"size": (40, 30)}, 8, 60),
        ({"size": (40, 30), "subsampling": 0}, 1, 6),
    ],
)
def test_pixels_are_nearly_pillows(decoder, settings, mean, most):
    images = [encoded(seed, **settings) for seed in range(20)]
    rows = decoder.submit(images, ["a dog"] * 20)()
    assert [row.status for row in rows] == [Status.OK] * 20
    ours = np.stack([decode_image(image, SIZE_PX) for image in images]).astype(int)
    apart = np.abs(np.stack([on_host(row) for row in rows]) - ours)
    assert apart.mean() < mean
    assert np.quantile(apart, 0.999) < most


def test_grey_is_grey(decoder):
    buffer = io.BytesIO()
    Image.open(io.BytesIO(encoded(0))).convert("L").save(buffer, "JPEG")
    (row,) = decoder.submit([buffer.getvalue()], [None])()
    pixels = on_host(row).astype(int)
    assert pixels.shape == (SIZE_PX, SIZE_PX, 3)
    assert np.ptp(pixels, axis=2).max() == 0
    assert np.abs(pixels - decode_image(buffer.getvalue(), SIZE_PX)).mean() < 1


def test_all_but_plain_jpegs_is_decoded_beside(decoder):
    whole = encoded(1)
    images = [whole, None, b"", whole[:3000], encoded(2, kind="PNG"), encoded(3)]
    captions = ["a", "b", None, "d", "e", "f"]
    rows = decoder.submit(images, captions)()
    expected = decoder.rows.submit(images, captions)()
    assert [row._replace(pixels=None) for row in rows] == [row._replace(pixels=None) for row in expected]
    assert [isinstance(row.pixels, torch.Tensor) for row in rows] == [True, *[False] * 4, True]
    assert np.array_equal(rows[4].pixels, expected[4].pixels)


@pytest.mark.parametrize("refused", [set(), {0}, {6}, {2, 3}, set(range(7))])
def test_what_is_refused_takes_none_of_its_batch_along(decoder, monkeypatch, refused):
    images, decode = [encoded(seed) for seed in range(7)], gpu_decoding.decode_jpeg

    def refusing(batch, *given):
        if any(images.index(each.numpy().tobytes()) in refused for each in batch):
            raise RuntimeError("nvJPEG refuses this batch")
        return decode(batch, *given)

    monkeypatch.setattr(gpu_decoding, "decode_jpeg", refusing)
    rows = decoder.submit(images, [None] * 7)()
    assert [isinstance(row.pixels, torch.Tensor) for row in rows] == [row not in refused for row in range(7)]
    for row in refused:
        assert np.array_equal(rows[row].pixels, decode_image(images[row], SIZE_PX))


def test_many_batches_at_once_are_told_apart(decoder):
    images = [encoded(seed, size=(64, 48)) for seed in range(100)]
    (alone,) = zip(*[decoder.submit([image], [None])() for image in images], strict=True)
    waiting = [decoder.submit(images[start:] + images[:start], [None] * 100) for start in range(0, 100, 7)]
    for start, rows in zip(range(0, 100, 7), waiting, strict=True):
        for row, expected in zip(rows(), alone[start:] + alone[:start], strict=True):
            assert torch.equal(row.pixels, expected.pixels)
