"""Labeler: a bundle that labels encoded images and captions. Without Ray, so that a notebook can use it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, starmap
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmray.bundle import Bundle
from mmray.captions import tokenize
from mmray.decisions import decide
from mmray.decoding import Decode, Image, Row, RowDecoder, Waiting
from mmray.errors import ConfigError
from mmray.fusions import Inputs
from mmray.predictor import Predictor
from mmray.schema import Status

if TYPE_CHECKING:
    from mmray.gpu_decoding import GpuDecoder

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


Logits = Callable[[], np.ndarray]
"""Waits for the logits of B rows, float32 (B, L), and gives them."""


class Labeled(NamedTuple):
    """The labels of B rows. Rows that failed have neither labels nor scores: zeros stand there."""

    scores: np.ndarray
    """float32 (B, L) in [0, 1]."""
    decided: np.ndarray
    """bool (B, L)."""
    fell_back: np.ndarray
    """bool (B,): no score reached its threshold, so the top label spoke."""
    statuses: list[Status]
    errors: list[str | None]

    @property
    def valid(self) -> np.ndarray:
        """bool (B,): rows that did not fail."""
        return np.array([status is not Status.FAILED for status in self.statuses], bool)


class Labeler:
    """Labels batches. Decoding runs in threads beside the model, one batch ahead of it.

    Several threads may call it: they take turns at the model, and share the threads that decode.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        batch_size: int = 64,
        device: str | None = None,
        precision: str = "fp32",
        flip: bool = False,
        compiled: bool = False,
        num_threads: int | None = None,
        decode: Decode | None = None,
        decode_on_gpu: bool = False,
    ) -> None:
        """Load the bundle's model.

        Args:
            bundle: what labels.
            batch_size: rows that the model takes at once.
            device: such as `cpu` or `cuda` [default: a GPU if there is one].
            precision: `fp32` or `bf16`.
            flip: average the logits of each image and of its mirror image.
            compiled: compile the image tower first, by `torch.compile`.
            num_threads: decoding threads [default: torch's own number of threads].
            decode: what decodes a row, and keeps its own time [default: `decode_row`].
            decode_on_gpu: let the GPU decode plain JPEGs, which gives somewhat other pixels.

        Raises:
            BundleError: the weights are damaged or belong to another model.
            ConfigError: the precision is unknown, or there is no compiler, or no GPU to decode on.
        """
        if precision not in PRECISIONS:
            raise ConfigError(f"precision {precision!r} is none of {', '.join(PRECISIONS)}")
        self.bundle = bundle
        self.batch_size = batch_size
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.predictor = Predictor(
            bundle.model(), place, PRECISIONS[precision], batch_size=batch_size, flip=flip
        )
        if compiled:
            self.predictor.compile(bundle.model_config.image_size)
        self.tokenizer = bundle.tokenizer()
        self._tokenizing = threading.Lock()
        config, num_threads = bundle.model_config, num_threads or torch.get_num_threads()
        self.decoder: RowDecoder | GpuDecoder
        self.decoder = RowDecoder(config.fusion, config.image_size, num_threads, decode)
        if decode_on_gpu:
            if place.type != "cuda":
                raise ConfigError(f"JPEGs cannot be decoded on a GPU: the device is {place}")
            from mmray.gpu_decoding import GpuDecoder  # torchvision's import takes a second

            self.decoder = GpuDecoder(self.decoder, place)

    @classmethod
    def load(cls, uri: str, **settings: Any) -> Labeler:
        """Load a bundle by its local path or URI; settings are the constructor's.

        Raises:
            BundleError: it is incomplete, damaged, or of another schema version.
            ConfigError: as the constructor does.
        """
        return cls(Bundle.load(uri), **settings)

    def __call__(self, images: Sequence[Image | Row], captions: Sequence[str | None]) -> Labeled:
        """Label B rows.

        Args:
            images: B encoded images, None where there is none, or why there is none; or decoded rows.
            captions: B captions, None where there is none.

        Raises:
            HungError: a row hung its thread, which goes on for nothing; the labeler has new ones.
            DeviceError: the GPU fails for good; only another process can use it again.
        """
        under_way: deque[tuple[list[Row], Logits | None]] = deque()
        parts = []
        for rows in self._decoded(images, captions):
            under_way.append((rows, self._submit(rows)))
            if len(under_way) > 1:
                parts.append(self._label(*under_way.popleft()))
        parts.extend(starmap(self._label, under_way))
        if not parts:
            none = np.zeros((0, len(self.bundle.vocabulary)))
            return Labeled(none.astype(np.float32), none.astype(bool), np.zeros(0, bool), [], [])
        scores, decided, fell_back, statuses, errors = zip(*parts, strict=True)
        return Labeled(
            np.concatenate(scores),
            np.concatenate(decided),
            np.concatenate(fell_back),
            list(chain(*statuses)),
            list(chain(*errors)),
        )

    def _decoded(self, images: Sequence[Image | Row], captions: Sequence[str | None]) -> Iterator[list[Row]]:
        """Decode batch by batch; the next one is under way while its caller works on this one."""
        waiting: Waiting | None = None
        for start in range(0, len(images), self.batch_size):
            ready, stop = waiting, start + self.batch_size
            waiting = self.decoder.submit(images[start:stop], captions[start:stop])
            if ready:
                yield ready()
        if waiting:
            yield waiting()

    def _submit(self, rows: list[Row]) -> Logits | None:
        """Let the model begin with the rows that have not failed, if there are any."""
        rows = [row for row in rows if row.status is not Status.FAILED]
        if not rows:
            return None
        config = self.bundle.model_config
        with self._tokenizing:  # a fast tokenizer refuses a call that meets another one's first
            tokens = tokenize(self.tokenizer, [row.caption for row in rows], config.max_tokens)
        inputs = make_inputs(
            [row.pixels for row in rows],
            *tokens,
            has_caption=[row.caption is not None for row in rows],
            size_px=config.image_size if "image" in config.towers else 0,
            device=self.predictor.device,
        )
        return self.predictor.submit(inputs)

    def _label(self, rows: list[Row], logits: Logits | None) -> Labeled:
        valid = np.array([row.status is not Status.FAILED for row in rows])
        scores = np.zeros((len(rows), len(self.bundle.vocabulary)), np.float32)
        if logits:
            scores[valid] = self.bundle.calibration.scores(logits())
        decided, fell_back = decide(scores, self.bundle.thresholds)
        decided, fell_back = decided & valid[:, None], fell_back & valid
        return Labeled(scores, decided, fell_back, [row.status for row in rows], [row.error for row in rows])


