"""One training step: loss, gradient, schedule, averaged weights; and a checkpoint of it all. Without Ray."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from mmray.config import TrainConfig
from mmray.fusions import Inputs
from mmray.losses import asymmetric, binary_cross_entropy, class_weights, focal
from mmray.model import MultimodalModel
from mmray.words import WithWords, word_loss

BASE_BATCH_SIZE = 64
"""Global batch that `learning_rate` is meant for."""

PROGRESS = "progress.json"
"""Of a checkpoint: how far learning has come."""

Batches = Iterable[dict[str, Tensor]]
"""Of the parts of `Inputs`, and of `targets`, `mask` and `valid`."""


class Learner:
    """A model that learns, with all the state that learning has."""

    def __init__(
        self,
        model: MultimodalModel,
        config: TrainConfig,
        *,
        num_rows: int,
        positives: np.ndarray,
        steps_per_epoch: int,
        world_size: int = 1,
        word_rates: np.ndarray | None = None,
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    ) -> None:
        """Set learning up.

        Args:
            model: on its device.
            config: the recipe.
            num_rows: training rows.
            positives: int64 (L,), training rows that bear each label.
            steps_per_epoch: of each worker.
            world_size: workers; the rate grows with the square root of the global batch, as Adam's does.
            word_rates: float64 (V,), of captions those that have each word, where the recipe weighs these.
            wrap: makes a module ready for distributed training.
        """
        # Here, since drivers that import this module train nothing.
        from timm.optim import param_groups_weight_decay
        from timm.utils import ModelEmaV3

        self.model, self.config = model, config
        self.device = next(model.parameters()).device
        self.with_words = None
        if word_rates is not None and config.word_weight and model.image is not None:
            rates = torch.tensor(word_rates, dtype=torch.float32)
            self.with_words = WithWords(model, rates).to(self.device)
        self.module = self.with_words or model
        self.frozen = [model.get_submodule(tower).requires_grad_(False) for tower in config.freeze]
        self.forward = wrap(self.module)
        self.optimizer = torch.optim.AdamW(param_groups_weight_decay(self.module, config.weight_decay))
        self.ema = ModelEmaV3(model, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = config.epochs * steps_per_epoch
        self.warmup_steps = config.warmup_epochs * steps_per_epoch
        global_batch = config.batch_size_per_worker * world_size
        self.peak_rate = config.learning_rate * math.sqrt(global_batch / BASE_BATCH_SIZE)
        weighted = config.loss == "weighted-bce"
        self.pos_weight = (
            class_weights(num_rows, torch.tensor(positives)).to(self.device) if weighted else None
        )
        self.num_steps = 0

    @property
    def averaged(self) -> MultimodalModel:
        """The model that is validated and kept: of averaged weights, if these are asked for."""
        return self.ema.module if self.ema else self.model

    def step(self, inputs: Inputs, targets: Tensor, mask: Tensor, words: Tensor | None = None) -> Tensor:
        """Take one step.

        Args:
            inputs: B rows.
            targets: float32 (B, L), multi-hot or soft.
            mask: bool (B, L); other labels of a row teach nothing.
            words: float32 (B, V), of the captions, where the recipe gives them a weight.

        Returns:
            loss: float32, of the labels alone; on the device, so that nothing waits for it.
        """
        self.module.train()
        for tower in self.frozen:
            tower.eval()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        with self.autocast():
            outputs = self.forward(inputs)
        logits, told = outputs if self.with_words else (outputs, None)
        total = loss = self.loss(logits, targets, mask)
        if words is not None and told is not None:
            total = loss + self.config.word_weight * word_loss(told, words) / logits.shape[-1]
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.num_steps += 1
        if self.ema:
            self.ema.update(self.model, self.num_steps)
        return loss.detach()

    def loss(self, logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        """Compute the recipe's loss of logits (B, L), or of M members' (M, B, L): a float32 scalar."""
        targets, mask = targets.expand_as(logits), mask.expand_as(logits)
        if self.config.loss == "focal":
            return focal(logits, targets, mask)
        if self.config.loss == "asymmetric":
            return asymmetric(logits, targets, mask)
        return binary_cross_entropy(logits, targets, self.pos_weight, mask)

    def rate(self) -> float:
        """Give the learning rate of the next step: linear warm-up, then a cosine to zero."""
        if self.num_steps < self.warmup_steps:
            return self.peak_rate * min(1.0, (self.num_steps + 1) / self.warmup_steps)
        share = (self.num_steps - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.peak_rate * (1 + math.cos(math.pi * min(1.0, share))) / 2

    @torch.inference_mode()
    def readings(self, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
        """Give what the averaged weights make of B rows, as `MultimodalModel.readings` does, in float32."""
        model = self.averaged.eval()
        with self.autocast():
            logits, alone = model.readings(inputs)
        return logits.float().cpu().numpy(), alone.float().cpu().numpy()

    def autocast(self) -> Any:
        """Compute in bf16 on a GPU, in float32 elsewhere."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()

    def save(self, folder: Path, progress: dict[str, Any]) -> None:
        """Write a checkpoint, together with what the caller wants to know when it is loaded."""
        safetensors.torch.save_file(_contiguous(self.model), folder / "model.safetensors")
        safetensors.torch.save_file(_contiguous(self.averaged), folder / "averaged.safetensors")
        if self.with_words:
            safetensors.torch.save_file(_contiguous(self.with_words.head), folder / "words.safetensors")
        torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
        steps = {"num_steps": self.num_steps, "steps_per_epoch": self.steps_per_epoch}
        (folder / PROGRESS).write_text(json.dumps(progress | steps))

    def load(self, folder: Path) -> dict[str, Any]:
        """Go back to a checkpoint, be it of another number of workers; gives what was saved with it."""
        self.model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
        if self.ema:
            self.ema.module.load_state_dict(safetensors.torch.load_file(folder / "averaged.safetensors"))
        if self.with_words:
            self.with_words.head.load_state_dict(safetensors.torch.load_file(folder / "words.safetensors"))
        state = torch.load(folder / "optimizer.pt", map_location=self.device, weights_only=True)
        self.optimizer.load_state_dict(state)
        progress: dict[str, Any] = json.loads((folder / PROGRESS).read_text())
        # Left out by an earlier mmray.
        num_epochs = progress["num_steps"] / progress.get("steps_per_epoch", self.steps_per_epoch)
        self.num_steps = round(num_epochs * self.steps_per_epoch)
        return progress


