"""The model: towers, the head that they meet in, and n-grams beside it.

Shapes: B rows, S pixels a side, N image tokens (places of the feature map), T caption tokens, L labels.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mmray.config import ModelConfig
from mmray.fusions import Inputs, Members, OneHead, create_head, fused
from mmray.ngrams import NGrams
from mmray.towers import CaptionTower, CaptionTowers, ImageTower, create_caption_tower


class MultimodalModel(nn.Module):
    """Towers and what stands on them. A tower that the fusion does not use is not there.

    N-grams are a further member where there is a caption: they have a say in labeling, and none in training.
    """

    def __init__(
        self,
        image: ImageTower | None,
        caption: CaptionTower | CaptionTowers | None,
        head: nn.Module,
        ngrams: NGrams | None = None,
    ) -> None:
        """Put the parts together."""
        super().__init__()
        self.image, self.caption, self.head, self.ngrams = image, caption, head, ngrams

    def forward(self, inputs: Inputs) -> Tensor:
        """Turn a batch into logits (B, L)."""
        return self.fuse(*self.towers(inputs), inputs)

    def towers(self, inputs: Inputs) -> tuple[Tensor | None, Tensor | None]:
        """Turn a batch into image tokens (B, N, C) and caption tokens (B, T, D), None without the tower."""
        return (
            self.image(inputs.pixels) if self.image else None,
            self.caption(inputs.input_ids, inputs.attention_mask) if self.caption else None,
        )

    def fuse(self, image: Tensor | None, caption: Tensor | None, inputs: Inputs) -> Tensor:
        """Turn what the towers gave into logits (B, L); of several members in training, (M, B, L)."""
        logits = fused(self.head, image, caption, inputs)
        if self.ngrams is None or self.training:
            return logits
        num_members = len(self.head.heads) if isinstance(self.head, Members) else 1
        linear = self.ngrams(inputs.input_ids, inputs.attention_mask)
        mean = (num_members * logits + linear) / (num_members + 1)
        return torch.where(inputs.has_caption[:, None], mean, logits)

    def readings(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Turn a batch into logits (B, L), and those of the image and of the caption alone (B, 2, L).

        Each tower runs once. A model of one modality has nothing to leave out: (B, 0, L).
        """
        image, caption = self.towers(inputs)
        if image is None or caption is None:
            logits = self.fuse(image, caption, inputs)
            return logits, logits.new_zeros(len(logits), 0, logits.shape[1])
        none = torch.zeros_like(inputs.has_image)
        views = (inputs, inputs._replace(has_caption=none), inputs._replace(has_image=none))
        both, *alone = (self.fuse(image, caption, view) for view in views)
        return both, torch.stack(alone, 1)

    def expect(self, rates: Tensor) -> None:
        """Let new heads start from how frequent each label is: float (L,)."""
        for part in self.head.modules():
            if isinstance(part, OneHead):
                part.expect(rates)

    def num_bytes(self) -> dict[str, int]:
        """Give the size of each part in bytes."""
        return {
            name: sum(tensor.nbytes for tensor in part.state_dict().values())
            for name, part in self.named_children()
        }


def build_model(
    config: ModelConfig, num_labels: int, text_config: dict[str, Any], donated: Collection[str] = ()
) -> MultimodalModel:
    """Build the model that the config describes.

    Args:
        config: what it is made of.
        num_labels: L.
        text_config: what `describe_encoder` gave.
        donated: parts (`image`, `caption`) whose weights will come from elsewhere: none are fetched.

    Raises:
        ConfigError: a tower is unknown, or published weights are out of reach.
    """
    bare = replace(config, pretrained=False)
    image = ImageTower(bare if "image" in donated else config) if "image" in config.towers else None
    if "caption" not in config.towers:
        assert image is not None
        return MultimodalModel(image, None, OneHead(image.width, num_labels, config.dropout))
    as_described = bare if "caption" in donated else config
    captions = [create_caption_tower(as_described, text_config) for _ in range(config.members)]
    heads = [create_head(config, image, caption, num_labels) for caption in captions]
    ngrams = NGrams(text_config["vocab_size"], num_labels) if config.ngrams else None
    if config.members == 1:
        return MultimodalModel(image, captions[0], heads[0], ngrams)
    return MultimodalModel(image, CaptionTowers(captions), Members(heads), ngrams)
