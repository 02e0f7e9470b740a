"""What a scoring actor tells those who watch: Ray's metrics, and a line of JSON for each shard in its log.

mmray_rows           rows scored, by status
mmray_model_seconds  in which the model computed
mmray_wait_seconds   in which the actor had no shard to score
mmray_model_share    of the time since the shard before was done: the model's; of actors that share a GPU each
                     also counts what the others compute meanwhile

The line's `seconds` are those of its shard. An actor works on several at a time: `model_s` and `waited_s` are
the actor's, since the line before.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import pyarrow as pa
from ray.util import metrics

from mmray.errors import RedactingFormatter
from mmray.plan import Shard

if TYPE_CHECKING:
    from mmray.labeler import Labeler

log = logging.getLogger(__name__)

TINY = 1e-9
"""Ray's counters refuse to be increased by nothing."""


def set_up_log() -> None:
    """Let a worker's stderr, which is its log, have what mmray tells there, without credentials."""
    ours = logging.getLogger("mmray")
    if not ours.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(RedactingFormatter())
        ours.addHandler(handler)
        ours.setLevel(logging.INFO)
        ours.propagate = False


class Watch:
    """Labels tables, and follows how that goes."""

    def __init__(self, labeler: Labeler, label: Callable[[pa.Table], pa.Table]) -> None:
        """Take the model, and what labels tables with it; starts the clock."""
        self.labeler, self.label = labeler, label
        self.rows = metrics.Counter("mmray_rows", "Rows scored.", ("status",))
        self.model = metrics.Counter("mmray_model_seconds", "Seconds in which the model computed.")
        self.wait = metrics.Counter("mmray_wait_seconds", "Seconds without a shard to score.")
        self.share = metrics.Gauge(
            "mmray_model_share", "Share of the time since the last shard in which the model computed."
        )
        self._told = self._idle_since = time.monotonic()
        self._lock, self._at_work = threading.Lock(), 0
        self._waited, self._computed = 0.0, 0.0  # not told of yet; told of so far

    def __call__(self, shard: Shard, rows: pa.Table) -> pa.Table:
        """Label the rows of a shard that want it. Several threads may call."""
        began = time.monotonic()
        with self._lock:
            if not self._at_work:
                self._waited += began - self._idle_since
            self._at_work += 1
        try:
            labeled = self.label(rows)
        finally:
            with self._lock:
                self._at_work -= 1
                self._idle_since = time.monotonic()
        self._tell(shard, Counter(labeled["status"].to_pylist()), time.monotonic() - began)
        return labeled

    def _tell(self, shard: Shard, counts: Counter[str], seconds: float) -> None:
        with self._lock:
            total = self.labeler.predictor.seconds
            computed, self._computed = total - self._computed, total
            waited, self._waited = self._waited, 0.0
            now = time.monotonic()
            passed, self._told = now - self._told, now
        for status, count in counts.items():
            self.rows.inc(count, {"status": status})
        self.model.inc(max(computed, TINY))
        self.wait.inc(max(waited, TINY))
        self.share.set(min(1.0, computed / max(passed, TINY)))
        told = {"seconds": seconds, "model_s": computed, "waited_s": waited}
        rounded = {name: round(value, 3) for name, value in told.items()}
        log.info(json.dumps({"shard": [*shard], "rows": counts.total(), **counts, **rounded}))
