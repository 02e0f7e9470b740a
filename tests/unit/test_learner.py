"""Learning: it falls, it follows its schedule, it averages, it continues where it stopped."""

import io
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmray.config import FUSIONS, LOSSES, ModelConfig, TrainConfig
from mmray.fusions import Inputs
from mmray.learner import BASE_BATCH_SIZE, Learner, drop_modalities, drop_words, freeze_unused
from mmray.losses import asymmetric, binary_cross_entropy, focal
from mmray.model import build_model
from mmray.towers import describe_encoder

SIZE_PX = 64
NUM_WORDS = 20
NUM_LABELS = 3
MODEL = ModelConfig(
    vision="test_efficientnet", image_size=SIZE_PX, width=16, num_heads=2, dropout=0.0, pretrained=False
)
TRAIN = TrainConfig(epochs=3, warmup_epochs=1.0, batch_size_per_worker=BASE_BATCH_SIZE, learning_rate=1e-3)
POSITIVES = np.array([4, 2, 5])


pytestmark = pytest.mark.usefixtures("one_thread")


def built(**changes):
    torch.manual_seed(0)
    config = replace(MODEL, **changes)
    return build_model(config, NUM_LABELS, describe_encoder(config, NUM_WORDS))


def learner(train=TRAIN, steps_per_epoch=10, world_size=1, model=None):
    return Learner(
        model or built(),
        train,
        num_rows=8,
        positives=POSITIVES,
        steps_per_epoch=steps_per_epoch,
        world_size=world_size,
    )