def make_inputs(
    pixels: Sequence[np.ndarray | Tensor | None],
    input_ids: np.ndarray,
    attention_mask: np.ndarray,
    *,
    has_caption: Sequence[bool],
    size_px: int,
    device: torch.device | None = None,
) -> Inputs:
    """Put rows together as the model takes them; a missing image is black, and marked as missing.

    Args:
        pixels: B images, uint8 (S, S, 3), or None; some may be on the device already.
        input_ids: int64 (B, T).
        attention_mask: int64 (B, T).
        has_caption: B flags.
        size_px: S.
        device: that will compute. For a GPU images are put into memory that it copies from while the host
            goes on; or onto it, if some are there.
    """
    return Inputs(
        _together(pixels, size_px, device),
        torch.tensor([image is not None for image in pixels]),
        torch.from_numpy(input_ids),
        torch.from_numpy(attention_mask),
        torch.tensor(list(has_caption)),
    )


def _together(
    pixels: Sequence[np.ndarray | Tensor | None], size_px: int, device: torch.device | None
) -> Tensor:
    """Put images into one tensor, uint8 (B, S, S, 3): on the device if some are there and all have room."""
    if any(isinstance(image, Tensor) for image in pixels):
        from mmray.gpu_decoding import on_device

        assert device is not None
        try:
            return on_device(pixels, size_px, device)
        except torch.OutOfMemoryError:  # the predictor halves what comes from the host
            pixels = [image.numpy(force=True) if isinstance(image, Tensor) else image for image in pixels]
    pinned = device is not None and device.type == "cuda"
    images = torch.empty(len(pixels), size_px, size_px, 3, dtype=torch.uint8, pin_memory=pinned)
    places = images.numpy()
    for index, image in enumerate(pixels):
        places[index] = 0 if image is None else image
    return images
