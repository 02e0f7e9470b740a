"""The towers: a timm backbone for the image and a transformers encoder for the caption, published or new.

Shapes: B rows, S pixels a side, N image tokens (places of the feature map), T caption tokens.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import Tensor, nn

from mmray.config import ModelConfig
from mmray.errors import ConfigError

_BERT_MINIATURE = re.compile(r"(?:.*/)?bert_uncased_L-(\d+)_H-(\d+)_A-(\d+)")


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


class CaptionTowers(nn.Module):
    """A caption tower for each of M members."""

    def __init__(self, towers: Iterable[CaptionTower]) -> None:
        """Take the towers."""
        super().__init__()
        self.towers = nn.ModuleList(towers)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Turn ids (B, T) into all towers' tokens, side by side: (B, T, M * C)."""
        return torch.cat([tower(input_ids, attention_mask) for tower in self.towers], 2)


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


def create_caption_tower(config: ModelConfig, text_config: dict[str, Any]) -> CaptionTower:
    """Build the encoder that `describe_encoder` described.

    Raises:
        ConfigError: published weights are out of reach.
    """
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


def _create_backbone(config: ModelConfig) -> Any:
    import timm

    name = config.vision
    if not name.startswith(("local-dir:", "hf-hub:")) and not timm.is_model(name.split(".")[0]):
        near = get_close_matches(name, timm.list_models(), 4) or timm.list_models("efficientnet_b?")
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
