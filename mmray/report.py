"""Reports: one HTML file on a training run, an ablation or a labeled output, that opens from disk."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from mmray.bundle import Bundle
from mmray.errors import ConfigError, OutputError
from mmray.files import file_place
from mmray.labeling_report import labeling_report
from mmray.page import Page
from mmray.plan import PLAN
from mmray.storage import Folder
from mmray.training_report import ablation_report, training_report


def write_report(
    run_uri: str,
    output_uri: str,
    *,
    input_uri: str | None = None,
    model_uri: str | None = None,
    image_prefixes: tuple[str, ...] = (),
) -> int:
    """Report on a run.

    Args:
        run_uri: a bundle, an output of `label_dataset`, or one of `ablate`.
        output_uri: of the HTML file.
        input_uri: of a labeled output the rows that were labeled, for thumbnails.
        model_uri: the bundle that labeled, for what training saw and for what image and caption say alone.
        image_prefixes: below which images that rows name by URI may be fetched.

    Returns:
        The bytes that were written.

    Raises:
        OutputError: the run is none, or not finished.
        ConfigError: an option does not belong to this kind of run.
        DataError: the input is not what was labeled; BundleError: a bundle is incomplete or damaged.
    """
    run = Folder(run_uri)
    place, name = file_place(output_uri, outside=run)
    page = replace(find_page(run, input_uri, model_uri, image_prefixes), made_by=_made_by())
    data = page.html().encode()
    place.publish(name, data)
    return len(data)


def find_page(
    run: Folder, input_uri: str | None, model_uri: str | None, image_prefixes: tuple[str, ...]
) -> Page:
    """Tell what a run is, and report on it."""
    if run.is_local and Path(run.root).is_file():
        raise OutputError(f"--run {run} is a file; name the folder of the run")
    if (run / PLAN).list(".parquet"):
        bundle = Bundle.load(model_uri) if model_uri else None
        return labeling_report(run, input_uri, bundle, image_prefixes)
    if input_uri or model_uri:
        raise ConfigError(f"--input and --model belong to a labeled output, and {run} is none")
    if run.read_or_none("ablation.csv") is not None:
        return ablation_report(run)
    if run.read_or_none("config.json") is not None:
        return training_report(run)
    raise OutputError(f"{run} is neither a bundle nor an output of label.py or ablate.py")


def _made_by() -> str:
    return f"Made by mmray {version('mmray')} on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC."
