"""Decoding in a pool of its own: actors wherever the cluster has CPUs, for models that outrun a few threads.

Threads beside the model share its interpreter: 16 of them decoded 1,300 images/s where as many processes
decoded 3,500, and EfficientNet-B4 on an H200 takes 3,900 (`tests/peers/gpu.py`). But pixels, unlike encoded
images, have to travel: 433 kB an image at 380 px.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator

import pyarrow as pa
import ray

from mmray.columns import text_values
from mmray.config import Columns, ModelConfig
from mmray.decoded import DECODED, to_column
from mmray.decoding import RowDecoder
from mmray.errors import SpoiltError
from mmray.fetch import image_values
from mmray.isolation import IsolatedDecoder
from mmray.parcels import Parcel, unpack

log = logging.getLogger(__name__)

MAX_PIXEL_BYTES = 1 << 30
"""A shard with more stays encoded, and is decoded beside the model: on their way pixels take thrice that."""

DECODED_ROWS = 64
"""Rows whose pixels are put into a column together."""


class DecodeShards:
    """An actor of the pool: encoded images in, pixels out."""

    def __init__(self, columns: Columns, model: ModelConfig) -> None:
        """Take the names of columns, and what the model wants to see."""
        self.columns = columns
        # Its predecessor may have died of a row that now comes again.
        isolated = ray.get_runtime_context().was_current_actor_reconstructed
        decode = IsolatedDecoder() if isolated else None
        self.decoder = RowDecoder(model.fusion, model.image_size, 1, decode)

    def __call__(self, packed: pa.Table) -> Iterator[pa.Table]:
        """Decode shards."""
        for parcel in unpack(packed):
            yield shielded(parcel, self._decoded).packed()

    def _decoded(self, parcel: Parcel) -> Parcel:
        rows, name = parcel.rows, self.columns.image
        assert rows is not None
        if len(rows) * 3 * self.decoder.size_px**2 > MAX_PIXEL_BYTES:
            return parcel
        images, captions = image_values(rows[name]), text_values(rows[self.columns.caption])
        decoded = []  # in parts, so that what a shard's pixels take is not there twice
        for start in range(0, len(images), DECODED_ROWS):
            part = slice(start, start + DECODED_ROWS)
            decoded.append(to_column(self.decoder.submit(images[part], captions[part])()))
        index = rows.schema.get_field_index(name)
        return parcel._replace(rows=rows.set_column(index, name, pa.chunked_array(decoded, DECODED)))


def shielded(parcel: Parcel, work: Callable[[Parcel], Parcel]) -> Parcel:
    """Do some work on a parcel in an actor; what goes wrong travels on as data.

    Raised through Ray Data, an error would end the run of all the others, and keep the actors of the run
    alive for as long as it is held.
    """
    error = parcel.error
    if error is None:
        try:
            return work(parcel)
        except SpoiltError:  # Ray starts another process
            log.exception("this process ends")
            os.kill(os.getpid(), signal.SIGKILL)
        except Exception as raised:
            error = raised
    return parcel._replace(rows=None, earlier=None, error=error)
