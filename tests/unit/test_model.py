"""Towers and fusions: shapes, gradients, missing modalities, padding, size, and models out of reach."""

import socket

import pytest
import torch
from huggingface_hub import constants

from mmray.config import FUSIONS, ModelConfig
from mmray.errors import ConfigError
from mmray.fusions import Inputs, masked_mean
from mmray.model import MultimodalModel, build_model
from mmray.towers import describe_encoder

NUM_LABELS = 5
NUM_WORDS = 40
BOTH = [fusion for fusion in FUSIONS if fusion not in ("image", "text")]


pytestmark = pytest.mark.usefixtures("one_thread")


def config_of(**settings):
    return ModelConfig(
        **{
            "vision": "test_efficientnet",
            "text": "google/bert_uncased_L-2_H-128_A-2",
            "fusion": "cross-attention",
            "image_size": 32,
            "width": 16,
            "num_heads": 2,
            "pretrained": False,
        }
        | settings
    )


def built(**settings):
    """Build a tiny model, always with the same weights, ready to label."""
    torch.manual_seed(0)
    config = config_of(**settings)
    return build_model(config, NUM_LABELS, describe_encoder(config, NUM_WORDS)).eval()


@pytest.fixture(scope="module")
def models():
    """One model for each fusion; tests leave them as they are."""
    return {fusion: built(fusion=fusion) for fusion in FUSIONS}


