"""What the first training worker tells the driver, who shows it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

import ray
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mmray.learner import Batches
from mmray.progress import Progress

NEWS_INTERVAL_S = 0.5


class News:
    """What the first worker tells the driver, as far as somebody listens."""

    def __init__(self, queue: Queue | None) -> None:
        """Take the driver's queue."""
        self.queue = queue
        self._told = 0.0

    def about(self, batches: Batches, epoch: int, num_steps: int) -> Batches:
        """Pass batches on, and tell now and then how many have been."""
        for step, batch in enumerate(batches, 1):
            yield batch
            due = step == num_steps or time.monotonic() - self._told > NEWS_INTERVAL_S
            if self.queue is not None and due:
                self._told = time.monotonic()
                self.queue.put({"step": (epoch - 1) * num_steps + step, "steps_per_epoch": num_steps})

    def tell(self, line: str) -> None:
        """Tell a line."""
        if self.queue is not None:
            self.queue.put({"line": line})


@contextmanager
def heard(show: bool, epochs: int) -> Iterator[Queue | None]:
    """Give workers a queue for news, and show what comes; None when nobody wants to know."""
    if not show:
        yield None
        return
    # Beside the driver, so that it outlives every other node.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    news = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})

    def listen(progress: Progress) -> None:
        while (item := news.get()) is not None:
            if "line" in item:
                progress.print(item["line"])
            else:
                progress.total = item["steps_per_epoch"] * epochs
                progress.update(item["step"], epoch=f"{-(-item['step'] // item['steps_per_epoch'])}/{epochs}")

    with Progress("train", None, "steps") as progress:
        thread = Thread(target=listen, args=(progress,), name="news", daemon=True)
        thread.start()
        try:
            yield news
        finally:
            news.put(None)
            thread.join(timeout=5)
