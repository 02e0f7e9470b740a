"""From an input and settings to the plan of a labeling job, found or made."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from typing import Any

import pyarrow as pa

from mmray.bundle import Bundle
from mmray.config import Columns, LabelConfig
from mmray.errors import DataError, OutputError
from mmray.images import DECODER, GPU_DECODER
from mmray.parquet import MAX_SHARD_BYTES, MAX_SHARD_ROWS, DataFile, describe_files
from mmray.plan import Plan, cut_to
from mmray.retry import Earlier, require_same_files, require_same_settings
from mmray.schema import PREDICTION_COLUMNS, passthrough_names
from mmray.shards import SUCCESS
from mmray.storage import Folder, visible

log = logging.getLogger(__name__)


def plan_labeling(
    folder: Folder,
    files: dict[str, int],
    bundle: Bundle,
    output: Folder,
    columns: Columns,
    config: LabelConfig,
    *,
    earlier: tuple[Earlier, Plan] | None = None,
    extend: bool = False,
    dry_run: bool = False,
) -> Plan:
    """Find the output's plan, or make and publish it.

    Args:
        folder: the input.
        files: in it: relative path -> size in bytes.
        bundle: what labels.
        output: of the job.
        columns: names of the input's columns.
        config: what is written.
        earlier: a finished output whose failed rows are to be labeled again, and its plan.
        extend: also plan files that came later.
        dry_run: publish nothing.

    Raises:
        DataError: the input is unusable, or is not the one that was planned.
        OutputError: the output belongs to another job.
    """
    settings = labeling_settings(bundle, columns, config)
    if earlier:
        _refuse_decided(earlier[1], earlier[0])
        require_same_settings(*earlier, settings)
        settings["retry_of"] = earlier[0].manifest_sha256
    plan = find_plan(output)
    if plan is None:
        plan, added = Plan((), settings), files
    else:
        _refuse_decided(plan, output)
        plan.refuse_other(settings, output)
        added = plan.compare_input(files)
        if added and not extend:
            if config.limit is None:
                later = len(set(added) - set(plan.skipped))
                if later:
                    log.warning("%d input files came after the plan; --extend labels them too", later)
            return plan
    if not added:
        return plan
    described, unreadable = _describe(folder, added, columns, config)
    left = None if config.limit is None else config.limit - plan.num_rows
    new = cut_to(described, left)
    if earlier:
        require_same_files(*earlier, replace(plan, files=plan.files + new))
    if not (new or plan.parts):
        raise DataError(f"{folder}: none of its {len(files)} .parquet files can be read")
    if dry_run or not (new or unreadable):  # the latter: the limit was reached before these files
        return replace(plan, files=plan.files + new)
    whole = plan.append(output, new, unreadable)
    output.remove([SUCCESS] if plan.parts else [])
    return whole


def _describe(
    folder: Folder, files: dict[str, int], columns: Columns, config: LabelConfig
) -> tuple[list[DataFile], dict[str, str]]:
    """Describe input files whose rows can be labeled; gives also why others cannot be read, by path."""
    unreadable: dict[str, str] = {}
    try:
        described = describe_files(
            folder, files, columns.image, unreadable if config.skip_unreadable_files else None
        )
    except DataError as error:
        raise DataError(f"{error}; --skip-unreadable-files labels the others") from None
    for reason in unreadable.values():
        log.warning("skipped: %s", reason)
    renamed: dict[str, str] = {}
    for file, schema in described:
        renamed |= _require_usable(schema, columns, f"{folder}/{file.path}")
    for before, after in renamed.items():
        log.info("the input has a column %s: it becomes %s in the output", before, after)
    _warn_of_partitions(file for file, _ in described)
    return [file for file, _ in described], unreadable


def _warn_of_partitions(files: Iterable[DataFile]) -> None:
    """Say so where a reader of the output would take its folders' names for one of its columns."""
    folders = chain.from_iterable(file.path.split("/")[:-1] for file in files)
    keys = {folder.partition("=")[0] for folder in folders if "=" in folder}
    for key in sorted(keys.intersection(PREDICTION_COLUMNS)):
        told = "the folders %s=… are called like a column of the output: read it with partitioning=None"
        log.warning(told, key)


def find_plan(output: Folder) -> Plan | None:
    """Load an output's plan; None where none is, nor anything else.

    Raises:
        OutputError: there are files that no plan knows.
    """
    plan = Plan.load(output)
    if plan is None and (strays := [path for path in output.list(".parquet") if visible(path)]):
        raise OutputError(f"{output} holds {strays[0]}, which no plan knows; choose an empty --output")
    return plan


def refuse_inside(output: Folder, source: Folder) -> None:
    """Refuse an output that lies in what it is made of.

    Raises:
        OutputError: it does.
    """
    if f"{_place(output)}/".startswith(f"{_place(source)}/"):
        raise OutputError(f"{output} lies in the input {source}: the next run would label its own labels")


def _place(folder: Folder) -> str:
    """Name a folder as no link and no relative path does."""
    return os.path.realpath(folder.root) if folder.is_local else folder.uri


def _refuse_decided(plan: Plan, output: object) -> None:
    """Refuse an output whose labels are no model's: decide.py made them of another output's scores."""
    if "decided_from" in plan.settings:
        raise OutputError(
            f"{output} comes from decide.py; extend or retry the output that it was made of, and decide again"
        )


def _require_usable(schema: pa.Schema, columns: Columns, where: str) -> dict[str, str]:
    """Check that the rows of a file can be labeled; gives the columns that get another name."""
    columns.require(schema, where)
    try:
        names = passthrough_names(schema, columns.image)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    return {before: after for before, after in names.items() if before != after}


def labeling_settings(bundle: Bundle, columns: Columns, config: LabelConfig) -> dict[str, Any]:
    """Give all that the labels depend on. Workers, batch size, device and budget are not among it."""
    on_gpu = config.decode == "gpu" and "image" in bundle.model_config.towers
    return {
        "bundle": bundle.fingerprint,
        "labels": list(bundle.vocabulary.labels),
        "thresholds": bundle.thresholds.tolist(),
        "columns": {"image": columns.image, "caption": columns.caption},
        "image_prefixes": sorted(columns.image_prefixes),
        "image_size": bundle.model_config.image_size,
        "decoder": GPU_DECODER if on_gpu else DECODER,
        "precision": config.precision,
        "flip": config.flip,
        "scores": config.scores,
        "limit": config.limit,
        "retry_of": None,
        "shards": {"rows": MAX_SHARD_ROWS, "bytes": MAX_SHARD_BYTES},
    }
