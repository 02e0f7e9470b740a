"""A bundle as one ONNX file: pixels and token ids in, calibrated scores out, for services without Python."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmray.bundle import Bundle
from mmray.errors import ConfigError
from mmray.fusions import Inputs

OPSET = 20
IMAGE_INPUTS = ("pixels", "has_image")
CAPTION_INPUTS = ("input_ids", "attention_mask", "has_caption")


class Labels(nn.Module):
    """A bundle's model, its calibration and, if wanted, its decision, as one module of tensors."""

    scales: Tensor
    offsets: Tensor
    thresholds: Tensor

    def __init__(self, bundle: Bundle, *, decide: bool) -> None:
        """Take the bundle, and whether decisions come out beside the scores."""
        super().__init__()
        self.model, self.decide, self.inputs = bundle.model(), decide, inputs_of(bundle)
        for name, numbers in {
            "scales": bundle.calibration.scales,
            "offsets": bundle.calibration.offsets,
            "thresholds": bundle.thresholds,
        }.items():
            self.register_buffer(name, torch.tensor(numbers, dtype=torch.float32))

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Turn the parts of `Inputs` that the model uses into scores: float32 (B, L), and decisions: bool."""
        given = dict(zip(self.inputs, tensors, strict=True))
        there = torch.ones_like(tensors[0].flatten(1)[:, 0], dtype=torch.bool)
        inputs = Inputs(**{name: given.get(name, there) for name in Inputs._fields})
        scores = torch.sigmoid(self.model(inputs) * self.scales + self.offsets)
        if not self.decide:
            return scores
        decided = scores >= self.thresholds
        top = functional.one_hot(scores.argmax(dim=1), scores.shape[1]).bool()
        return scores, decided | (top & ~decided.any(dim=1, keepdim=True))


def inputs_of(bundle: Bundle) -> tuple[str, ...]:
    """Name the inputs that a bundle's model uses: of one modality alone, no flag says that it is there."""
    alone = {"image": IMAGE_INPUTS[:1], "text": CAPTION_INPUTS[:2]}
    return alone.get(bundle.model_config.fusion, (*IMAGE_INPUTS, *CAPTION_INPUTS))


def to_onnx(bundle: Bundle, *, decide: bool = False) -> bytes:
    """Write a bundle's model as ONNX.

    The file's inputs are `pixels`: uint8 (B, S, S, 3), `has_image`: bool (B,), `input_ids` and
    `attention_mask`: int64 (B, T), `has_caption`: bool (B,), or those of them that the model uses; any B, and
    T up to `max_tokens`. Its outputs are `scores`: float32 (B, L) and, if wanted, `decided`: bool (B, L). Its
    metadata hold labels, thresholds, image size, the most tokens, and the bundle's fingerprint.

    Args:
        bundle: what labels.
        decide: whether decisions come out beside the scores.

    Raises:
        ConfigError: the packages that write ONNX are not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed: pip install 'mmray[onnx]'") from None
    module, names = Labels(bundle, decide=decide).eval(), inputs_of(bundle)
    size_px, num_tokens = bundle.model_config.image_size, min(7, bundle.model_config.max_tokens)
    examples: dict[str, Tensor] = {
        "pixels": torch.zeros(2, size_px, size_px, 3, dtype=torch.uint8),
        "has_image": torch.tensor([True, False]),
        "input_ids": torch.ones(2, num_tokens, dtype=torch.int64),
        "attention_mask": torch.ones(2, num_tokens, dtype=torch.int64),
        "has_caption": torch.tensor([False, True]),
    }
    rows, tokens = torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC
    shapes: Any = [
        {0: rows, 1: tokens} if name in ("input_ids", "attention_mask") else {0: rows} for name in names
    ]
    with torch.no_grad():
        program = torch.onnx.export(
            module,
            tuple(examples[name] for name in names),
            dynamo=True,
            dynamic_shapes=(tuple(shapes),),
            input_names=list(names),
            output_names=["scores", "decided"] if decide else ["scores"],
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, metadata(bundle))
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data


def metadata(bundle: Bundle) -> dict[str, str]:
    """Give what a user of the file must know beside its inputs and outputs."""
    return {
        "labels": json.dumps(list(bundle.vocabulary.labels)),
        "thresholds": json.dumps(bundle.thresholds.tolist()),
        "image_size": str(bundle.model_config.image_size),
        "max_tokens": str(bundle.model_config.max_tokens),
        "fingerprint": bundle.fingerprint,
    }