def inputs_of(batch: dict[str, Tensor], device: torch.device) -> Inputs:
    """Take the model's inputs out of a batch."""
    return Inputs(**{name: batch[name] for name in Inputs._fields}).to(device)


def freeze_unused(model: MultimodalModel, image_size: int) -> list[str]:
    """Freeze parameters that no gradient reaches: DDP would wait for them forever.

    Some backbones carry layers that only their own classifier uses.

    Returns:
        Their names.
    """
    rows = torch.ones(2, dtype=torch.bool)
    ids = torch.ones(2, 3, dtype=torch.int64)
    inputs = Inputs(torch.zeros(2, image_size, image_size, 3, dtype=torch.uint8), rows, ids, ids, rows)
    model.eval()
    # Stand-ins for missing modalities see a gradient only where one is missing: show both kinds of rows.
    missing = inputs._replace(has_image=~rows, has_caption=~rows)
    (model(inputs).sum() + model(missing).sum()).backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    for name in unused:
        model.get_parameter(name).requires_grad_(False)
    model.zero_grad(set_to_none=True)
    return unused


def drop_modalities(inputs: Inputs, share: float, generator: torch.Generator) -> Inputs:
    """Hide the image of some rows and the caption of as many others; never both of one row.

    Args:
        inputs: B rows.
        share: of the rows that lose their image, and of those that lose their caption.
        generator: on the CPU.
    """
    draw = torch.rand(len(inputs.has_image), generator=generator).to(inputs.has_image.device)
    both = inputs.has_image & inputs.has_caption
    return inputs._replace(
        has_image=inputs.has_image & ~(both & (draw < share)),
        has_caption=inputs.has_caption & ~(both & (draw > 1 - share)),
    )


def drop_words(
    inputs: Inputs, share: float, mask_id: int, special_ids: list[int], generator: torch.Generator
) -> Inputs:
    """Mask some of the captions' tokens.

    Args:
        inputs: B rows.
        share: of the tokens; the special ones stay.
        mask_id: what takes their place.
        special_ids: ids of the special tokens.
        generator: on the CPU.
    """
    ids = inputs.input_ids
    dropped = (torch.rand(ids.shape, generator=generator) < share).to(ids.device)
    dropped &= ~torch.isin(ids, torch.tensor(special_ids, device=ids.device))
    return inputs._replace(input_ids=ids.masked_fill(dropped, mask_id))


def _contiguous(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
