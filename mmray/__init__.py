"""mmray labels image archives: one small multimodal model, trained and run on Ray.

labeler = mmray.Labeler.load("s3://models/coco")                     # without Ray: a notebook, a service
labeled = labeler([jpeg_bytes, None], ["A dog in the snow.", "Two trains."])

mmray.train_model("data/train", "data/val", "models/first")          # what the jobs call
mmray.label_dataset("archive/", "models/first", "labeled/")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmray.labeler import Labeled, Labeler
    from mmray.labeling import label_dataset
    from mmray.training import train_model

__all__ = ["Labeled", "Labeler", "label_dataset", "train_model"]

_HOMES = {
    "Labeled": "mmray.labeler",
    "Labeler": "mmray.labeler",
    "label_dataset": "mmray.labeling",
    "train_model": "mmray.training",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for, and no sooner: torch and Ray take seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mmray' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Show what can be asked for."""
    return sorted({*globals(), *__all__})
