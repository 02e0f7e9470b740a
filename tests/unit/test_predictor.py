"""Batches to logits: cut to size, halved when they do not fit, whoever calls."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch

from mmray.config import ModelConfig
from mmray.fusions import Inputs
from mmray.model import build_model
from mmray.predictor import DeviceError, FixedBatch, Predictor
from mmray.towers import describe_encoder

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = ModelConfig(
    vision="test_efficientnet", image_size=32, max_tokens=12, width=16, num_heads=2, pretrained=False
)
NUM_LABELS = 4
FITS = 3
"""Rows that fit into the memory that the tests pretend to have."""


def predictor(batch_size):
    torch.manual_seed(0)
    model = build_model(CONFIG, NUM_LABELS, describe_encoder(CONFIG, 50)).eval()
    return Predictor(model, torch.device("cpu"), torch.float32, batch_size=batch_size, flip=False)


def cramped(batch_size):
    """Give a predictor whose tower runs out of memory, as a GPU would, from more than `FITS` rows on."""
    made = predictor(batch_size)

    def refuse(tower, given):
        if len(given[0]) > FITS:
            raise torch.OutOfMemoryError("tried to allocate more than there is")

    made.model.image.register_forward_pre_hook(refuse)
    return made


def inputs(num_rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    everywhere = torch.ones(num_rows, dtype=torch.bool)
    return Inputs(
        torch.randint(0, 256, (num_rows, 32, 32, 3), dtype=torch.uint8, generator=generator),
        everywhere,
        torch.randint(5, 50, (num_rows, 9), generator=generator),
        torch.ones(num_rows, 9, dtype=torch.int64),
        everywhere,
    )


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_more_rows_than_are_computed_at_once_come_back_in_their_order(batch_size):
    rows = inputs(7)
    assert np.allclose(predictor(batch_size).submit(rows)(), predictor(64).submit(rows)(), atol=1e-5)


def test_a_batch_that_does_not_fit_is_halved_and_the_next_ones_are_cut(caplog):
    rows, small = inputs(10), cramped(8)
    with caplog.at_level("WARNING"):
        logits = small.submit(rows)()
    assert small.batch_size == 2
    assert [record.args for record in caplog.records] == [(8, 4), (4, 2)]
    assert np.allclose(logits, predictor(64).submit(rows)(), atol=1e-5)
    assert np.allclose(small.submit(rows)(), logits, atol=1e-5)
    assert len(caplog.records) == 2


def test_callers_who_run_out_of_memory_together_lose_no_row():
    small, batches = cramped(64), [inputs(20, seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as callers:
        found = list(callers.map(lambda batch: small.submit(batch)(), batches))
    for batch, logits in zip(batches, found, strict=True):
        assert np.allclose(logits, predictor(64).submit(batch)(), atol=1e-5)
    assert small.batch_size == 2


def test_a_row_that_does_not_fit_alone_is_an_error():
    small = predictor(2)

    def refuse(tower, given):
        raise torch.OutOfMemoryError("tried to allocate more than there is")

    small.model.image.register_forward_pre_hook(refuse)
    with pytest.raises(torch.OutOfMemoryError):
        small.submit(inputs(2))


@pytest.mark.parametrize(("num_rows", "computed"), [(1, 1), (2, 2), (3, 5), (4, 5), (5, 5)])
def test_what_is_compiled_sees_whole_batches_and_a_few_rows_go_without_it(num_rows, computed):
    seen = []
    tower = predictor(5).model.image
    tower.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    pixels = inputs(num_rows).pixels
    with torch.inference_mode():
        assert torch.allclose(FixedBatch(tower, tower, 5)(pixels), tower(pixels), atol=1e-5)
    assert seen == [computed, num_rows]


def test_a_tower_is_compiled_once(monkeypatch):
    """For other tensors than those of batches it would be compiled again, with the first one of them."""
    compilations = []

    def backend(graph, given):
        compilations.append(len(given))
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    eager, compiled = predictor(4), predictor(4)
    compiled.compile(32)
    assert len(compilations) == 1
    for num_rows in (4, 3):
        assert np.allclose(compiled.submit(inputs(num_rows))(), eager.submit(inputs(num_rows))(), atol=1e-5)
    assert len(compilations) == 1


def test_a_gpu_that_fails_for_good_is_told_from_an_error_that_passes():
    spoilt = predictor(2)

    def fail(tower, given):
        raise torch.AcceleratorError("an illegal memory access was encountered")

    spoilt.model.image.register_forward_pre_hook(fail)
    with pytest.raises(DeviceError, match="illegal memory access"):
        spoilt.submit(inputs(2))
