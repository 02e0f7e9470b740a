"""The epochs of a training run as TensorBoard reads them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

EVENTS = "tensorboard/events.out.tfevents.{:05}.mmray"
"""A file an epoch, below a run's folder: readers follow new files, not those that are put in another's place.
A run that goes on writes the same names again, so that it stays one curve."""


def event_file(epoch: dict[str, Any]) -> bytes:
    """Write the metrics of an epoch, whose number is its `epoch`, as events."""
    from tensorboardX import SummaryWriter

    with tempfile.TemporaryDirectory() as scratch:
        with SummaryWriter(scratch) as writer:
            for name in sorted(epoch.keys() - {"epoch"}):
                writer.add_scalar(name, epoch[name], epoch["epoch"])
        (path,) = Path(scratch).iterdir()
        return path.read_bytes()
