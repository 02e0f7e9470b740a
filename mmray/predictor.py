"""Predictor: a model on its device. On a GPU a batch is copied there while the one before is computed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mmray.errors import ConfigError, SpoiltError
from mmray.fusions import Inputs
from mmray.model import MultimodalModel

log = logging.getLogger(__name__)

TIMED_BATCHES = 5
"""That tell how fast a tower is, compiled and not."""


class DeviceError(SpoiltError):
    """A GPU that fails in this process from now on, whatever is asked of it."""


class FixedBatch(nn.Module):
    """A compiled tower, which always sees as many rows, since it is compiled for one shape."""

    def __init__(self, compiled: nn.Module, tower: nn.Module, num_rows: int) -> None:
        """Take the tower, compiled and as it was."""
        super().__init__()
        self.compiled, self.tower, self.num_rows = compiled, tower, num_rows

    def forward(self, pixels: Tensor) -> Tensor:
        """Turn pixels, uint8 (B, S, S, 3) of at most `num_rows`, into tokens (B, N, C)."""
        missing = self.num_rows - len(pixels)
        if missing > len(pixels):  # filling up would cost more than compiling gives
            return self.tower(pixels)
        return self.compiled(functional.pad(pixels, (0, 0) * 3 + (0, missing)))[: len(pixels)]


class Part(NamedTuple):
    """Rows that are being computed."""

    logits: Tensor
    """float32 (B, L), on the host, once they are done."""
    events: tuple[torch.cuda.Event, torch.cuda.Event, torch.cuda.Event] | None
    """On a GPU: computing began, ended, and the logits have come."""


class Predictor:
    """Computes logits, batch after batch. Several threads may use it: they take turns."""

    def __init__(
        self, model: MultimodalModel, device: torch.device, dtype: torch.dtype, *, batch_size: int, flip: bool
    ) -> None:
        """Move the model to its device.

        Args:
            model: in evaluation mode; it belongs to the predictor from now on.
            device: where it computes.
            dtype: of matrix products and convolutions: float32 or bfloat16.
            batch_size: the most rows at once; halved when they do not fit into the GPU's memory.
            flip: average the logits of each image and of its mirror image.
        """
        self.model, self.device, self.dtype = model.to(device), device, dtype
        self.batch_size, self.flip = batch_size, flip
        self.seconds = 0.0
        """Spent computing so far."""
        self._turn, self._counting = threading.Lock(), threading.Lock()
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._copies:
            self.model.to(memory_format=torch.channels_last)
        if dtype != torch.float32:  # once, what autocast would do again for each batch
            for layer in self.model.modules():
                if type(layer) in (nn.Conv2d, nn.Linear):  # others may compute their weights first
                    layer.to(dtype)

    def compile(self, size_px: int) -> None:
        """Compile the image tower for whole batches of pixels (S, S), and say when that will have paid.

        Raises:
            ConfigError: there is no compiler for this device.
            torch.OutOfMemoryError: not even one row fits into the GPU's memory.
        """
        while self.model.image is not None:
            size = self.batch_size
            try:
                self._compile(self.model.image, size, size_px)
                return
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
            self._halve(size)

    def _compile(self, tower: nn.Module, num_rows: int, size_px: int) -> None:
        with torch.inference_mode():  # as the batches will be: for other tensors it would be compiled again
            pixels = torch.zeros(num_rows, size_px, size_px, 3, dtype=torch.uint8, device=self.device)
        before, started = self._seconds_a_row(tower, pixels), time.monotonic()
        compiled: Any = torch.compile(tower, dynamic=False)
        try:
            self._seconds_a_row(compiled, pixels, num_batches=1)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            (reason,) = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise ConfigError(f"--compile: nothing here compiles for {self.device}: {reason}") from None
        took, after = time.monotonic() - started, self._seconds_a_row(compiled, pixels)
        self.model.image = FixedBatch(compiled, tower, num_rows)  # type: ignore[assignment]
        paid = (
            f"pays back after {took / (before - after):,.0f} images" if after < before else "never pays back"
        )
        log.info("compiled in %.0f s: %.0f images/s became %.0f, which %s", took, 1 / before, 1 / after, paid)

    def submit(self, inputs: Inputs) -> Callable[[], np.ndarray]:
        """Start computing a batch.

        Args:
            inputs: B rows; on a GPU best in pinned memory.

        Returns:
            A function that waits for the logits, float32 (B, L), and gives them.

        Raises:
            torch.OutOfMemoryError: not even one row fits into the GPU's memory.
            DeviceError: the GPU fails for good; the function that waits may say so, too.
        """
        parts: list[Part] = []
        start = 0
        while start < len(inputs.pixels):
            size = self.batch_size
            try:
                parts.append(self._start(Inputs(*(part[start:] for part in inputs))))
                start += len(parts[-1].logits)
                continue
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
            except torch.AcceleratorError as error:
                raise DeviceError(str(error)) from error
            self._halve(size)  # now that the error has let go of what the batch had taken
        return lambda: np.concatenate([self._await(part) for part in parts])

    def _start(self, inputs: Inputs) -> Part:
        """Start computing the first rows, as many as are computed at once."""
        with self._turn, torch.inference_mode():
            inputs = Inputs(*(part[: self.batch_size] for part in inputs))
            if not self._copies:
                started = time.monotonic()
                logits = self._logits(inputs)
                self._count(time.monotonic() - started)
                return Part(logits, None)
            computing = torch.cuda.current_stream(self.device)
            with torch.cuda.stream(self._copies):
                inputs = inputs.to(self.device)
            computing.wait_stream(self._copies)
            for part in inputs:
                part.record_stream(computing)
            began, ended, came = (torch.cuda.Event(enable_timing=True) for _ in range(3))
            began.record(computing)
            logits = self._logits(inputs)
            ended.record(computing)
            logits = logits.to("cpu", non_blocking=True)
            came.record(computing)
            return Part(logits, (began, ended, came))

    def _logits(self, inputs: Inputs) -> Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.model(inputs)
            if self.flip:
                logits = (logits + self.model(inputs._replace(pixels=inputs.pixels.flip(2)))) / 2
        return logits.float()

    def _await(self, part: Part) -> np.ndarray:
        if part.events:
            began, ended, came = part.events
            try:
                came.synchronize()
            except torch.AcceleratorError as error:
                raise DeviceError(str(error)) from error
            self._count(began.elapsed_time(ended) / 1000)
        return part.logits.numpy()

    def _count(self, seconds: float) -> None:
        with self._counting:
            self.seconds += seconds

    def _halve(self, size: int) -> None:
        with self._turn:
            if self.batch_size == size:  # another thread may have done so
                self.batch_size = size // 2
                log.warning("%d rows do not fit into the GPU's memory; going on with %d", size, size // 2)
                if isinstance(self.model.image, FixedBatch):
                    self.model.image.num_rows = self.batch_size
            torch.cuda.empty_cache()

    def _seconds_a_row(self, tower: nn.Module, pixels: Tensor, num_batches: int = TIMED_BATCHES) -> float:
        """Time an image tower, after one batch that warms it up; gives the median batch's seconds a row."""
        seconds = []
        with torch.inference_mode():
            for _ in range(1 + num_batches):
                started = time.monotonic()
                with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                    tower(pixels)
                if self._copies:
                    torch.cuda.synchronize(self.device)
                seconds.append(time.monotonic() - started)
        return float(np.median(seconds[1:])) / len(pixels)
