"""Losses against loops over entries in Python floats."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mmray.errors import DataError
from mmray.losses import (
    MAX_CLASS_WEIGHT,
    MIN_CLASS_WEIGHT,
    asymmetric,
    binary_cross_entropy,
    class_weights,
    focal,
)

light = settings(deadline=None, max_examples=50)

SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 4))


def loop(logits, targets, pos_weight, mask):
    """Mean loss of the entries that the mask keeps, one at a time."""
    losses = []
    for row, column in np.argwhere(mask):
        score = 1 / (1 + math.exp(-float(logits[row, column])))
        positive = -float(pos_weight[column]) * math.log(score)
        losses.append(positive if targets[row, column] else -math.log(1 - score))
    return sum(losses) / len(losses) if losses else 0.0


@light
@given(st.data())
def test_loss_is_that_of_a_loop_over_entries(data):
    shape = data.draw(SHAPES)
    logits = data.draw(arrays.arrays(np.float32, shape, elements=st.floats(-8, 8, width=32)))
    targets, mask = (data.draw(arrays.arrays(bool, shape)) for _ in range(2))
    pos_weight = data.draw(arrays.arrays(np.float32, shape[1], elements=st.floats(0.5, 5, width=32)))
    tensors = [torch.from_numpy(array) for array in (logits, targets, pos_weight, mask)]
    weighted = binary_cross_entropy(*tensors)
    assert weighted.item() == pytest.approx(loop(logits, targets, pos_weight, mask), rel=1e-4, abs=1e-6)
    assert weighted == binary_cross_entropy(*tensors[:3], mask=tensors[3].float())
    plain = binary_cross_entropy(*tensors[:2])
    everything = np.ones(shape)
    assert plain.item() == pytest.approx(loop(logits, targets, everything[0], everything), rel=1e-4, abs=1e-6)


def focal_entry(logit, target):
    """Lin et al. 2017, equation 4, for positives and negatives in turn."""
    score = 1 / (1 + math.exp(-logit))
    return -(target * (1 - score) ** 2 * math.log(score) + (1 - target) * score**2 * math.log(1 - score))


def asymmetric_entry(logit, target):
    """Ben-Baruch et al. 2021, equations 5 to 7, with gamma+ = 0, gamma- = 4 and m = 0.05."""
    score = 1 / (1 + math.exp(-logit))
    shifted = max(score - 0.05, 0)
    return -(target * math.log(score) + (1 - target) * shifted**4 * math.log(1 - shifted))


@light
@given(st.data(), st.sampled_from([(focal, focal_entry), (asymmetric, asymmetric_entry)]))
def test_other_losses_are_those_of_a_loop_over_entries(data, pair):
    function, entry = pair
    shape = data.draw(SHAPES)
    logits = data.draw(arrays.arrays(np.float32, shape, elements=st.floats(-8, 8, width=32)))
    targets = data.draw(arrays.arrays(np.float32, shape, elements=st.floats(0, 1, width=32)))
    mask = data.draw(arrays.arrays(bool, shape))
    kept = [entry(float(logits[place]), float(targets[place])) for place in map(tuple, np.argwhere(mask))]
    expected = sum(kept) / len(kept) if kept else 0.0
    tensors = [torch.from_numpy(array) for array in (logits, targets, mask)]
    assert function(*tensors).item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("function", [binary_cross_entropy, focal, asymmetric])
def test_every_loss_falls_towards_the_targets_and_stays_finite(function):
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    losses = [function(sure * (2 * targets - 1), targets).item() for sure in (-1e4, -3, 0, 3, 1e4)]
    assert losses == sorted(losses, reverse=True)
    assert math.isfinite(losses[0]) and losses[-1] == 0
    logits = torch.tensor([[1e4, -1e4]], requires_grad=True)
    function(logits, torch.tensor([[0.0, 1.0]])).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("function", [focal, asymmetric])
def test_the_mean_is_over_labels_not_their_sum_and_masked_entries_have_no_gradient(function):
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = (logits.detach() > 0.3).float()
    assert function(logits, targets).item() == pytest.approx(
        function(logits.repeat(2, 4), targets.repeat(2, 4)).item()
    )
    mask = torch.zeros(5, 3)
    mask[1, 2] = 1
    function(logits, targets, mask=mask).backward()
    assert (logits.grad != 0).tolist() == (mask != 0).tolist()


def test_entries_left_out_have_no_gradient_and_no_say():
    logits = torch.tensor([[1.0, -2.0], [3.0, 0.5]], requires_grad=True)
    targets = torch.tensor([[1, 0], [0, 1]])
    mask = torch.tensor([[1, 0], [1, 1]])
    loss = binary_cross_entropy(logits, targets, mask=mask)
    assert loss == binary_cross_entropy(logits, torch.tensor([[1, 1], [0, 1]]), mask=mask)
    loss.backward()
    assert (logits.grad == 0).tolist() == (mask == 0).tolist()


@pytest.mark.parametrize(("shape", "masked"), [((2, 3), True), ((0, 3), True), ((0, 3), False)])
def test_loss_over_nothing_is_zero_with_a_gradient_of_zero(shape, masked):
    logits = torch.randn(shape, requires_grad=True)
    mask = torch.zeros(shape, dtype=torch.bool) if masked else None
    loss = binary_cross_entropy(logits, torch.ones(shape), mask=mask)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_loss_is_float32_whatever_the_dtype_of_the_logits(dtype):
    # A mean over 70,000 entries would overflow a float16 sum.
    logits = torch.full((7_000, 10), 4.0, dtype=dtype)
    loss = binary_cross_entropy(logits, torch.zeros(7_000, 10, dtype=torch.uint8), mask=torch.ones(7_000, 10))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log1p(math.exp(4)), rel=1e-4)


def test_large_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4]], requires_grad=True)
    loss = binary_cross_entropy(logits, torch.tensor([[0.0, 1.0]]), torch.tensor([5.0, 5.0]))
    loss.backward()
    assert loss.item() == pytest.approx(3e4)
    assert logits.grad.isfinite().all()


@light
@given(st.integers(0, 10**6), st.lists(st.integers(0, 10**6), min_size=1, max_size=6))
def test_class_weights_are_the_clamped_log_of_one_plus_the_odds(num_negatives, positives):
    num_rows = num_negatives + max(positives)
    weights = class_weights(num_rows, positives)
    assert weights.dtype == torch.float32 and weights.shape == (len(positives),)
    for weight, count in zip(weights.tolist(), positives, strict=True):
        formula = math.log(1 + (num_rows - count) / count) if count else math.inf
        assert weight == pytest.approx(min(max(formula, MIN_CLASS_WEIGHT), MAX_CLASS_WEIGHT), rel=1e-6)


def test_class_weights_never_favour_the_commoner_label():
    weights = class_weights(1_000, torch.arange(1_001))
    assert (weights.diff() <= 0).all()


@pytest.mark.parametrize("positives", [[11], [-1], [3, 11]])
def test_counts_that_no_data_has_are_refused(positives):
    with pytest.raises(DataError, match="between 0 and num_rows = 10"):
        class_weights(10, positives)
