"""Bytes to pixels: every format, mode and orientation; damage; augmentation."""

import io
import re
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, features

from mmray.errors import DataError
from mmray.images import MAX_PIXELS, ONE_LARGE, Augmentation, View, decode_image

light = settings(deadline=None, max_examples=100)

FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"] + ["AVIF"] * features.check("avif")


def encoded(image, kind="PNG", **settings):
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def scene(width=48, height=32):
    """Give an image of smooth colours in which no corner is like another."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - (x + y) / 2], 2).astype(np.uint8))


def close(one, other, tolerance):
    """Tell whether pixels are alike on average."""
    return one.shape == other.shape and np.abs(one.astype(int) - other.astype(int)).mean() <= tolerance


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_square(kind):
    pixels = decode_image(encoded(scene(), kind), 24)
    assert pixels.shape == (24, 24, 3) and pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    assert close(pixels, decode_image(encoded(scene()), 24), 8)  # a GIF has 256 colours


@pytest.mark.parametrize(
    ("mode", "kind"), [("L", "PNG"), ("L", "JPEG"), ("1", "PNG"), ("1", "TIFF"), ("LA", "PNG")]
)
def test_grey_stays_grey(mode, kind):
    image = Image.new("L", (20, 10), 255)
    image.paste(0, (0, 0, 10, 10))
    pixels = decode_image(encoded(image.convert(mode), kind), 20)
    assert (pixels[:, 1] < 5).all() and (pixels[:, -2] > 250).all()


def test_cmyk_becomes_the_colours_that_it_prints():
    for kind in ("JPEG", "TIFF"):
        pixels = decode_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), kind), 8)
        assert close(pixels, np.full((8, 8, 3), (255, 0, 0)), 6)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_what_is_transparent_shows_white(kind):
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 8, 16))
    settings = {"lossless": True} if kind == "WEBP" else {}
    pixels = decode_image(encoded(image, kind, **settings), 16)
    assert (pixels[:, :6] == (255, 0, 0)).all() and (pixels[:, 10:] == 255).all()


def test_what_is_half_transparent_is_mixed_with_white():
    for image in (Image.new("RGBA", (4, 4), (0, 0, 0, 128)), Image.new("LA", (4, 4), (0, 128))):
        assert close(decode_image(encoded(image), 4), np.full((4, 4, 3), 127), 1)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_colour_of_a_palette_shows_white(kind):
    image = Image.new("P", (16, 16), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.paste(1, (0, 0, 8, 16))
    assert (decode_image(encoded(image, kind), 16)[:, 10:] == 0).all()
    pixels = decode_image(encoded(image, kind, transparency=0), 16)
    assert (pixels[:, :6] == (255, 0, 0)).all() and (pixels[:, 10:] == 255).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_a_gradient_of_16_bits_keeps_its_tones(kind):
    tones = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (256, 1))
    image = Image.fromarray(tones)
    assert image.mode == "I;16"
    pixels = decode_image(encoded(image, kind), 256)
    assert np.abs(pixels[128, :, 0].astype(int) - np.arange(256)).max() <= 1


@pytest.mark.parametrize("colour_type", [2, 6])
def test_colours_of_16_bits_keep_their_tones(colour_type):
    tones = np.linspace(0, 65535, 64).astype(">u2")
    rows = np.full((64, 64, 4), 65535, ">u2")
    rows[..., 0], rows[..., 1] = tones, tones[::-1]
    rows = rows if colour_type == 6 else rows[..., :3]
    scanlines = b"".join(b"\0" + row.tobytes() for row in rows)
    pixels = decode_image(png(64, 64, scanlines, depth=16, colour_type=colour_type), 64)
    expected = np.stack([tones // 257, tones[::-1] // 257, np.full(64, 255)], 1)
    assert np.abs(pixels[32].astype(int) - expected.astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("GIF", {}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        pytest.param("AVIF", {}, marks=pytest.mark.skipif("AVIF" not in FORMATS, reason="no AVIF here")),
    ],
)
def test_of_an_animation_the_first_picture_is_shown(kind, settings):
    first, *others = (Image.new("RGB", (40, 20), colour) for colour in ("red", "lime", "blue"))
    data = encoded(first, kind, save_all=True, append_images=others, **settings)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    assert close(decode_image(data, 8), np.full((8, 8, 3), (255, 0, 0)), 2)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_gives_the_same_upright_picture(orientation, kind):
    turns = Image.Transpose
    stored = {  # how a camera held that way stores the upright picture
        1: None,
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_90,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_270,
    }[orientation]
    upright = scene(40, 24)
    image = upright if stored is None else upright.transpose(stored)
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode_image(encoded(image, kind, exif=exif), 24)
    assert close(pixels, decode_image(encoded(upright), 24), 6)


def test_an_orientation_that_does_not_exist_turns_nothing():
    exif = Image.Exif()
    exif[0x0112] = 9
    assert (decode_image(encoded(scene(), exif=exif), 16) == decode_image(encoded(scene()), 16)).all()


def test_a_single_pixel_fills_the_square():
    pixels = decode_image(encoded(Image.new("RGB", (1, 1), (10, 20, 30))), 32)
    assert (pixels == (10, 20, 30)).all()


@pytest.mark.parametrize("size", [(200, 8), (8, 200), (640, 480), (32, 32)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_an_oblong_image_is_squeezed_and_keeps_its_edges(size, kind):
    width, height = size
    image = Image.new("RGB", size, (255, 0, 0))
    image.paste((0, 0, 255), (0, height // 2, width, height))
    image.paste((0, 255, 0), (0, 0, width // 4, height))
    settings = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    pixels = decode_image(encoded(image, kind, **settings), 16)
    assert close(pixels[:, :3], np.full((16, 3, 3), (0, 255, 0)), 8)
    assert close(pixels[:7, 5:], np.full((7, 11, 3), (255, 0, 0)), 8)
    assert close(pixels[9:, 5:], np.full((7, 11, 3), (0, 0, 255)), 8)


@pytest.mark.parametrize(("progressive", "waits"), [(False, False), (True, True)])
def test_only_what_takes_much_memory_is_decoded_one_at_a_time(progressive, waits):
    data = encoded(Image.new("RGB", (6000, 4000), (10, 20, 30)), "JPEG", progressive=progressive)
    with ThreadPoolExecutor(1) as threads:
        with ONE_LARGE:
            decoding = threads.submit(decode_image, data, 32)
            assert wait([decoding], 5).not_done == ({decoding} if waits else set())
        assert close(decoding.result(), np.full((32, 32, 3), (10, 20, 30)), 2)


def test_a_large_jpeg_gives_what_its_exact_copy_gives():
    image = scene(900, 700)
    reduced, exact = decode_image(encoded(image, "JPEG", quality=95), 32), decode_image(encoded(image), 32)
    assert close(reduced, exact, 2)


def chunk(kind, data):
    """Give a part of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, scanlines, *, depth=8, colour_type=2):
    """Give a PNG of these scanlines, however many the header promises."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", zlib.compress(scanlines)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_460, 10_000, 60_000, 2**31 - 1])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_above_the_limit_is_refused_by_its_header(side):
    assert side * side > MAX_PIXELS
    with pytest.raises(DataError, match=f"limit of {MAX_PIXELS}"):
        decode_image(png(side, side, b"\0"), 16)


def test_a_picture_of_20000_by_20000_pixels_is_refused_and_one_within_the_limit_is_not():
    def bomb(side):
        return png(side, side, bytes((1 + side // 8) * side), depth=1, colour_type=0)

    data = bomb(20_000)
    assert len(data) < 100_000  # and would be 1.2 GB of pixels
    with pytest.raises(DataError, match=f"limit of {MAX_PIXELS}"):
        decode_image(data, 16)
    assert not decode_image(bomb(8_000), 16).any()


def test_text_that_is_packed_a_thousandfold_into_an_image_is_refused():
    whole = encoded(scene())
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100 << 20)))
    with pytest.raises(DataError, match="image cannot be decoded"):
        decode_image(whole[:33] + bomb + whole[33:], 16)


def damaged():
    jpeg = encoded(scene(), "JPEG")
    return {
        "no bytes": b"",
        "one byte": b"\xff",
        "text": b"<html>404 not found</html>",
        "zeros": bytes(1000),
        "a JPEG without its end": jpeg[:-40],
        "a PNG without an image": png(16, 16, b"\0"),
        "a PNG without pixels": png(0, 16, b""),
        **{f"half a {kind}": (data := encoded(scene(), kind))[: len(data) // 2] for kind in FORMATS},
    }


@pytest.mark.parametrize("data", [pytest.param(data, id=name) for name, data in damaged().items()])
def test_damage_is_one_line_that_says_why(data):
    with pytest.raises(DataError) as caught:
        decode_image(data, 16)
    message = str(caught.value)
    assert (
        message == "image has no bytes"
        if not data
        else re.fullmatch(r"image cannot be decoded: \S.*", message)
    )
    assert len(message) < 300


def test_formats_that_call_other_programs_are_not_opened():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    with pytest.raises(DataError, match="known format"):
        decode_image(postscript, 16)


JPEG = encoded(scene(24, 16), "JPEG")


@settings(deadline=None, max_examples=300)
@given(
    changes=st.dictionaries(st.integers(0, len(JPEG) - 1), st.integers(0, 255), max_size=12),
    stop=st.integers(0, len(JPEG)) | st.just(len(JPEG)),
    tail=st.binary(max_size=8),
)
def test_bytes_of_a_mutated_jpeg_give_pixels_or_a_data_error(changes, stop, tail):
    mutated = bytearray(JPEG)
    for place, value in changes.items():
        mutated[place] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pixels = decode_image(bytes(mutated[:stop]) + tail, 8)
        except DataError as error:
            assert "\n" not in str(error)
        else:
            assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8


AUGMENTATIONS = st.builds(Augmentation, crop=st.floats(0.05, 1), colour=st.floats(0, 1))


@light
@given(AUGMENTATIONS, st.integers(0, 2**32))
def test_a_view_stays_within_its_bounds(augmentation, seed):
    view = augmentation.draw(np.random.default_rng(seed))
    left, top, right, bottom = view.box
    assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
    width, height = right - left, bottom - top
    assert min(augmentation.crop, 3 / 4) - 1e-9 <= width * height <= 1 + 1e-9
    assert 3 / 4 - 1e-9 <= width / height <= 4 / 3 + 1e-9
    for factor in (view.brightness, view.contrast, view.saturation):
        assert abs(factor - 1) <= augmentation.colour


@light
@given(AUGMENTATIONS, st.integers(0, 2**32))
def test_the_same_seed_draws_the_same_views(augmentation, seed):
    one, other = np.random.default_rng(seed), np.random.default_rng(seed)
    views = [augmentation.draw(one) for _ in range(3)]
    assert views == [augmentation.draw(other) for _ in range(3)]
    assume(augmentation.crop < 0.95)
    assert len(set(views)) == 3


@light
@given(st.integers(0, 2**32))
def test_augmentation_that_is_off_only_mirrors(seed):
    view = Augmentation(crop=1, colour=0).draw(np.random.default_rng(seed))
    assert view in (View(), View(mirrored=True))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [(48, 32), (400, 300)])
def test_the_view_of_everything_is_the_plain_decode(kind, size):
    data = encoded(scene(*size), kind)
    assert (decode_image(data, 20, View()) == decode_image(data, 20)).all()


def test_a_mirrored_view_is_the_mirror_image():
    data, mirrored = encoded(scene()), encoded(scene().transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    pixels = decode_image(data, 20, View(mirrored=True))
    assert (pixels == decode_image(data, 20)[:, ::-1]).all()
    assert close(pixels, decode_image(mirrored, 20), 1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_crop_shows_its_part_of_the_image(kind):
    image = scene(320, 200)
    part = image.crop((80, 50, 240, 150))
    pixels = decode_image(encoded(image, kind), 16, View(box=(0.25, 0.25, 0.75, 0.75)))
    assert close(pixels, decode_image(encoded(part), 16), 3)


def test_colours_change_as_their_factors_say():
    data = encoded(scene())
    plain = decode_image(data, 16).astype(float)

    def seen(**factors):
        return decode_image(data, 16, View(**factors)).astype(float)

    assert close(seen(brightness=0.5), plain / 2, 1)
    assert np.ptp(seen(saturation=0.0), axis=2).max() <= 1
    assert seen(contrast=0.0).std() <= 1 or np.ptp(seen(contrast=0.0, saturation=0.0)) <= 1
    assert seen(contrast=0.5).std() < plain.std() < seen(contrast=1.5).std()
    assert seen(brightness=2.0).max() == 255


@light
@given(AUGMENTATIONS, st.integers(0, 2**32))
def test_every_view_of_every_shape_is_a_square(augmentation, seed):
    generator = np.random.default_rng(seed)
    data = encoded(scene(*generator.integers(1, 40, 2)), "JPEG")
    pixels = decode_image(data, 12, augmentation.draw(generator))
    assert pixels.shape == (12, 12, 3) and pixels.dtype == np.uint8 and pixels.flags.c_contiguous
