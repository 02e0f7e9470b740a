"""The model: an image tower, a caption tower, and five ways for them to meet.

Shapes: B rows, S pixels a side, N image tokens (places of the feature map), T caption tokens, L labels.
"""

from __future__ import annotations

import re
import socket
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmray.config import ModelConfig
from mmray.errors import ConfigError

_BERT_MINIATURE = re.compile(r"(?:.*/)?bert_uncased_L-(\d+)_H-(\d+)_A-(\d+)")


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


class ImageTower(nn.Module):
    """A timm backbone whose feature map is read as tokens."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig) -> None:
        """Build the backbone.

        Raises:
            ConfigError: timm knows no such model, or its weights are out of reach.
        """
        super().__init__()
        self.backbone = _create_backbone(config)
        self.width: int = self.backbone.num_features
        self.channels_last = getattr(self.backbone, "output_fmt", "NCHW") == "NHWC"
        settings = self.backbone.pretrained_cfg
        self.architecture: str = settings["architecture"] or config.vision
        self.register_buffer("mean", 255 * torch.tensor(settings["mean"]).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(settings["std"]).view(3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Turn pixels, uint8 (B, S, S, 3), into tokens (B, N, C)."""
        images = (pixels.permute(0, 3, 1, 2).float() - self.mean) / self.std
        features: Tensor = self.backbone.forward_features(images)
        if features.ndim == 3:  # vision transformers give tokens as they are
            return features
        return features.flatten(1, 2) if self.channels_last else features.flatten(2).transpose(1, 2)


class CaptionTower(nn.Module):
    """A transformers encoder."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        """Hold an encoder whose last hidden state has this width."""
        super().__init__()
        self.encoder = encoder
        self.width = width

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Turn ids (B, T) into tokens (B, T, C)."""
        return self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


class OneHead(nn.Module):
    """Logits of one modality."""

    def __init__(self, width: int, num_labels: int, dropout: float) -> None:
        """Take features of this width."""
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Dropout(dropout), nn.Linear(width, num_labels))

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


class MultimodalModel(nn.Module):
    """Towers and what stands on them. A tower that the fusion does not use is not there."""

    def __init__(self, image: ImageTower | None, caption: CaptionTower | None, head: nn.Module) -> None:
        """Put the parts together."""
        super().__init__()
        self.image, self.caption, self.head = image, caption, head

    def forward(self, inputs: Inputs) -> Tensor:
        """Turn a batch into logits (B, L)."""
        if self.caption is None:
            assert self.image is not None
            return self.head(self.image(inputs.pixels).mean(1))
        caption = self.caption(inputs.input_ids, inputs.attention_mask)
        if self.image is None:
            return self.head(masked_mean(caption, inputs.attention_mask))
        return self.head(self.image(inputs.pixels), caption, inputs)

    def num_bytes(self) -> dict[str, int]:
        """Give the size of each part in bytes."""
        return {
            name: sum(tensor.nbytes for tensor in part.state_dict().values())
            for name, part in self.named_children()
        }


def build_model(config: ModelConfig, num_labels: int, text_config: dict[str, Any]) -> MultimodalModel:
    """Build the model that the config describes; `text_config` is what `describe_encoder` gave.

    Raises:
        ConfigError: a tower is unknown, or published weights are out of reach.
    """
    fusion = config.fusion
    image = ImageTower(config) if fusion != "text" else None
    caption = _create_encoder(config, text_config) if fusion != "image" else None
    if image is None or caption is None:
        tower = image or caption
        assert tower is not None
        return MultimodalModel(image, caption, OneHead(tower.width, num_labels, config.dropout))
    if fusion == "logits":
        head: nn.Module = MeanOfLogits(image.width, caption.width, num_labels, config.dropout)
    else:
        kind = Concat if fusion == "concat" else CrossAttention
        head = kind(image.width, caption.width, num_labels, config)
    return MultimodalModel(image, caption, head)


