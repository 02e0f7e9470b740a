"""Shards through the cluster: read by tasks, scored by an actor pool."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata

from mmray import retry
from mmray.bundle import Bundle
from mmray.config import Columns, LabelConfig
from mmray.decoders import DecodeShards, shielded
from mmray.errors import ConfigError, StorageError
from mmray.faults import moment
from mmray.fetch import fetch_images
from mmray.parcels import Parcel, unpack
from mmray.parquet import MAX_SHARD_BYTES, DataFile, Unit, read_units
from mmray.plan import Shard, Work, shards_of
from mmray.pool import Pool
from mmray.retry import Earlier
from mmray.schema import KeptScores
from mmray.storage import Folder

if TYPE_CHECKING:
    from mmray.labeler import Labeler
    from mmray.watching import Watch

READ_TASK_ROWS = 1000
"""Small files are read together, up to about this many rows per task."""

MAX_READ_TASKS = 50_000
"""The driver and the object store of its node hold all of them from the start: beyond, tasks are larger."""

BLOCK_BYTES = 8 << 20
"""Shards share a block up to this size. Ray cuts blocks between rows, and a row is a shard: none is torn."""

ATTEMPTS = 3
"""How often a parcel is tried again when its worker dies."""

CALLS = 2
"""Blocks that an actor works on at a time: while one's last rows are scored, the next one's are decoded."""

SHARD_BY_SHARD: dict[str, Any] = {
    "batch_size": 1,
    "batch_format": "pyarrow",
    "max_restarts": -1,
    "max_task_retries": ATTEMPTS,
}
"""Of a pool: a worker that dies is replaced for ever."""

TOLERATED_BLOCKS = 100
"""Blocks that may be lost, with all their workers, for a second pass to take up, before a run is given up."""


class Scorer(NamedTuple):
    """What scores: a model, how it is used, and where."""

    bundle: Bundle
    columns: Columns
    config: LabelConfig
    pool: Pool
    earlier: Earlier | None = None
    """A finished output of which only the failed rows are labeled again."""
    hidden: str | None = None
    """`image` or `caption`: what the model is not shown of any row."""

    @property
    def decodes_apart(self) -> bool:
        """Whether a pool decodes. Of rows that are hidden or labeled again most images are not wanted."""
        shown = "image" in self.bundle.model_config.towers and not (self.hidden or self.earlier)
        return self.config.decode == "pool" and shown


def score_shards(folder: Folder, work: Work, scorer: Scorer) -> ray.data.Dataset:
    """Read the shards of some work and score them: parcels of labeled tables.

    A worker that dies is replaced for ever, and its parcels are tried again: a row that killed it does not do
    so twice, since its successor decodes in processes of their own.
    """
    pool = scorer.pool
    # Ray Data has no other door for the limits of retries than the arguments that it calls deprecated.
    warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
    source = ShardSource(folder, work, scorer.columns, scorer.earlier)
    read = ray.data.read_datasource(source, **pool.tasks())
    if scorer.decodes_apart:
        read = read.map_batches(
            DecodeShards,
            fn_constructor_args=(scorer.columns, scorer.bundle.model_config),
            **pool.decoders(work.num_pending),
            **SHARD_BY_SHARD,
        )
    return read.map_batches(
        ScoreShards,
        fn_constructor_args=(scorer,),
        compute=ActorPoolStrategy(
            min_size=pool.minimum,
            max_size=pool.maximum,
            max_concurrent_calls_per_actor=CALLS,
            enable_true_multi_threading=True,
        ),
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus,
        **SHARD_BY_SHARD,
    )


class ShardSource(Datasource):
    """Reads the units of a plan that hold uncommitted shards; gives each of these shards as one row."""

    def __init__(self, folder: Folder, work: Work, columns: Columns, earlier: Earlier | None = None) -> None:
        """Take the input's folder, what is to be done, and the output whose failed rows are retried."""
        super().__init__()
        self.folder, self.work, self.columns, self.earlier = folder, work, columns, earlier

    def estimate_inmemory_data_size(self) -> int:
        """Estimate the bytes of encoded images that will be read."""
        return sum(file.image_bytes for file, _ in self.work.pending)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """Give a task for each unit; small ones share a task, and in a huge job others do."""
        tasks: list[list[tuple[DataFile, Unit]]] = []
        rows_left = bytes_left = 0
        for file, units in self.work.pending:
            for unit in units:
                num_rows, num_bytes = unit[-1] - unit[0], file.image_bytes_of(unit)
                if not tasks or num_rows > rows_left or num_bytes > bytes_left:
                    tasks.append([])
                    rows_left, bytes_left = READ_TASK_ROWS, MAX_SHARD_BYTES
                tasks[-1].append((file, unit))
                rows_left, bytes_left = rows_left - num_rows, bytes_left - num_bytes
        together = max(1, -(-len(tasks) // MAX_READ_TASKS))
        groups = (tasks[first : first + together] for first in range(0, len(tasks), together))
        return [self._task([*chain.from_iterable(group)]) for group in groups]

    def _task(self, units: list[tuple[DataFile, Unit]]) -> ReadTask:
        folder, columns, earlier = self.folder, self.columns, self.earlier
        committed = {shard for file, unit in units for shard in shards_of(file, [unit])} & self.work.committed

        def read() -> Iterator[pa.Table]:
            file = None
            try:
                for file, unit in units:
                    shards = [shard for shard in shards_of(file, [unit]) if shard not in committed]
                    labeled = retry.read_shards(earlier, file, shards) if earlier else repeat(None)
                    parcels = {
                        shard: Parcel(file, shard, None, table)
                        for shard, table in zip(shards, labeled, strict=False)
                    }
                    wanted = [shard for shard, parcel in parcels.items() if not parcel.is_done]
                    yield from (parcel.packed() for parcel in parcels.values() if parcel.is_done)
                    # A row group is read in order: only what is behind the last wanted shard can be skipped.
                    needed = [tuple(row for row in unit if row <= wanted[-1].end)] if wanted else []
                    for first, end, rows in read_units(folder, file, needed, salvage=True):
                        if (shard := Shard(file.path, first, end)) in wanted:
                            rows = fetch_images(rows, columns.image, columns.image_prefixes)
                            yield parcels[shard]._replace(rows=rows).packed()
            except Exception as error:
                assert file is not None, "a task has units"
                yield Parcel(file, Shard(file.path, 0, 0), error=error).packed()

        num_bytes = sum(file.image_bytes_of(unit) for file, unit in units)
        metadata = BlockMetadata(num_rows=len(units), size_bytes=num_bytes, exec_stats=None, input_files=None)
        return ReadTask(read, metadata)


class ScoreShards:
    """An actor of the pool: the model is loaded once, shards come and go."""

    def __init__(self, scorer: Scorer) -> None:
        """Load the model."""
        from mmray.watching import set_up_log

        set_up_log()
        self.scorer = scorer
        self.refusal: Exception | None = None
        try:
            self.label = self._load()
        except Exception as error:  # told of each shard: raised here, it would be Ray's, and its text lost
            self.refusal = error

    def _load(self) -> Watch:
        from mmray.tables import TableLabeler
        from mmray.watching import Watch

        bundle, columns, config, pool, _, hidden = self.scorer
        # Its predecessor may have died of a row that now comes again.
        isolated = ray.get_runtime_context().was_current_actor_reconstructed
        with room_for(config.actors_per_gpu):
            labeler = load_labeler(bundle, config, pool, isolated=isolated)
        return Watch(labeler, TableLabeler(labeler, columns, KeptScores.parse(config.scores), hidden))

    def __call__(self, packed: pa.Table) -> Iterator[pa.Table]:
        """Score shards."""
        for parcel in unpack(packed):
            yield shielded(parcel, self._score).packed()

    def _score(self, parcel: Parcel) -> Parcel:
        if isinstance(self.refusal, StorageError):  # it may be back
            self.label, self.refusal = self._load(), None
        if self.refusal:
            raise self.refusal
        moment("before score", "{} {}-{}".format(*parcel.shard))
        return parcel._replace(rows=self._labeled(parcel), earlier=None)

    def _labeled(self, parcel: Parcel) -> pa.Table:
        if parcel.is_done:
            return parcel.earlier
        assert parcel.rows is not None
        label = partial(self.label, parcel.shard)
        if parcel.earlier is None:
            return label(parcel.rows)
        return retry.relabel(label, parcel.rows, parcel.earlier)


def load_labeler(bundle: Bundle, config: LabelConfig, pool: Pool, *, isolated: bool = False) -> Labeler:
    """Load the model as an actor of the pool has it; isolated, it decodes in processes of their own."""
    import torch

    from mmray.isolation import IsolatedDecoder
    from mmray.labeler import Labeler

    torch.set_num_threads(pool.num_threads)  # Ray sets one thread for each CPU that was asked for
    assert config.precision is not None
    return Labeler(
        bundle,
        batch_size=config.batch_size,
        device=pool.device,
        precision=config.precision,
        flip=config.flip,
        compiled=config.compiled,
        num_threads=pool.num_threads,
        decode=IsolatedDecoder() if isolated else None,
        decode_on_gpu=config.decode == "gpu" and not isolated,
    )


@contextmanager
def room_for(actors: int) -> Iterator[None]:
    """Name the remedy when a GPU that actors share has no memory for a model, or takes one process alone."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
        if actors == 1:
            raise
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(f"--actors-per-gpu {actors}: {reason}; try 1") from error


@contextmanager
def streaming(pool: Pool, *, tolerant: bool = False) -> Iterator[None]:
    """Let blocks be small: tiny shards share one, a large shard has its own and moves on once it is read.

    Args:
        pool: where work may run.
        tolerant: go on when a block is lost with its workers, after all attempts.
    """
    warnings.filterwarnings("ignore", "The maximum number of concurrent tasks")  # a small job has fewer
    context = DataContext.get_current()
    settings = [
        (context, "target_max_block_size", BLOCK_BYTES),
        (context, "max_errored_blocks", TOLERATED_BLOCKS if tolerant else 0),
        (context, "max_consecutive_actor_init_deaths", ATTEMPTS),
        (context.execution_options, "label_selector", pool.places),
    ]
    before = [(place, name, getattr(place, name)) for place, name, _ in settings]
    try:
        for setting in settings:
            setattr(*setting)
        yield
    finally:
        for setting in before:
            setattr(*setting)