def batch(num_rows=8, seed=0):
    """Draw rows, all of them complete, their targets, and a mask that knows all labels."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.ones(num_rows, dtype=torch.bool)
    inputs = Inputs(
        torch.randint(0, 256, (num_rows, SIZE_PX, SIZE_PX, 3), generator=generator, dtype=torch.uint8),
        rows,
        torch.randint(1, NUM_WORDS, (num_rows, 5), generator=generator),
        torch.ones(num_rows, 5, dtype=torch.int64),
        rows,
    )
    targets = torch.randint(0, 2, (num_rows, NUM_LABELS), generator=generator).float()
    return inputs, targets, torch.ones(num_rows, NUM_LABELS, dtype=torch.bool)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_loss_of_a_batch_falls_as_it_is_learned(fusion):
    learning = learner(
        replace(TRAIN, epochs=30, ema_decay=0.5), steps_per_epoch=1, model=built(fusion=fusion)
    )
    losses = [learning.step(*batch()).item() for _ in range(30)]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-3:]) < 0.5 * np.mean(losses[:3])
    inputs, targets, _ = batch()
    assert ((learning.readings(inputs)[0] > 0) == targets.numpy().astype(bool)).mean() > 0.9


@pytest.mark.parametrize("loss", LOSSES)
def test_members_have_the_mean_of_their_losses(loss):
    model, (inputs, targets, mask) = built(members=2), batch()
    mask = mask & (torch.arange(NUM_LABELS) != 1)
    learning = learner(replace(TRAIN, loss=loss), model=model)
    logits = model.train()(inputs).detach()
    each = [learning.loss(one, targets, mask) for one in logits]
    assert learning.loss(logits, targets, mask).item() == pytest.approx(sum(each).item() / 2, rel=1e-5)


def rates(learning, num_steps):
    """Give the rates of the steps, without their work."""
    found = []
    for step in range(num_steps):
        learning.num_steps = step
        found.append(learning.rate())
    return np.array(found)


def test_the_rate_warms_up_linearly_and_then_falls_as_a_cosine_to_zero():
    found = rates(learner(), 31)
    assert found[:10] == pytest.approx(1e-3 * np.arange(1, 11) / 10)
    cosine = [1e-3 * (1 + math.cos(math.pi * step / 20)) / 2 for step in range(21)]
    assert found[10:] == pytest.approx(cosine, abs=1e-12)
    assert (np.diff(found[10:]) < 0).all() and found[-1] == pytest.approx(0)


@pytest.mark.parametrize("warmup_epochs", [0.0, 0.01, 0.25, 2.5, 3.0, 9.0])
def test_the_rate_stays_between_zero_and_its_peak_whatever_the_warm_up(warmup_epochs):
    found = rates(learner(replace(TRAIN, warmup_epochs=warmup_epochs)), 40)
    assert (found >= 0).all() and (found <= 1e-3 + 1e-12).all() and found[0] > 0


def test_the_rate_grows_with_the_square_root_of_the_global_batch():
    assert learner(world_size=4).peak_rate == pytest.approx(2e-3)
    assert learner(replace(TRAIN, batch_size_per_worker=BASE_BATCH_SIZE // 4)).peak_rate == pytest.approx(
        5e-4
    )


GOLDEN = [
    *(0.667646, 0.640112, 0.638086, 0.712597, 0.585248, 0.502635, 0.503404, 0.545750, 0.475220, 0.444288),
    *(0.479128, 0.525041, 0.399621, 0.466993, 0.410869, 0.363975, 0.408150, 0.347596, 0.466201, 0.397455),
]
"""Losses of 20 steps on one thread: a change that should not change learning leaves them as they are."""


def test_the_loss_curve_is_the_golden_one():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        learning = learner(replace(TRAIN, epochs=5), steps_per_epoch=4)
        generator = torch.Generator().manual_seed(0)
        losses = []
        for step in range(20):
            inputs, targets, mask = batch(seed=step % 4)
            inputs = drop_modalities(inputs, 0.2, generator)
            losses.append(learning.step(inputs, targets, mask).item())
    finally:
        torch.set_num_threads(threads)
    assert losses == pytest.approx(GOLDEN, rel=1e-4)


def test_a_step_takes_the_rate_of_the_schedule():
    learning = learner(steps_per_epoch=2)
    for expected in rates(learner(steps_per_epoch=2), 3):
        learning.step(*batch())
        assert [group["lr"] for group in learning.optimizer.param_groups] == pytest.approx([expected] * 2)


def test_norms_and_biases_do_not_decay():
    learning = learner()
    spared, decaying = learning.optimizer.param_groups
    assert spared["weight_decay"] == 0 and decaying["weight_decay"] == TRAIN.weight_decay
    assert {weight.ndim for weight in spared["params"]} == {1}
    assert min(weight.ndim for weight in decaying["params"]) >= 2


def test_averaged_weights_follow_the_weights_and_never_run_ahead():
    learning = learner(replace(TRAIN, ema_decay=0.9))
    name = "head.head.layers.2.weight"
    average = learning.averaged.state_dict()[name].clone()
    decays = []
    for seed in range(6):
        learning.step(*batch(seed=seed))
        new, weights = learning.averaged.state_dict()[name], learning.model.state_dict()[name]
        moved, gap = (new - average).flatten(), (weights - average).flatten()
        decays.append(1 - float(moved @ gap / (gap @ gap)))
        assert torch.allclose(new, decays[-1] * average + (1 - decays[-1]) * weights, atol=1e-6)
        average = new.clone()
    assert all(-1e-4 <= decay <= 0.9 + 1e-4 for decay in decays) and decays[-1] > 0.3
    assert not torch.equal(average, learning.model.state_dict()[name])


@pytest.mark.parametrize("tower", ["image", "caption"])
def test_a_frozen_tower_stays_as_it_is_to_the_last_statistic_and_the_rest_learns(tower):
    learning = learner(replace(TRAIN, freeze=(tower,)))
    before = state_of(learning.model)
    for _ in range(3):
        learning.step(*batch())
    for model in (learning.model, learning.averaged):
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert {name.partition(".")[0] for name in changed} == {"image", "caption", "head"} - {tower}


def test_logits_are_those_of_the_averaged_weights():
    learning = learner(replace(TRAIN, ema_decay=0.9))
    for seed in range(3):
        learning.step(*batch(seed=seed))
    inputs = batch()[0]
    with torch.inference_mode():
        averaged = learning.averaged.eval()(inputs).numpy()
        latest = learning.model.eval()(inputs).numpy()
    logits, _ = learning.readings(inputs)
    assert logits.dtype == np.float32 and np.allclose(logits, averaged, atol=1e-6)
    assert not np.allclose(logits, latest, atol=1e-6)


def test_without_averaging_the_weights_themselves_are_kept():
    learning = learner(replace(TRAIN, ema_decay=0))
    learning.step(*batch())
    assert learning.averaged is learning.model


def steps(learning, first, last):
    for seed in range(first, last):
        torch.manual_seed(seed)  # dropout of the caption tower
        learning.step(*batch(seed=seed))


@pytest.mark.parametrize("ema_decay", [0.9, 0.0])
def test_a_loaded_checkpoint_continues_as_if_nothing_had_happened(tmp_path, ema_decay):
    train = replace(TRAIN, ema_decay=ema_decay)
    through, before = learner(train, steps_per_epoch=2), learner(train, steps_per_epoch=2)
    steps(through, 0, 6)
    steps(before, 0, 3)
    before.save(tmp_path, {"epoch": 1, "best": 0.5})
    torch.manual_seed(99)
    config = replace(MODEL)
    fresh = build_model(config, NUM_LABELS, describe_encoder(config, NUM_WORDS))
    after = learner(train, steps_per_epoch=2, model=fresh)
    assert after.load(tmp_path) == {"epoch": 1, "best": 0.5, "num_steps": 3, "steps_per_epoch": 2}
    steps(after, 3, 6)
    assert after.num_steps == through.num_steps == 6
    assert equal(state_of(after.model), state_of(through.model))
    assert equal(state_of(after.averaged), state_of(through.averaged))
    assert not equal(state_of(after.model), state_of(before.model))


def test_more_workers_go_on_at_the_place_of_the_schedule_where_fewer_were(tmp_path):
    one, two = learner(steps_per_epoch=8, world_size=1), learner(steps_per_epoch=4, world_size=2)
    for seed in range(8):
        one.step(*batch(seed=seed))
    one.save(tmp_path, {"epoch": 1})
    two.load(tmp_path)
    assert two.num_steps == 4
    assert two.rate() == pytest.approx(one.rate() * math.sqrt(2), rel=0.1)


def test_a_checkpoint_that_calls_code_is_not_loaded(tmp_path):
    learning = learner()
    learning.save(tmp_path, {})
    harm = io.BytesIO()
    torch.save({"state": print}, harm)
    (tmp_path / "optimizer.pt").write_bytes(harm.getvalue())
    with pytest.raises(pickle.UnpicklingError):
        learning.load(tmp_path)


def test_what_the_mask_leaves_out_teaches_nothing():
    inputs, targets, mask = batch()
    mask[4:] = False
    one, other = learner(model=built(vision="test_vit")), learner(model=built(vision="test_vit"))
    torch.manual_seed(0)
    loss = one.step(inputs, targets, mask)
    targets[4:] = 1 - targets[4:]
    inputs.pixels[4:] = 0
    torch.manual_seed(0)
    assert torch.equal(other.step(inputs, targets, mask), loss)
    assert equal(state_of(one.model), state_of(other.model))


def test_a_batch_without_a_valid_row_moves_no_weight_but_by_decay():
    learning = learner(replace(TRAIN, weight_decay=0.0))
    before = state_of(learning.model)
    inputs, targets, mask = batch()
    assert learning.step(inputs, targets, ~mask) == 0
    for name, weight in learning.model.named_parameters():
        assert torch.equal(weight, before[name])


def test_the_loss_is_the_recipes_and_rare_labels_weigh_more_where_it_is_weighted():
    inputs, targets, mask = batch()
    model = built(vision="test_vit").eval()
    with torch.inference_mode():
        logits = model(inputs)

    def loss_of(kind):
        learning = learner(replace(TRAIN, loss=kind), model=model)
        learning.forward = lambda inputs: logits.clone().requires_grad_()
        return learning, learning.step(inputs, targets, mask)

    plain, weighted = loss_of("bce"), loss_of("weighted-bce")
    assert plain[0].pos_weight is None
    assert plain[1] == pytest.approx(binary_cross_entropy(logits, targets).item())
    weights = weighted[0].pos_weight
    assert weights.argmax() == POSITIVES.argmin()
    assert weighted[1] == pytest.approx(binary_cross_entropy(logits, targets, weights).item())
    for name, function in {"focal": focal, "asymmetric": asymmetric}.items():
        assert loss_of(name)[1] == pytest.approx(function(logits, targets).item())


def test_a_wrapped_model_is_what_steps_run():
    model, seen = built(), []

    def wrap(module):
        def forward(inputs):
            seen.append((module, len(inputs.pixels)))
            return module(inputs)

        return forward

    learning = Learner(model, TRAIN, num_rows=8, positives=POSITIVES, steps_per_epoch=2, wrap=wrap)
    learning.step(*batch())
    assert seen == [(model, 8)]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_nothing_is_frozen_where_a_gradient_reaches_everything(fusion):
    model = built(fusion=fusion)
    assert freeze_unused(model, SIZE_PX) == []
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())


def test_what_no_gradient_reaches_is_frozen_by_name_and_the_rest_left():
    model = built(fusion="concat")
    model.head.spare = torch.nn.Linear(2, 2)
    before = state_of(model)
    assert freeze_unused(model, SIZE_PX) == ["head.spare.weight", "head.spare.bias"]
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert frozen == {"head.spare.weight", "head.spare.bias"}
    assert all(weight.grad is None for weight in model.parameters())
    assert equal(state_of(model), before)


@settings(deadline=None, max_examples=50)
@given(st.floats(0, 0.5), st.integers(0, 2**32), st.integers(1, 200))
def test_hiding_modalities_leaves_every_row_one(share, seed, num_rows):
    generator = torch.Generator().manual_seed(seed)
    has_image = torch.rand(num_rows, generator=generator) < 0.8
    has_caption = ~has_image | (torch.rand(num_rows, generator=generator) < 0.8)
    ids = torch.ones(num_rows, 2, dtype=torch.int64)
    inputs = Inputs(torch.zeros(num_rows, 1, 1, 3, dtype=torch.uint8), has_image, ids, ids, has_caption)
    hidden = drop_modalities(inputs, share, generator)
    assert (hidden.has_image | hidden.has_caption).all()
    assert (hidden.has_image <= has_image).all() and (hidden.has_caption <= has_caption).all()
    alone = has_image != has_caption
    assert (hidden.has_image == has_image)[alone].all() and (hidden.has_caption == has_caption)[alone].all()
    assert hidden.pixels is inputs.pixels and hidden.input_ids is inputs.input_ids


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5])
def test_about_the_share_of_rows_loses_its_image_and_as_many_their_caption(share):
    rows = torch.ones(20_000, dtype=torch.bool)
    ids = torch.ones(20_000, 1, dtype=torch.int64)
    inputs = Inputs(ids, rows, ids, ids, rows)
    hidden = drop_modalities(inputs, share, torch.Generator().manual_seed(0))
    for has in (hidden.has_image, hidden.has_caption):
        assert 1 - has.float().mean() == pytest.approx(share, abs=0.015)


def test_the_same_seed_hides_the_same_rows():
    inputs = batch(num_rows=50)[0]
    one, other = (drop_modalities(inputs, 0.3, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one.has_image, other.has_image) and torch.equal(one.has_caption, other.has_caption)


def test_dropped_words_are_masked_at_about_the_share_and_special_tokens_stay():
    rows = torch.ones(50, dtype=torch.bool)
    ids = torch.randint(5, 100, (50, 40))
    ids[:, 0], ids[:, 30:] = 2, 0
    inputs = Inputs(torch.zeros(50, 1, 1, 3, dtype=torch.uint8), rows, ids, (ids != 0).long(), rows)
    dropped = drop_words(inputs, 0.3, 4, [0, 1, 2, 3, 4], torch.Generator().manual_seed(0)).input_ids
    changed = dropped != ids
    assert (dropped[changed] == 4).all()
    assert not changed[:, 0].any()
    assert not changed[:, 30:].any()
    assert 0.25 < changed[:, 1:30].float().mean() < 0.35
