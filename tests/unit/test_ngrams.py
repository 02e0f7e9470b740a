"""The linear model of n-grams, held against scikit-learn's of the same features."""

import numpy as np
import pytest
import safetensors.torch
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from mmray import ngrams
from mmray.ngrams import MIN_ROWS, PENALTY, NGrams, fit_ngrams

NUM_TOKENS, NUM_ROWS, NUM_LABELS, LENGTH = 30, 400, 3, 8


@pytest.fixture(scope="module")
def rows():
    """Draw captions, padded, of which labels tell a token, a pair, and both with some noise."""
    draw = np.random.default_rng(0)
    ids = draw.zipf(1.5, (NUM_ROWS, LENGTH)).clip(1, NUM_TOKENS - 1)
    mask = (np.arange(LENGTH) < draw.integers(2, LENGTH + 1, (NUM_ROWS, 1))).astype(np.int64)
    ids *= mask
    token = (ids == 2).any(1)
    pair = ((ids[:, :-1] == 1) & (ids[:, 1:] == 1)).any(1)
    targets = np.stack([token, pair, token | pair], 1) ^ (draw.random((NUM_ROWS, NUM_LABELS)) < 0.1)
    return torch.tensor(ids), torch.tensor(mask), torch.tensor(targets).float()


def fitted(ids, mask, targets, pos_weight=None):
    model, rates = NGrams(NUM_TOKENS, targets.shape[1]), targets.mean(0).clamp(min=0.01)
    state = fit_ngrams(ids, mask, targets, NUM_TOKENS, rates, pos_weight)
    model.load_state_dict(safetensors.torch.load(state))
    return model


@pytest.mark.parametrize("weight", [1, 3])
def test_it_is_logistic_regression_on_tokens_and_pairs(rows, weight):
    ids, mask, targets = rows
    texts = [
        " ".join(f"t{token}" for token in row[kept.bool()].tolist())
        for row, kept in zip(ids, mask, strict=True)
    ]
    counter = CountVectorizer(ngram_range=(1, 2), min_df=MIN_ROWS)
    lengths = np.array([2 * len(text.split()) - 1 for text in texts])
    features = counter.fit_transform(texts).multiply(1 / np.sqrt(lengths)[:, None]).tocsr()
    ours = fitted(*rows, torch.full((NUM_LABELS,), float(weight)) if weight > 1 else None)(ids, mask).numpy()
    for label in range(NUM_LABELS):
        theirs = LogisticRegression(C=1 / PENALTY, class_weight={1: weight}, tol=1e-8, max_iter=10_000)
        theirs.fit(features, targets[:, label])
        assert ours[:, label] == pytest.approx(theirs.decision_function(features), abs=0.02)


def test_padding_and_neighbours_change_nothing(rows):
    ids, mask, _ = rows
    model = fitted(*rows)
    length = int(mask[0].sum())
    alone = model(ids[:1, :length], mask[:1, :length])
    assert torch.allclose(alone[0], model(ids, mask)[0], atol=1e-6)
    left = torch.stack([row.roll(-int(kept.sum())) for row, kept in zip(ids, mask, strict=True)])
    padded = torch.stack([kept.roll(-int(kept.sum())) for kept in mask])
    assert (padded[:, 0] == 0).any() and torch.allclose(model(left, padded), model(ids, mask), atol=1e-6)


def test_of_a_label_that_no_row_bears_only_its_rate_is_known(rows):
    ids, mask, targets = (part.clone() for part in rows)
    targets[:, 1] = 0
    model = fitted(ids, mask, targets)
    assert not model.weights[:, 1].any() and model.weights[:, 0].any()
    assert float(model.bias[1].sigmoid()) == pytest.approx(0.01)


def test_what_only_one_row_has_says_nothing(rows):
    ids, mask, targets = (part.clone() for part in rows)
    ids[ids == NUM_TOKENS - 1] = 1
    ids[0, :2], ids[0, 2:], mask[0] = NUM_TOKENS - 1, 0, torch.arange(LENGTH) < 2
    model = fitted(ids, mask, targets)
    assert not model.weights[NUM_TOKENS - 1].any() and model.weights[1].all()
    assert torch.equal(model(ids[:1], mask[:1])[0], model.bias)


def test_labels_that_are_fitted_apart_are_as_those_fitted_together(rows, monkeypatch):
    ids, mask, _ = rows
    together = fitted(*rows)(ids, mask)
    monkeypatch.setattr(ngrams, "LABELS_AT_ONCE", 2)
    assert torch.allclose(fitted(*rows)(ids, mask), together, atol=0.02)
