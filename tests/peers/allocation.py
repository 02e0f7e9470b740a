"""What it costs when memory goes back to the kernel after each batch, and what keeping it saves.

    python tests/peers/allocation.py [--repeats N]

A model's forward passes, a training step, and the labeler with its threads, each in a process of its own:
once as Python starts, once with the environment that mmray gives its workers, in turns. CPU time of a row in
user and kernel mode, its page faults, and the peak of memory.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
from collections import defaultdict
from tempfile import TemporaryDirectory

import click
import numpy as np
from measuring import KEPT
from rich.console import Console
from rich.table import Table

from mmray.config import ModelConfig, TrainConfig

CASES = {
    "EfficientNet-B0, 224 px, batches of 64": ("infer", "efficientnet_b0", 224, 64),
    "EfficientNet-B4, 380 px, batches of 8": ("infer", "efficientnet_b4", 380, 8),
    "MobileNetV3-small, 112 px, batches of 64": ("infer", "mobilenetv3_small_100", 112, 64),
    "training RegNetX-002, 160 px, batches of 32": ("train", "regnetx_002", 160, 32),
    "Labeler, EfficientNet-B0, two callers": ("label", "efficientnet_b0", 224, 64),
}
STEPS = 6
LABELS = tuple(range(18))


def measured(kind: str, vision: str, size_px: int, batch_rows: int) -> dict[str, float]:
    """Run a case in this process; gives what a row took of it."""
    work = {"infer": infer, "train": train, "label": label}[kind](vision, size_px, batch_rows)
    work()
    before = resource.getrusage(resource.RUSAGE_SELF)
    num_rows = sum(work() for _ in range(STEPS))
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "user ms": 1000 * (after.ru_utime - before.ru_utime) / num_rows,
        "kernel ms": 1000 * (after.ru_stime - before.ru_stime) / num_rows,
        "page faults": (after.ru_minflt - before.ru_minflt) / num_rows,
        "peak MB": after.ru_maxrss / 1024,
    }


def model_and_inputs(vision, size_px, batch_rows):
    """Give a model of random weights on one thread, and a batch for it."""
    import torch

    from mmray.fusions import Inputs
    from mmray.model import build_model
    from mmray.towers import describe_encoder

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = ModelConfig(vision=vision, image_size=size_px, pretrained=False)
    everywhere = torch.ones(batch_rows, dtype=torch.bool)
    pixels = torch.randint(0, 256, (batch_rows, size_px, size_px, 3), dtype=torch.uint8)
    ids = torch.randint(5, 900, (batch_rows, 16))
    inputs = Inputs(pixels, everywhere, ids, torch.ones_like(ids), everywhere)
    return build_model(config, len(LABELS), describe_encoder(config, 1000)), inputs


def infer(vision, size_px, batch_rows):
    """Give what computes a batch."""
    import torch

    model, inputs = model_and_inputs(vision, size_px, batch_rows)
    model.eval()

    @torch.inference_mode()
    def work() -> int:
        return len(model(inputs))

    return work


def train(vision, size_px, batch_rows):
    """Give what takes a step."""
    import torch

    from mmray.learner import Learner

    model, inputs = model_and_inputs(vision, size_px, batch_rows)
    recipe = TrainConfig(loss="bce")
    learner = Learner(model, recipe, num_rows=1, positives=np.ones(len(LABELS)), steps_per_epoch=100)
    targets = torch.zeros(batch_rows, len(LABELS))

    def work() -> int:
        learner.step(inputs, targets, targets == 0)
        return batch_rows

    return work


def label(vision, size_px, batch_rows):
    """Give what labels two batches for each of two callers, as an actor does."""
    from concurrent.futures import ThreadPoolExecutor

    import torch
    import workloads
    from bundles import make_bundle

    from mmray.labeler import Labeler
    from mmray.storage import Folder

    torch.set_num_threads(2)
    folder = TemporaryDirectory()
    config = ModelConfig(vision=vision, image_size=size_px, pretrained=False)
    bundle = make_bundle(Folder(folder.name), config, [" ".join(workloads.WORDS)], LABELS)
    labeler, callers = Labeler(bundle, batch_size=batch_rows, num_threads=2), ThreadPoolExecutor(2)
    images, captions = zip(*(workloads.photo(number) for number in range(2 * batch_rows)), strict=True)

    def work() -> int:
        return sum(len(labeled.scores) for labeled in callers.map(lambda _: labeler(images, captions), "ab"))

    return work


@click.command()
@click.option("--repeats", default=5, show_default=True)
@click.option("--case", hidden=True, help="Measure this one here.")
def main(repeats: int, case: str | None) -> None:
    """Measure, and print the medians."""
    if case:
        click.echo(json.dumps(measured(*CASES[case])))
        return
    runs = defaultdict(list)
    for _ in range(repeats):
        for name in CASES:
            for way, variables in (("as it is", {}), ("kept", KEPT)):
                command = [sys.executable, __file__, "--case", name]
                told = subprocess.run(command, env=os.environ | variables, stdout=subprocess.PIPE, check=True)
                runs[name, way].append(json.loads(told.stdout))
    table = Table("", "memory", *next(iter(runs.values()))[0])
    for (name, way), results in runs.items():
        medians = (statistics.median(result[key] for result in results) for key in results[0])
        table.add_row(
            name, way, *(f"{median:,.2f}" if median < 100 else f"{median:,.0f}" for median in medians)
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
