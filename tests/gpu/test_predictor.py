"""The model on a GPU: the CPU's scores, whole batches that do not fit, and what is compiled."""

import numpy as np
import pytest
import torch

from mmray.config import ModelConfig
from mmray.fusions import Inputs
from mmray.model import build_model
from mmray.predictor import Predictor
from mmray.towers import describe_encoder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

CONFIG = ModelConfig(vision="efficientnet_b0", image_size=64, max_tokens=12, pretrained=False)
NUM_LABELS = 5


def predictor(device, dtype=torch.float32, batch_size=64, flip=False):
    torch.manual_seed(0)
    model = build_model(CONFIG, NUM_LABELS, describe_encoder(CONFIG, 50)).eval()
    return Predictor(model, torch.device(device), dtype, batch_size=batch_size, flip=flip)


def inputs(num_rows, size_px=CONFIG.image_size):
    generator = torch.Generator().manual_seed(num_rows)
    return Inputs(
        torch.randint(0, 256, (num_rows, size_px, size_px, 3), dtype=torch.uint8, generator=generator),
        torch.rand(num_rows, generator=generator) > 0.1,
        torch.randint(5, 50, (num_rows, 9), generator=generator),
        torch.ones(num_rows, 9, dtype=torch.int64),
        torch.rand(num_rows, generator=generator) > 0.1,
    )


@pytest.mark.parametrize("flip", [False, True])
def test_scores_are_the_cpus(flip):
    rows = inputs(100)
    expected = predictor("cpu", flip=flip).submit(rows)()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    pinned = Inputs(*(part.pin_memory() for part in rows))
    for given in (rows, pinned):
        logits = predictor("cuda", flip=flip).submit(given)()
        assert logits.dtype == np.float32
        assert np.allclose(logits, expected, atol=1e-3)
    half = predictor("cuda", torch.bfloat16, flip=flip).submit(rows)()
    assert np.allclose(half, expected, atol=0.1)


def test_many_batches_under_way_keep_their_order():
    one = predictor("cuda")
    batches = [inputs(num_rows) for num_rows in range(1, 41)]
    expected = [one.submit(batch)() for batch in batches]
    waiting = [one.submit(Inputs(*(part.pin_memory() for part in batch))) for batch in batches]
    for logits, alone in zip(waiting, expected, strict=True):
        assert np.allclose(logits(), alone, atol=1e-3)
    assert one.seconds > 0


def test_a_batch_that_does_not_fit_is_halved_until_it_does():
    big = predictor("cuda", batch_size=512)
    rows = inputs(512, 256)
    expected = predictor("cuda", batch_size=8).submit(rows)()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (1 << 30)) / total)
    try:
        logits = big.submit(rows)()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert big.batch_size < 512
    assert np.allclose(logits, expected, atol=1e-3)


def test_a_compiled_tower_gives_the_same_scores_for_batches_of_any_size():
    plain, compiled = (predictor("cuda", torch.bfloat16, batch_size=32) for _ in range(2))
    compiled.compile(CONFIG.image_size)
    for num_rows in (32, 7, 70):
        rows = inputs(num_rows)
        assert np.allclose(compiled.submit(rows)(), plain.submit(rows)(), atol=0.1)
