"""The model card: what a bundle is, how good it is, what it is not for, and how to use it, for people."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.metadata import version
from typing import Any

from mmray.config import ModelConfig

LIMITS = """\
- It knows these labels alone. A row that has none of them is given its top one, where the rule falls back.
- It was measured on rows like those that trained it. On others measure it first: `jobs/evaluate.py` on rows
  whose labels are known, `jobs/report.py` for how its labels are spread and which rows to look at.
- Its labels say what a picture and its caption are likely to show. They are no ground to decide about people:
  not to identify or rate them, not for surveillance, credit, employment, law or medicine.
- It learned from captions that people wrote, and repeats what these leave out or assume."""


def model_card(model: ModelConfig, metrics: dict[str, Any]) -> str:
    """Write the card in Markdown.

    Args:
        model: what the model is made of.
        metrics: what a bundle's `metrics.json` holds.
    """
    training = metrics["training"]
    own, single, raw = (metrics["by_decision"][rule] for rule in ("per-label", "single", "uncalibrated"))
    parts = [
        "# Model card",
        f"Labels images with captions: {len(metrics['by_label'])} labels, several a row. Made by mmray "
        f"{version('mmray')}.",
        f"- Image tower {model.vision} at {model.image_size} px, caption tower {model.text}, fusion "
        f"{model.fusion}{_members(model)}.\n"
        f"- Trained on {training['num_rows']:,} rows of {' and '.join(training['datasets'])}, "
        f"{training['num_labeled']:,} of them with labels of their own; epoch {metrics['epoch']} of "
        f"{len(metrics['history'])} was the best.{_origin(training['init'])}",
        "## How good it is",
        f"On {metrics['num_rows']:,} validation rows, which also chose epoch, calibration and thresholds. "
        "Each label has a threshold of its own. On rows that calibration and thresholds were not fitted to, "
        f"a fifth at a time, sample F1 is {own['sample_f1']:.3f}, at a single threshold "
        f"{single['sample_f1']:.3f}; the expected calibration error is {own['ece']:.4f}, before calibration "
        f"{raw['ece']:.4f}.",
        _by_modality(metrics),
        _by_label(metrics),
        "## What it is not for",
        LIMITS,
        "## Label with it",
        "    python jobs/label.py --input DATA --model THIS_FOLDER --output LABELED",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _members(model: ModelConfig) -> str:
    if model.members == 1 and not model.ngrams:
        return ""
    towers = "a caption tower" if model.members == 1 else f"{model.members} caption towers"
    return f"; the mean logits of {towers}{' and a linear model of n-grams' if model.ngrams else ''}"


def _origin(donors: dict[str, str]) -> str:
    """Tell which parts did not start from nothing, or from published weights."""
    parts = [f"{part} from the bundle {name}" for part, name in donors.items()]
    return f"\n- Started from other bundles: {', '.join(parts)}." if parts else ""


def _by_modality(metrics: dict[str, Any]) -> str:
    """Show what the model makes of rows that have image and caption, and of either alone."""
    seen = {"image and caption": metrics} if metrics["by_modality"] else {"all": metrics}
    seen |= {f"the {modality} alone": found for modality, found in metrics["by_modality"].items()}
    names = ("sample_f1", "map", "macro_f1")
    rows = [(name, *(f"{found[metric]:.3f}" for metric in names)) for name, found in seen.items()]
    return _table(("of", "sample F1", "mAP", "macro F1"), rows)


def _by_label(metrics: dict[str, Any]) -> str:
    trained, rows = metrics["training"]["by_label"], []
    for label, entry in metrics["by_label"].items():
        quality = (entry[name] for name in ("precision", "recall", "f1", "ap"))
        shown = ("" if value is None else f"{value:.3f}" for value in quality)
        rows.append((label, *shown, f"{entry['support']:,}", f"{trained[label]:,}"))
    return _table(("label", "precision", "recall", "F1", "AP", "validation rows", "training rows"), rows)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    """Write text, such as a label, so that a table cannot take it for anything else."""
    return " ".join(escape(text, quote=False).replace("|", "\\|").split())
