"""A run's history, as TensorBoard reads it."""

import struct

from tensorboardX.proto.event_pb2 import Event

from mmray.events import event_file


def scalars(data):
    """Read records (length, its checksum, event, its checksum): step, name, value, seconds so far."""
    place = 0
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        event = Event.FromString(data[place + 12 : place + 12 + length])
        yield from (
            (event.step, value.tag, value.simple_value, event.wall_time) for value in event.summary.value
        )
        place += length + 16


def test_each_metric_of_each_epoch_is_a_scalar():
    history = [
        {"epoch": 1, "loss": 0.5, "map": 0.25, "seconds": 30.0},
        {"epoch": 2, "loss": 0.125, "map": 0.5, "seconds": 10.0},
    ]
    assert sorted(scalars(event_file(history))) == [
        (1, "loss", 0.5, 30.0),
        (1, "map", 0.25, 30.0),
        (1, "seconds", 30.0, 30.0),
        (2, "loss", 0.125, 40.0),
        (2, "map", 0.5, 40.0),
        (2, "seconds", 10.0, 40.0),
    ]