def batch(num_rows=4, size_px=32, num_tokens=6, seed=0):
    """Draw rows of which the third has no image and the fourth no caption."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(num_rows)
    lengths = torch.randint(2, num_tokens + 1, (num_rows, 1), generator=generator)
    return Inputs(
        torch.randint(0, 256, (num_rows, size_px, size_px, 3), generator=generator, dtype=torch.uint8),
        rows != 2,
        torch.randint(1, NUM_WORDS, (num_rows, num_tokens), generator=generator),
        (torch.arange(num_tokens) < lengths).long(),
        rows != 3,
    )


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_row_gets_a_finite_logit_for_every_label(models, fusion):
    logits = models[fusion](batch())
    assert logits.shape == (4, NUM_LABELS) and logits.dtype == torch.float32
    assert logits.isfinite().all()
    assert logits.unique(dim=0).shape[0] == 4


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_gradient_reaches_every_parameter(fusion):
    model = built(fusion=fusion, image_size=64).train()
    model(batch(num_rows=8, size_px=64)).square().sum().backward()
    without = [
        name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()
    ]
    assert without == []


@pytest.mark.parametrize("fusion", BOTH)
def test_what_stands_in_for_a_missing_image_or_caption_has_no_say(models, fusion):
    inputs, other = batch(), batch(seed=1)
    logits = models[fusion](inputs)
    pixels, input_ids = inputs.pixels.clone(), inputs.input_ids.clone()
    pixels[2], input_ids[3] = other.pixels[2], other.input_ids[3]
    assert torch.allclose(models[fusion](inputs._replace(pixels=pixels)), logits, atol=1e-6)
    assert torch.allclose(models[fusion](inputs._replace(input_ids=input_ids)), logits, atol=1e-6)
    mask = inputs.attention_mask.clone()
    mask[3] = torch.tensor([1, 1, 0, 0, 0, 0])
    assert torch.allclose(models[fusion](inputs._replace(attention_mask=mask)), logits, atol=1e-5)


@pytest.mark.parametrize("fusion", BOTH)
def test_an_image_and_a_caption_that_are_there_have_a_say(models, fusion):
    inputs, other = batch(), batch(seed=1)
    logits = models[fusion](inputs)
    by_image = models[fusion](inputs._replace(pixels=other.pixels))
    by_caption = models[fusion](inputs._replace(input_ids=other.input_ids))
    assert (by_image != logits).any(1).tolist() == [True, True, False, True]
    assert (by_caption != logits).any(1).tolist() == [True, True, True, False]


@pytest.mark.parametrize("fusion", BOTH)
def test_a_missing_modality_is_not_a_black_image_or_an_empty_caption(models, fusion):
    inputs = batch()
    there = inputs._replace(
        has_image=torch.ones(4, dtype=torch.bool), has_caption=torch.ones(4, dtype=torch.bool)
    )
    changed = (models[fusion](inputs) - models[fusion](there)).abs().amax(1) > 1e-4
    assert changed.tolist() == [False, False, True, True]


@pytest.mark.parametrize("fusion", [fusion for fusion in FUSIONS if fusion != "image"])
def test_padding_of_captions_changes_no_logit(models, fusion):
    inputs = batch()
    more = torch.randint(0, NUM_WORDS, (4, 5), generator=torch.Generator().manual_seed(7))
    padded = inputs._replace(
        input_ids=torch.cat([inputs.input_ids, more], 1),
        attention_mask=torch.cat([inputs.attention_mask, torch.zeros_like(more)], 1),
    )
    assert torch.allclose(models[fusion](padded), models[fusion](inputs), atol=1e-5)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_neighbours_change_no_logit(models, fusion):
    inputs = batch()
    one_by_one = [models[fusion](Inputs(*(part[row : row + 1] for part in inputs))) for row in range(4)]
    assert torch.allclose(torch.cat(one_by_one), models[fusion](inputs), atol=1e-5)


@pytest.mark.parametrize("fusion", [fusion for fusion in FUSIONS if fusion != "image"])
def test_members_answer_together_and_learn_apart(fusion):
    model, inputs = built(fusion=fusion, members=3, dropout=0.0), batch()
    assert model(inputs).shape == (4, NUM_LABELS)
    apart = model.train().requires_grad_(True)(inputs)
    assert apart.shape == (3, 4, NUM_LABELS)
    assert (apart[0] - apart[1]).abs().min() > 0
    apart[1].sum().backward()
    learned = {
        name.split(".")[2]
        for name, weight in model.named_parameters()
        if not name.startswith("image") and weight.grad is not None and weight.grad.any()
    }
    assert learned == {"1"}
    if model.image:
        assert any(weight.grad is not None and weight.grad.any() for weight in model.image.parameters())


@pytest.mark.parametrize("fusion", ["text", "cross-attention"])
def test_each_member_is_a_model_of_its_own(fusion):
    model, inputs = built(fusion=fusion, members=2), batch()
    alone = [
        MultimodalModel(model.image, tower, head)
        for tower, head in zip(model.caption.towers, model.head.heads, strict=True)
    ]
    assert torch.allclose(model(inputs), (alone[0](inputs) + alone[1](inputs)) / 2, atol=1e-6)
    if model.image:
        for name, mine in zip(("both", "alone"), model.readings(inputs), strict=True):
            theirs = [dict(zip(("both", "alone"), one.readings(inputs), strict=True))[name] for one in alone]
            assert torch.allclose(mine, (theirs[0] + theirs[1]) / 2, atol=1e-6)


@pytest.mark.parametrize("fusion", ["text", "logits", "cross-attention"])
@pytest.mark.parametrize("members", [1, 2])
def test_ngrams_are_a_member_where_there_is_a_caption_and_learn_by_no_step(fusion, members):
    model, inputs = built(fusion=fusion, members=members, ngrams=True, dropout=0.0), batch()
    with torch.no_grad():
        model.ngrams.weights.normal_()
    without = MultimodalModel(model.image, model.caption, model.head).eval()
    linear, alone = model.ngrams(inputs.input_ids, inputs.attention_mask), without(inputs)
    mean = (members * alone + linear) / (members + 1)
    expected = torch.where(inputs.has_caption[:, None], mean, alone)
    assert torch.allclose(model(inputs), expected, atol=1e-6)
    if model.image:
        by_image, by_caption = model.readings(inputs)[1].unbind(1)
        assert torch.allclose(by_image, without.readings(inputs)[1][:, 0], atol=1e-6)
        assert (by_caption - without.readings(inputs)[1][:, 1]).abs().max() > 0.1
    logits = []
    for learner in (model.train(), without.train()):
        torch.manual_seed(1)  # of dropout
        logits.append(learner(inputs))
    logits[0].sum().backward()
    assert torch.equal(*logits) and model.ngrams.weights.grad is None


def test_the_mean_of_logits_is_that_of_the_modalities_that_are_there(models):
    model, inputs = models["logits"], batch()
    by_image = model.head.image_head(model.image(inputs.pixels).mean(1))
    caption = model.caption(inputs.input_ids, inputs.attention_mask)
    by_caption = model.head.caption_head(masked_mean(caption, inputs.attention_mask))
    expected = torch.stack([*((by_image + by_caption) / 2)[:2], by_caption[2], by_image[3]])
    assert torch.allclose(model(inputs), expected, atol=1e-6)


def test_a_tower_that_the_fusion_does_not_use_is_not_there(models):
    assert models["image"].caption is None and models["text"].image is None
    assert set(models["image"].num_bytes()) == {"image", "head"}
    assert set(models["text"].num_bytes()) == {"caption", "head"}


def test_attention_looks_at_places_of_the_image_and_not_at_their_mean(models):
    """With one pooled key, attention would be a constant: shuffled values would not matter."""
    model, inputs = models["cross-attention"], batch(size_px=96)
    tokens, caption = model.image(inputs.pixels), model.caption(inputs.input_ids, inputs.attention_mask)
    assert tokens.shape[1] == 9
    pooled = tokens.mean(1, keepdim=True).expand_as(tokens)
    there = inputs._replace(has_image=torch.ones(4, dtype=torch.bool))
    assert not torch.allclose(
        model.head(tokens, caption, there), model.head(pooled, caption, there), atol=1e-4
    )


@pytest.mark.parametrize(
    ("vision", "size_px"),
    [("mobilenetv3_small_050", 64), ("test_vit", 64), ("test_convnext", 64), ("test_resnet", 64)],
)
@pytest.mark.parametrize("fusion", ["image", "cross-attention"])
def test_backbones_of_every_kind_give_tokens(vision, size_px, fusion):
    model = built(vision=vision, fusion=fusion, image_size=size_px)
    inputs = batch(size_px=size_px)
    tokens = model.image(inputs.pixels)
    assert tokens.shape[0] == 4 and tokens.shape[1] >= 4 and tokens.shape[2] == model.image.width
    assert model(inputs).shape == (4, NUM_LABELS)


def test_the_largest_default_is_under_100_mb():
    config = ModelConfig(pretrained=False)
    assert (config.vision, config.fusion) == ("efficientnet_b4", "cross-attention")
    with torch.device("meta"):
        sizes = build_model(config, 80, describe_encoder(config, 30_522)).num_bytes()
    assert 80_000_000 < sum(sizes.values()) < 100_000_000
    assert sizes["image"] > 65_000_000 and sizes["caption"] > 16_000_000


def test_a_miniatures_name_says_its_size(models):
    described = describe_encoder(config_of(text="google/bert_uncased_L-4_H-256_A-4"), 99)
    assert (described["num_hidden_layers"], described["hidden_size"], described["vocab_size"]) == (4, 256, 99)


def test_a_folder_with_a_config_is_an_encoder(tmp_path):
    from transformers import DistilBertConfig

    DistilBertConfig(vocab_size=9, dim=32, n_layers=1, n_heads=2, hidden_dim=64).save_pretrained(tmp_path)
    model = built(text=str(tmp_path), fusion="text")
    assert model.caption.width == 32
    assert model(batch()).shape == (4, NUM_LABELS)


def refusal(build):
    with pytest.raises(ConfigError) as caught:
        build()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


@pytest.mark.parametrize("name", ["efficientnot_b4", "", "resnet"])
def test_an_unknown_image_tower_is_refused_by_option_and_with_others(name):
    message = refusal(lambda: built(vision=name))
    assert f"--vision {name!r}" in message and "there are" in message


@pytest.mark.parametrize("name", ["nobody/nothing", "/no/such/folder", ""])
def test_an_unknown_caption_tower_is_refused_by_option(name):
    assert f"--text {name!r}" in refusal(lambda: describe_encoder(config_of(text=name), 9))


@pytest.fixture
def no_hub(monkeypatch):
    """Leave the hub's constants as they were; skip where published weights are in reach."""
    try:
        socket.getaddrinfo("huggingface.co", 443)
    except OSError:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE)
    else:
        pytest.skip("this machine reaches the hub, so that no weights are out of reach")


def test_image_weights_out_of_reach_are_refused_with_what_to_do(no_hub):
    config = config_of(vision="test_byobnet", fusion="image", pretrained=True)
    message = refusal(lambda: build_model(config, NUM_LABELS, {}))
    for part in ("--vision 'test_byobnet'", "model.safetensors", "HF_HOME", "--no-pretrained"):
        assert part in message


def test_caption_weights_out_of_reach_are_refused_with_what_to_do(no_hub):
    config = config_of(text="google/bert_uncased_L-10_H-128_A-2", fusion="text", pretrained=True)
    message = refusal(lambda: describe_encoder(config, NUM_WORDS))
    for part in (f"--text {config.text!r}", "config.json", "HF_HOME", "--no-pretrained"):
        assert part in message
    described = describe_encoder(config_of(), NUM_WORDS)
    assert "model.safetensors" in refusal(lambda: build_model(config, NUM_LABELS, described))
