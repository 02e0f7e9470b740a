"""The report on a labeled output: what rows were given, how sure that is, and rows to look at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mmray.bundle import Bundle
from mmray.charts import Chart, Series
from mmray.errors import ConfigError
from mmray.gallery import cards, disagreeing
from mmray.looks import Reader
from mmray.page import Card, Cell, Page, Section, Table
from mmray.parquet import find_files
from mmray.picking import COUNTS, RANDOM, SHOWN
from mmray.plan import Plan
from mmray.resources import spread
from mmray.retry import Earlier
from mmray.shards import MANIFEST
from mmray.storage import Folder
from mmray.survey import NUM_BINS, Survey, Surveyor

MAX_CHARTED = 24
"""Labels that have a chart of their own: the most frequent."""

SHOWN_REASONS = 20
UNITS = {"hours": 3600, "minutes": 60, "seconds": 1}
NUM_INTERVALS = 60
"""Of the time that labeling took."""


def labeling_report(
    output: Folder,
    input_uri: str | None = None,
    bundle: Bundle | None = None,
    prefixes: tuple[str, ...] = (),
) -> Page:
    """Survey a finished output of `label_dataset`.

    Args:
        output: of the job.
        input_uri: the rows that were labeled, for thumbnails.
        bundle: that labeled, for what training saw, and for what image and caption say alone.
        prefixes: below which images that rows name by URI may be fetched.

    Raises:
        OutputError: the output is not finished, or a file in it is damaged.
        ConfigError: another bundle labeled.
        DataError: the input is not what was labeled.
    """
    _, plan = Earlier.find(str(output), "--run")
    manifest = output.read_json(MANIFEST)
    if bundle and bundle.fingerprint != plan.settings["bundle"]:
        raise ConfigError(f"--model {bundle.folder}: {output} was labeled by another bundle")
    source = None
    if input_uri:
        source, files = find_files(input_uri)
        plan.compare_input(files)
    surveyor = Surveyor.of(output, plan)
    survey = survey_files(surveyor, [file.path for file in plan.files if file.num_rows])
    fused = bundle is not None and len(bundle.model_config.towers) > 1
    square_px = bundle.model_config.image_size if bundle and fused else None
    reader = Reader(output, plan.settings, source, prefixes, square_px=square_px)
    looks = reader.read_all(plan.files, survey.picks)
    shown = cards(looks, surveyor.vocabulary)
    if bundle and fused:
        shown += disagreeing(looks, bundle)
    names = [str(label) for label in surveyor.vocabulary.labels]
    return Page(
        f"Labeled rows: {output}",
        list(_facts(survey, plan)),
        [
            by_status(survey),
            by_label(survey, names, training_of(bundle)),
            *([by_score(survey, surveyor, names)] if surveyor.scored and survey.num_rows else []),
            *([by_reason(survey)] if survey.reasons else []),
            *by_time(output, plan),
            gallery(
                shown, survey, scored=surveyor.scored, searched=square_px is not None and source is not None
            ),
            made_of(plan, manifest),
        ],
        names,
    )


def survey_files(surveyor: Surveyor, paths: Sequence[str]) -> Survey:
    """Count files on the cluster."""

    def survey(paths: Sequence[str]) -> Survey:
        return sum((surveyor.survey(path) for path in paths), Survey())

    return sum(spread(survey, paths), Survey())


def _facts(survey: Survey, plan: Plan) -> Iterator[tuple[str, str]]:
    num_rows = max(1, survey.num_rows)
    yield "rows", f"{survey.num_rows:,}"
    yield "files", f"{len(plan.files):,}"
    yield "labels a row", f"{np.sum(survey.labels) / num_rows:.2f}"
    yield "failed", f"{survey.counts['failed'] / num_rows:.2%}"
    yield "without a label", f"{survey.num_empty / num_rows:.2%}"
    if plan.scored:
        yield "fallback to the top label", f"{survey.num_fallback / num_rows:.2%}"


def by_status(survey: Survey) -> Section:
    """Show how many rows have which status."""
    rows = [
        (status, Cell(f"{count:,}", count / survey.num_rows), f"{count / survey.num_rows:.2%}")
        for status, count in survey.counts.most_common()
    ]
    words = "ok; no_caption, no_image and bad_image were labeled from what is left; failed have no labels."
    return Section("Status", words, [Table(("status", "rows", "share"), rows)])


def training_of(bundle: Bundle | None) -> dict[str, float]:
    """Give the share of training rows that bear each label, as far as the bundle knows."""
    known = (bundle.folder.read_json("metrics.json") or {}).get("training") if bundle else None
    return (
        {label: count / known["num_labeled"] for label, count in known["by_label"].items()} if known else {}
    )


def by_label(survey: Survey, names: Sequence[str], training: dict[str, float]) -> Section:
    """Show how many rows were given which label, beside the share of training rows that bear it."""
    counts = np.broadcast_to(survey.labels, len(names))
    rows: list[Sequence[str | Cell]] = []
    for label in np.argsort(-counts, kind="stable"):
        share = counts[label] / max(1, survey.num_rows)
        row: list[str | Cell] = [names[label], f"{counts[label]:,}", Cell(f"{share:.2%}", share)]
        if training:
            before = training.get(names[label], 0.0)
            row += [Cell(f"{before:.2%}", before), f"{share / before:.2f}" if before else "-"]
        rows.append(row)
    columns = ["label", "rows", "share", *["share in training", "ratio"] * bool(training)]
    words = (
        "A ratio far from 1 says that these rows are other than those that trained the model, or that the "
        "model is wrong about them."
        if training
        else "With --model, the share of training rows stands beside it."
    )
    return Section("Labels", words, [Table(columns, rows)])


def by_score(survey: Survey, surveyor: Surveyor, names: Sequence[str]) -> Section:
    """Show how scores are spread, by label."""
    histogram, edges = np.asarray(survey.histogram), np.linspace(0, 1, NUM_BINS + 1)
    charts = [
        Chart(
            names[label],
            [Series(edges, histogram[label], kind="steps")],
            *("score", "rows"),
            mark=float(surveyor.thresholds[label]),
            log=True,
        )
        for label in np.argsort(-np.asarray(survey.labels), kind="stable")[:MAX_CHARTED]
    ]
    words = "Rows by score, on a logarithmic scale; the dotted line is the threshold."
    if len(names) > MAX_CHARTED:
        words += f" The {MAX_CHARTED} most frequent of {len(names):,} labels."
    return Section("Scores", words, charts=charts)


def by_reason(survey: Survey) -> Section:
    """Show why rows were rejected."""
    rows = [(reason, f"{count:,}") for reason, count in survey.reasons.most_common(SHOWN_REASONS)]
    words = f"Each is listed in _mmray/rejected/. The {SHOWN_REASONS} most frequent reasons; # is any number."
    return Section("Rejected rows", words, [Table(("reason", "rows"), rows)])


def by_time(output: Folder, plan: Plan) -> Iterator[Section]:
    """Show how fast rows were labeled, where files came one after another and a store tells when."""
    known = output.times()
    files = sorted((known[file.path], file.num_rows) for file in plan.files if file.path in known)
    times, rows = np.array(files, float).reshape(-1, 2).T
    taken_over = plan.settings.get("retry_of") or plan.settings.get("decided_from")
    if taken_over or len(times) < 2 or (seconds := float(np.ptp(times))) < 1:
        return
    # What the first file holds was labeled before the time that is shown; backwards, since the rows of a file
    # belong to the interval that it ends.
    num_bins, ends = min(NUM_INTERVALS, len(times) - 1), (-float(times[-1]), -float(times[0]))
    in_place, edges = np.histogram(-times[1:], num_bins, ends, weights=rows[1:])
    in_place, edges = in_place[::-1], -edges[::-1]
    name, unit = next((name, unit) for name, unit in UNITS.items() if seconds > 3 * unit or unit == 1)
    rates = in_place / (edges[1] - edges[0])
    series = [Series((edges - edges[0]) / unit, rates, kind="steps")]
    words = (
        "By when the store says that each file was put in place, whole: its rows count there. A job that was "
        "run again shows the pause between; an output that was copied, the copy."
    )
    yield Section("Speed", words, charts=[Chart("Rows a second", series, name, "rows/s")])


def gallery(shown: Sequence[Card], survey: Survey, *, scored: bool, searched: bool) -> Section:
    """Show rows."""
    words = f"Of {survey.num_rows:,} rows at most {SHOWN} of each kind, labels taking turns."
    if scored:
        words += " The least certain have the highest mean entropy of scores."
    else:
        words += " The output does not keep all scores: how certain its rows are cannot be told."
    if searched:
        words += (
            f" Rows whose image and caption disagree were sought among {COUNTS[RANDOM]} at random: each of "
            "the two, seen alone, decides a label differently."
        )
    else:
        words += (
            " With --input their images are shown; with --model, too, rows are found whose image and caption "
            "disagree, if it uses both."
        )
    return Section("Rows to look at", words, cards=shown)


def made_of(plan: Plan, manifest: dict[str, Any]) -> Section:
    """Show what made the output."""
    settings = {name: value for name, value in plan.settings.items() if name not in ("labels", "thresholds")}
    known = {"fingerprint": plan.fingerprint, **settings, **manifest["versions"]}
    rows = [(name, str(value)) for name, value in known.items() if value not in (None, [], ())]
    return Section("Made with", tables=[Table(("what", "value"), rows)])