def describe_encoder(config: ModelConfig, vocabulary_size: int = 0) -> dict[str, Any]:
    """Give the caption tower's transformers config, which a bundle keeps.

    Published weights bring their vocabulary; without, its size is that of the tokenizer that was trained.

    Without published weights nothing touches the network: `--text` is then a folder with a `config.json`,
    or one of Google's BERT miniatures, whose names say their size.

    Raises:
        ConfigError: it is neither, or published weights are out of reach.
    """
    from transformers import AutoConfig, BertConfig

    if not config.pretrained and (size := _BERT_MINIATURE.fullmatch(config.text)):
        layers, width, heads = map(int, size.groups())
        described = BertConfig(
            vocab_size=vocabulary_size,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
        )
        return dict(described.to_dict())
    if config.pretrained:
        _look_for_hub()
    try:
        found = AutoConfig.from_pretrained(config.text, local_files_only=not config.pretrained)
    except (OSError, ValueError) as error:
        raise ConfigError(_out_of_reach("--text", config.text, "config.json", error)) from None
    if not config.pretrained:
        found.vocab_size = vocabulary_size
    return dict(found.to_dict())


def masked_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Average tokens (B, T, C) where the mask (B, T) is 1: (B, C)."""
    weights = mask[..., None].to(tokens)
    return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)


def _create_backbone(config: ModelConfig) -> Any:
    import timm

    name = config.vision
    if not name.startswith(("local-dir:", "hf-hub:")) and not timm.is_model(name.split(".")[0]):
        near = timm.list_models(f"{name[:8]}*")[:4] or timm.list_models("efficientnet*")[:4]
        raise ConfigError(f"--vision {name!r} is no timm model; there are {', '.join(near)}, and more")
    settings: dict[str, Any] = {"num_classes": 0, "global_pool": ""}
    known = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if known is not None and known.fixed_input_size:
        settings["img_size"] = config.image_size
    if config.pretrained:
        _look_for_hub()
    try:
        backbone = timm.create_model(name, pretrained=config.pretrained, **settings)
    except (OSError, RuntimeError, ValueError) as error:
        file = (
            f"{known.hf_hub_id}/model.safetensors" if known is not None and known.hf_hub_id else "its weights"
        )
        raise ConfigError(_out_of_reach("--vision", name, file, error)) from None
    if isinstance(backbone, timm.models.MobileNetV3):  # its last convolution comes after pooling: not ours
        backbone.conv_head = backbone.norm_head = nn.Identity()
    return backbone


def _create_encoder(config: ModelConfig, text_config: dict[str, Any]) -> CaptionTower:
    from transformers import AutoConfig, AutoModel

    described = AutoConfig.for_model(**text_config)
    # A pooler would never see a gradient here, which DDP takes for an error.
    settings = {"add_pooling_layer": False} if described.model_type in ("bert", "roberta") else {}
    if not config.pretrained:
        encoder = AutoModel.from_config(described, **settings)
    else:
        try:
            encoder = AutoModel.from_pretrained(config.text, **settings)
        except (OSError, ValueError) as error:
            raise ConfigError(_out_of_reach("--text", config.text, "model.safetensors", error)) from None
    return CaptionTower(encoder.float(), described.hidden_size)


def _look_for_hub() -> None:
    """Go offline when the hub's name does not resolve: each file would cost half a minute of retries."""
    from huggingface_hub import constants

    if getproxies().get("https"):  # then names are the proxy's to resolve
        return
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True


def _out_of_reach(option: str, name: str, file: str, error: Exception) -> str:
    local = "local-dir:/path/to/folder" if option == "--vision" else "/path/to/folder"
    return (
        f"{option} {name!r}: {file} is not here and could not be fetched ({type(error).__name__}); "
        f"point {option} at a local copy ({local}), set HF_HOME to a cache with it, or use --no-pretrained"
    )


def _projection(width: int, fused: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, fused))


def _stand_in(width: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(width) * 0.02)
