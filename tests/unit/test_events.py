"""A run's history, as TensorBoard reads it."""

import struct

from tensorboardX.proto.event_pb2 import Event

from mmray.events import event_file


def scalars(data):
    """Read records (length, its checksum, event, its checksum): step, name, value."""
    place = 0
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        event = Event.FromString(data[place + 12 : place + 12 + length])
        yield from ((event.step, value.tag, value.simple_value) for value in event.summary.value)
        place += length + 16


def test_each_metric_of_an_epoch_is_a_scalar():
    epoch = {"epoch": 2, "loss": 0.125, "map": 0.5, "seconds": 10.0}
    assert list(scalars(event_file(epoch))) == [(2, "loss", 0.125), (2, "map", 0.5), (2, "seconds", 10.0)]
