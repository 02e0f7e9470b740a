"""Picked rows of a labeled output as cards of a page."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmray.bundle import Bundle
from mmray.looks import Look
from mmray.page import Card, Score
from mmray.picking import COUNTS, SHOWN
from mmray.schema import Status, Vocabulary

SHOWN_SCORES = 5
MAX_CAPTION = 300
DISAGREEING = "image and caption disagree"


def cards(looks: Sequence[Look], vocabulary: Vocabulary) -> list[Card]:
    """Make cards of rows, those of a kind in the order of their picks, as many as are shown."""
    return [
        card(look, vocabulary)
        for kind in COUNTS
        for look in [look for look in looks if look.pick.kind == kind][:SHOWN]
    ]


def card(look: Look, vocabulary: Vocabulary, kind: str = "", remark: str = "") -> Card:
    """Make a card of a row."""
    pick, shown = look.pick, np.argsort(-look.scores, kind="stable")[:SHOWN_SCORES]
    names = [str(label) for label in vocabulary.labels]
    scores = dict(enumerate(look.scores.tolist()))
    if not scores:  # of all labels none were kept
        shown = np.flatnonzero(look.decided)
    return Card(
        kind or pick.kind,
        f"{pick.path}, row {pick.row}",
        (look.caption or "")[:MAX_CAPTION],
        look.status,
        look.error or "",
        [Score(names[label], scores.get(label), bool(look.decided[label])) for label in shown],
        np.flatnonzero(look.decided).tolist(),
        look.thumbnail,
        remark,
    )


def disagreeing(looks: Sequence[Look], bundle: Bundle) -> list[Card]:
    """Make cards of rows of which image and caption, each seen alone, decide a label differently."""
    from mmray.labeler import Labeler

    both = [look for look in looks if look.square and look.status == Status.OK]
    if not both:
        return []
    labeler, nothing = Labeler(bundle), [None] * len(both)
    by_image = labeler([look.square for look in both], nothing).scores
    by_caption = labeler(nothing, [look.caption for look in both]).scores
    differ = (by_image >= bundle.thresholds) != (by_caption >= bundle.thresholds)
    gap = np.abs(by_image - by_caption) * differ
    found = []
    for place in np.argsort(-gap.max(axis=1), kind="stable")[:SHOWN]:
        if not differ[place].any():
            break
        label = int(gap[place].argmax())
        remark = (
            f"{bundle.vocabulary.labels[label]}: {by_image[place, label]:.2f} by the image alone, "
            f"{by_caption[place, label]:.2f} by the caption alone"
        )
        found.append(card(both[place], bundle.vocabulary, DISAGREEING, remark))
    return found
