import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmray.images import Augmentation, View, decode_image
from mmray.randaugment import NUM_OPERATIONS, OPERATIONS, apply_operations, draw_operations

MOVES = ("shear-x", "shear-y", "translate-x", "translate-y", "rotate")
BY_SIZE_ALONE = ("posterize", "solarize", "autocontrast", "equalize", "identity")


def picture(width=32, height=24):
    """Give a picture of smooth colours in which no corner is like another, with edges for sharpness."""
    right, down = np.linspace(0, 255, width), np.linspace(0, 255, height)[:, None]
    pixels = np.stack(np.broadcast_arrays(right, down, 255 - (right + down) / 2), 2).astype(np.uint8)
    pixels[::4] //= 2
    return Image.fromarray(pixels)


def seen(name, strength):
    return np.asarray(apply_operations(picture(), ((name, strength),))).astype(int)


@given(st.integers(0, 2**32), st.floats(0.1, 10))
def test_operations_are_known_and_of_the_magnitude_that_was_asked_for(seed, magnitude):
    drawn = draw_operations(np.random.default_rng(seed), magnitude)
    assert len(drawn) == NUM_OPERATIONS
    for name, strength in drawn:
        assert name in OPERATIONS
        assert abs(strength) == pytest.approx(magnitude / 10)
    assert drawn == draw_operations(np.random.default_rng(seed), magnitude)


def test_every_operation_is_drawn_in_both_directions():
    generator = np.random.default_rng(0)
    drawn = {(name, strength > 0) for _ in range(500) for name, strength in draw_operations(generator, 5)}
    assert drawn == {(name, up) for name in OPERATIONS for up in (True, False)}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_keeps_size_and_mode(name):
    for strength in (-1.0, -0.3, 0.3, 1.0):
        image = apply_operations(picture(20, 12), ((name, strength),))
        assert (image.size, image.mode) == ((20, 12), "RGB")


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"autocontrast", "equalize"}))
def test_an_operation_of_no_strength_changes_next_to_nothing(name):
    assert np.abs(seen(name, 0.0) - seen("identity", 0)).max() <= 1


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"identity", "autocontrast"}))
def test_an_operation_of_full_strength_changes_the_picture(name):
    assert np.abs(seen(name, 1.0) - seen("identity", 0)).mean() > 1


@pytest.mark.parametrize("name", OPERATIONS)
def test_strength_has_a_direction_where_it_means_something(name):
    same = (seen(name, 0.8) == seen(name, -0.8)).all()
    assert same == (name in BY_SIZE_ALONE)


@pytest.mark.parametrize("name", MOVES)
def test_moves_in_opposite_directions_mirror_one_another(name):
    """About the middle: moving the mirror image the other way is mirroring what was moved."""
    down = name in ("shear-y", "translate-y")
    flip = Image.Transpose.FLIP_TOP_BOTTOM if down else Image.Transpose.FLIP_LEFT_RIGHT
    image = picture(32, 32)
    one = np.asarray(apply_operations(image, ((name, 0.5),)).transpose(flip)).astype(int)
    other = np.asarray(apply_operations(image.transpose(flip), ((name, -0.5),))).astype(int)
    assert np.abs(one - other)[4:-4, 4:-4].mean() < 2


def test_decoding_applies_what_the_view_drew_and_none_of_it_without():
    file = io.BytesIO()
    picture(64, 64).save(file, "PNG")
    data = file.getvalue()
    view = View(operations=(("posterize", 1.0), ("translate-x", 0.5)))
    plain = decode_image(data, 32)
    expected = apply_operations(Image.fromarray(plain), view.operations)
    assert (decode_image(data, 32, view) == np.asarray(expected)).all()
    assert (decode_image(data, 32, View()) == plain).all()


def test_augmentation_draws_operations_only_when_asked():
    plain = Augmentation(0.6, 0.1).draw(np.random.default_rng(1))
    more = Augmentation(0.6, 0.1, 9).draw(np.random.default_rng(1))
    assert plain.operations == () and len(more.operations) == NUM_OPERATIONS
    assert more._replace(operations=()) == plain
