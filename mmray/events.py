"""The history of a training run as TensorBoard reads it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EVENTS = "tensorboard/events.out.tfevents.0.mmray"
"""Where a run folder has them: one file, written anew each epoch, so that what goes on has one curve."""


def event_file(history: Sequence[dict[str, Any]]) -> bytes:
    """Write the metrics of epochs as events.

    Args:
        history: of each epoch its number, `epoch`, the `seconds` that it took, and its metrics.
    """
    from tensorboardX import SummaryWriter

    elapsed_s = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        with SummaryWriter(scratch) as writer:
            for entry in history:
                elapsed_s += entry["seconds"]
                for name in sorted(entry.keys() - {"epoch"}):
                    writer.add_scalar(name, entry[name], entry["epoch"], walltime=elapsed_s)
        (path,) = Path(scratch).iterdir()
        return path.read_bytes()
