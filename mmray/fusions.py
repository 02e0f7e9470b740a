"""Heads: five ways for an image tower and a caption tower to meet.

Shapes: B rows, S pixels a side, N image tokens (places of the feature map), T caption tokens, L labels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmray.config import ModelConfig
from mmray.towers import CaptionTower, ImageTower


class Inputs(NamedTuple):
    """One batch, as the model takes it. Rows without an image or caption hold anything there."""

    pixels: Tensor
    """uint8 (B, S, S, 3)."""
    has_image: Tensor
    """bool (B,)."""
    input_ids: Tensor
    """int64 (B, T)."""
    attention_mask: Tensor
    """int64 (B, T)."""
    has_caption: Tensor
    """bool (B,)."""

    def to(self, device: torch.device) -> Inputs:
        """Copy the batch to a device; asynchronously from pinned memory."""
        return Inputs(*(part.to(device, non_blocking=True) for part in self))


class OneHead(nn.Module):
    """Logits of one modality."""

    def __init__(self, width: int, num_labels: int, dropout: float) -> None:
        """Take features of this width."""
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Dropout(dropout), nn.Linear(width, num_labels))

    def expect(self, rates: Tensor) -> None:
        """Start from how frequent each label is, float (L,), so that no step is spent on learning just that.

        Source: Lin et al. 2017 (arXiv 1708.02002), their prior on the output's bias.
        """
        output = self.layers[-1]
        assert isinstance(output, nn.Linear)
        with torch.no_grad():
            output.bias.copy_(rates.logit(eps=1e-6))

    def forward(self, features: Tensor) -> Tensor:
        """Turn features (B, C) into logits (B, L)."""
        return self.layers(features)


class MeanOfLogits(nn.Module):
    """Simple fusion: each modality gives logits, and those that are there are averaged.

    Source: arXiv 2501.01611, "simple fusion"; that an absent modality has no say is ours.
    """

    def __init__(self, image_width: int, caption_width: int, num_labels: int, dropout: float) -> None:
        """Make a head for each modality."""
        super().__init__()
        self.image_head = OneHead(image_width, num_labels, dropout)
        self.caption_head = OneHead(caption_width, num_labels, dropout)

    def forward(self, image: Tensor, caption: Tensor, inputs: Inputs) -> Tensor:
        """Fuse image tokens (B, N, C) and caption tokens (B, T, D) to logits (B, L)."""
        by_image = self.image_head(image.mean(1))
        by_caption = self.caption_head(masked_mean(caption, inputs.attention_mask))
        seen, read = inputs.has_image[:, None].to(by_image), inputs.has_caption[:, None].to(by_image)
        return (by_image * seen + by_caption * read) / (seen + read).clamp(min=1)


class Concat(nn.Module):
    """Features of both modalities side by side, then two layers. A missing one has a learned stand-in."""

    def __init__(self, image_width: int, caption_width: int, num_labels: int, config: ModelConfig) -> None:
        """Project both to the width of the fusion."""
        super().__init__()
        self.image_projection = _projection(image_width, config.width)
        self.caption_projection = _projection(caption_width, config.width)
        self.no_image = _stand_in(config.width)
        self.no_caption = _stand_in(config.width)
        self.hidden = nn.Sequential(nn.Linear(2 * config.width, config.width), nn.GELU())
        self.head = OneHead(config.width, num_labels, config.dropout)

    def forward(self, image: Tensor, caption: Tensor, inputs: Inputs) -> Tensor:
        """Fuse image tokens (B, N, C) and caption tokens (B, T, D) to logits (B, L)."""
        seen = self.image_projection(image.mean(1))
        read = self.caption_projection(masked_mean(caption, inputs.attention_mask))
        seen = torch.where(inputs.has_image[:, None], seen, self.no_image.to(seen))
        read = torch.where(inputs.has_caption[:, None], read, self.no_caption.to(read))
        return self.head(self.hidden(torch.cat([seen, read], 1)))


class CrossAttention(nn.Module):
    """The caption asks, the image answers.

    Queries come from the caption's tokens; keys and values from two parallel blocks over the image's; a
    residual path takes the caption through a block of its own and is added to the attention's output; then
    a feed-forward layer, the mean over the caption's tokens, and the output.

    Source: arXiv 2501.01611, "cross-attention fusion". Ours: keys and values are the places of the feature
    map (one pooled key would make attention a constant), pre-norm, an additive residual, and learned
    stand-ins for a missing modality.
    """

    def __init__(self, image_width: int, caption_width: int, num_labels: int, config: ModelConfig) -> None:
        """Project everything to the width of the fusion."""
        super().__init__()
        width = config.width
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.query = _projection(caption_width, width)
        self.key = _projection(image_width, width)
        self.value = _projection(image_width, width)
        self.residual = nn.Sequential(_projection(caption_width, width), nn.GELU())
        self.attended = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(2 * width, width),
        )
        self.no_image = _stand_in(image_width)
        self.no_caption = _stand_in(caption_width)
        self.head = OneHead(width, num_labels, config.dropout)

    def forward(self, image: Tensor, caption: Tensor, inputs: Inputs) -> Tensor:
        """Fuse image tokens (B, N, C) and caption tokens (B, T, D) to logits (B, L)."""
        image = torch.where(inputs.has_image[:, None, None], image, self.no_image.to(image))
        caption = torch.where(inputs.has_caption[:, None, None], caption, self.no_caption.to(caption))
        answer = functional.scaled_dot_product_attention(
            self._heads(self.query(caption)),
            self._heads(self.key(image)),
            self._heads(self.value(image)),
            dropout_p=self.dropout if self.training else 0.0,
        )
        fused = self.residual(caption) + self.attended(answer.transpose(1, 2).flatten(2))
        fused = fused + self.feed_forward(fused)
        return self.head(masked_mean(fused, inputs.attention_mask))

    def _heads(self, tokens: Tensor) -> Tensor:
        """Split tokens (B, N, C) into heads (B, H, N, C / H)."""
        return tokens.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class Members(nn.Module):
    """Heads that read a caption tower each, and share the image tower. They learn apart and answer together.

    Source: Lakshminarayanan et al. 2017 (arXiv 1612.01474), deep ensembles. Ours: the image tower is shared,
    and logits are averaged in place of scores. With published weights caption towers start alike, and only
    the heads and dropout tell them apart.
    """

    def __init__(self, heads: Iterable[nn.Module]) -> None:
        """Take the heads, of M members."""
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, image: Tensor | None, caption: Tensor, inputs: Inputs) -> Tensor:
        """Fuse image tokens (B, N, C) and caption tokens (B, T, M * D).

        Returns:
            logits: (B, L), the members' mean; in training (M, B, L), so that each has a loss of its own.
        """
        captions = caption.chunk(len(self.heads), 2)
        logits = torch.stack(
            [fused(head, image, own, inputs) for head, own in zip(self.heads, captions, strict=True)]
        )
        return logits if self.training else logits.mean(0)


def create_head(
    config: ModelConfig, image: ImageTower | None, caption: CaptionTower, num_labels: int
) -> nn.Module:
    """Build what reads a caption tower, and the image tower where there is one."""
    if image is None:
        return OneHead(caption.width, num_labels, config.dropout)
    if config.fusion == "logits":
        return MeanOfLogits(image.width, caption.width, num_labels, config.dropout)
    kind = Concat if config.fusion == "concat" else CrossAttention
    return kind(image.width, caption.width, num_labels, config)


def fused(head: nn.Module, image: Tensor | None, caption: Tensor | None, inputs: Inputs) -> Tensor:
    """Let a head turn image tokens (B, N, C) and caption tokens (B, T, D) into logits; one may be None."""
    if caption is None:
        assert image is not None
        return head(image.mean(1))
    if image is None and not isinstance(head, Members):
        return head(masked_mean(caption, inputs.attention_mask))
    return head(image, caption, inputs)


def masked_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Average tokens (B, T, C) where the mask (B, T) is 1: (B, C)."""
    weights = mask[..., None].to(tokens)
    return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)


def _projection(width: int, fused: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, fused))


def _stand_in(width: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(width) * 0.02)
