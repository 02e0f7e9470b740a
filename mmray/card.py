"""The model card: what a bundle is, how good it is, and how to use it, for people."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from mmray.config import ModelConfig


def model_card(model: ModelConfig, metrics: dict[str, Any]) -> str:
    """Write the card in Markdown.

    Args:
        model: what the model is made of.
        metrics: what a bundle's `metrics.json` holds.
    """
    single = metrics["by_decision"]["single"]["sample_f1"]
    lines = [
        "# Model card",
        "",
        f"Labels images with captions: {len(metrics['by_label'])} labels, several a row. Made by mmray "
        f"{version('mmray')}.",
        "",
        f"- Image tower {model.vision} at {model.image_size} px, caption tower {model.text}, "
        f"fusion {model.fusion}.",
        f"- Trained on {metrics['training']['num_rows']:,} rows; epoch {metrics['epoch']} was the best.",
        f"- On {metrics['num_rows']:,} validation rows: sample F1 {metrics['sample_f1']:.3f}, "
        f"mAP {metrics['map']:.3f}, macro F1 {metrics['macro_f1']:.3f}. These rows chose the thresholds, "
        f"one a label; at a single one sample F1 is {single:.3f}.",
        f"- Expected calibration error {metrics['ece']:.4f}, before calibration on these rows "
        f"{metrics['ece_uncalibrated']:.4f}.",
        "",
        "| label | precision | recall | F1 | AP | rows |",
        "|---|---|---|---|---|---|",
    ]
    for label, entry in metrics["by_label"].items():
        average = "" if entry["ap"] is None else f"{entry['ap']:.3f}"
        lines.append(
            f"| {label} | {entry['precision']:.3f} | {entry['recall']:.3f} | {entry['f1']:.3f} | {average} "
            f"| {entry['support']} |"
        )
    use = "python jobs/label.py --input DATA --model THIS_FOLDER --output LABELED"
    return "\n".join([*lines, "", "Label with it:", "", f"    {use}", ""])
