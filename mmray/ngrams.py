"""A linear model of the caption's tokens and pairs of neighbours: what counting tells that no tower learned.

It is fitted once, to its optimum, and not by the steps that the towers learn by: these would have to be
larger by orders of magnitude, and leave it worse.

Source: Joulin et al. 2017 (arXiv 1607.01759), bags of hashed n-grams. Ours: tokens in place of words, and
logistic regression with a quadratic penalty in place of a narrow layer and gradient steps.
"""

from __future__ import annotations

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

NUM_PAIRS = 1 << 16
"""Pairs of neighbours are told apart by a hash of so many values."""

PRIME = 1_000_003
"""Spreads the first token of a pair over the hash."""

MIN_ROWS = 2
"""Tokens and pairs that fewer training rows have say nothing."""

PENALTY = 0.1
"""Of half the sum of squared weights, beside the loss summed over rows: the more rows, the less it weighs."""

MAX_ITERATIONS = 100
HISTORY = 10
LABELS_AT_ONCE = 32
"""L-BFGS holds some twenty times their weights."""


class NGrams(nn.Module):
    """Logits of a caption, by tokens and pairs of neighbours."""

    def __init__(self, num_tokens: int, num_labels: int) -> None:
        """Start without an opinion, for token ids below `num_tokens`."""
        super().__init__()
        self.num_tokens = num_tokens
        # No buffers: DDP would send these to all workers with each batch.
        self.weights = nn.Parameter(torch.zeros(num_tokens + NUM_PAIRS, num_labels), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(num_labels), requires_grad=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Turn token ids, int64 (B, T), into logits (B, L)."""
        features, values = features_of(input_ids, attention_mask, self.num_tokens)
        return (self.weights[features] * values[..., None]).sum(1) + self.bias  # which ONNX knows


def features_of(input_ids: Tensor, attention_mask: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Tell which tokens and pairs captions have.

    Returns:
        features: int64 (B, 2 T - 1), rows of the weights.
        values: float32 (B, 2 T - 1), 0 for padding, else such that a caption's vector has length 1, unless it
            says something twice.
    """
    pairs = (input_ids[:, :-1] * PRIME + input_ids[:, 1:]) % NUM_PAIRS + num_tokens
    there = torch.cat([attention_mask, attention_mask[:, :-1] * attention_mask[:, 1:]], 1).float()
    values = there / there.sum(1, keepdim=True).clamp(min=1).sqrt()
    return torch.cat([input_ids, pairs], 1), values


def fit_ngrams(
    input_ids: Tensor,
    attention_mask: Tensor,
    targets: Tensor,
    num_tokens: int,
    rates: Tensor,
    pos_weight: Tensor | None = None,
) -> bytes:
    """Fit the model by L-BFGS.

    Args:
        input_ids: int64 (N, T).
        attention_mask: int64 (N, T).
        targets: float32 (N, L).
        num_tokens: ids are below.
        rates: float32 (L,), how frequent labels are: all that is known of one that no row here bears.
        pos_weight: float32 (L,), of the members' loss.

    Returns:
        The state of an `NGrams`, as safetensors.
    """
    model = NGrams(num_tokens, targets.shape[1])
    model.bias.copy_(rates.logit(eps=1e-6))
    features, values = features_of(input_ids, attention_mask, num_tokens)
    values = values * _frequent(features, values, len(model.weights))[features]
    for labels in targets.any(0).nonzero()[:, 0].split(LABELS_AT_ONCE):
        weigh = None if pos_weight is None else pos_weight[labels]
        start = model.weights[:, labels], model.bias[labels]
        model.weights[:, labels], model.bias[labels] = _fit(
            features, values, targets[:, labels], weigh, *start
        )
    return safetensors.torch.save(model.state_dict())


def _frequent(features: Tensor, values: Tensor, num_features: int) -> Tensor:
    """Tell which features at least MIN_ROWS rows have: bool (F,)."""
    ordered = features.masked_fill(values == 0, num_features).sort(1).values
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.bincount(ordered[first], minlength=num_features + 1)[:num_features] >= MIN_ROWS


def _fit(
    features: Tensor,
    values: Tensor,
    targets: Tensor,
    pos_weight: Tensor | None,
    weights: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor]:
    weights, bias = weights.clone().requires_grad_(), bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights, bias], max_iter=MAX_ITERATIONS, history_size=HISTORY, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        # As in `forward`, without a copy of the weights for each token.
        logits = functional.embedding_bag(features, weights, per_sample_weights=values, mode="sum") + bias
        summed = functional.binary_cross_entropy_with_logits(
            logits, targets, pos_weight=pos_weight, reduction="sum"
        )
        total = (summed + PENALTY / 2 * weights.square().sum()) / len(targets)
        total.backward()
        return total

    optimizer.step(loss)
    return weights.detach(), bias.detach()
