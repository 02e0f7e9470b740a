"""The auxiliary task: the image tower tells words, by a head of its own that no bundle keeps."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mmray.captions import tokenize, train_tokenizer
from mmray.config import ModelConfig, TrainConfig
from mmray.fusions import Inputs
from mmray.learner import Learner
from mmray.model import build_model
from mmray.towers import describe_encoder
from mmray.words import WithWords, word_loss, word_rates, words_of

PAD, BEGIN, END, MASK = SPECIAL = [0, 1, 2, 3]
NUM_WORDS = 12
SIZE_PX = 32
MODEL = ModelConfig(
    vision="test_efficientnet",
    fusion="image",
    image_size=SIZE_PX,
    width=16,
    num_heads=2,
    dropout=0.0,
    pretrained=False,
)
TRAIN = TrainConfig(epochs=3, warmup_epochs=0, learning_rate=1e-2, word_weight=1.0)


pytestmark = pytest.mark.usefixtures("one_thread")


def built(fusion="image"):
    torch.manual_seed(0)
    config = replace(MODEL, fusion=fusion)
    return build_model(config, 3, describe_encoder(config, NUM_WORDS))


def batch(num_rows=6):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (num_rows, SIZE_PX, SIZE_PX, 3), generator=generator, dtype=torch.uint8)
    ids = torch.tensor([[BEGIN, 4 + row, 5, 5, END, PAD] for row in range(num_rows)])
    there = torch.ones(num_rows, dtype=torch.bool)
    return Inputs(pixels, there, ids, (ids != PAD).long(), there)


def learner(model, train=TRAIN):
    settings = {"num_rows": 6, "positives": np.array([2, 2, 2]), "steps_per_epoch": 20}
    return Learner(model, train, word_rates=np.full(NUM_WORDS, 0.5), **settings)


def test_the_words_of_a_caption_are_those_that_it_has_once_each_and_none_without_an_image():
    inputs = batch(3)._replace(has_image=torch.tensor([True, True, False]))
    words = words_of(inputs, NUM_WORDS, SPECIAL)
    assert [row.nonzero().ravel().tolist() for row in words] == [[4, 5], [5], []]
    assert set(words.unique().tolist()) == {0, 1}


def test_a_word_is_as_frequent_as_the_captions_that_have_it_and_its_head_starts_from_that():
    captions = ["a dog and a dog", "A dog", "", "two cats and two dogs"]
    tokenizer = train_tokenizer(captions * 10)
    inputs = batch(len(captions))
    ids, mask = (torch.from_numpy(array) for array in tokenize(tokenizer, captions, 16))
    words = words_of(
        inputs._replace(input_ids=ids, attention_mask=mask), len(tokenizer), tokenizer.all_special_ids
    )
    rates = word_rates(tokenizer, captions, len(tokenizer), 16)
    assert rates == pytest.approx((words.sum(0).numpy() + 0.5) / (len(captions) + 1))
    assert rates[tokenizer.convert_tokens_to_ids("a")] == 2.5 / 5
    (head,) = (
        part
        for part in WithWords(built(), torch.tensor(rates)).head.modules()
        if isinstance(part, torch.nn.Linear)
    )
    assert head.bias.sigmoid().detach().numpy() == pytest.approx(rates, rel=1e-5)


def test_the_loss_is_a_sum_over_words_and_a_mean_over_the_rows_that_have_some():
    logits, words = torch.tensor([[2.0, -1.0], [3.0, 3.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    expected = np.log1p(np.exp(-2.0)) + np.log1p(np.exp(-1.0))
    assert word_loss(logits, words).item() == pytest.approx(expected)
    assert word_loss(logits, torch.zeros(2, 2)).item() == 0


@pytest.mark.parametrize("fusion", ["image", "logits", "cross-attention"])
def test_with_words_the_labels_logits_are_the_models_own(fusion):
    model, inputs = built(fusion).eval(), batch()
    with torch.inference_mode():
        logits, told = WithWords(model, torch.full((NUM_WORDS,), 0.5)).eval()(inputs)
        assert torch.equal(logits, model(inputs)) and told.shape == (6, NUM_WORDS)


def test_words_teach_the_image_tower_where_no_label_is_known():
    model = built()
    learning, inputs = learner(model), batch()
    words, unknown = words_of(inputs, NUM_WORDS, SPECIAL), torch.zeros(6, 3, dtype=torch.bool)

    def told():
        with torch.inference_mode():
            return word_loss(learning.with_words.eval()(inputs)[1], words).item()

    before, tower = told(), [parameter.clone() for parameter in model.image.parameters()]
    for _ in range(20):
        learning.step(inputs, torch.zeros(6, 3), unknown, words)
    assert told() < before / 2
    assert not all(map(torch.equal, tower, model.image.parameters()))


def test_a_checkpoint_holds_the_head_that_tells_words_beside_a_model_without_it(tmp_path):
    inputs = batch()
    words, known = words_of(inputs, NUM_WORDS, SPECIAL), torch.ones(6, 3, dtype=torch.bool)
    first = learner(built())
    first.step(inputs, torch.zeros(6, 3), known, words)
    first.save(tmp_path, {})
    second = learner(built())
    second.load(tmp_path)
    losses = [
        (one.step(inputs, torch.zeros(6, 3), known, words).item(), one.with_words.head.state_dict())
        for one in (first, second)
    ]
    assert losses[0][0] == losses[1][0]
    for name, weight in losses[0][1].items():
        assert torch.equal(weight, losses[1][1][name])
    assert first.averaged.state_dict().keys() == built().state_dict().keys()


@pytest.mark.parametrize(("fusion", "weight"), [("text", 1.0), ("image", 0.0)])
def test_without_an_image_tower_or_a_weight_nothing_is_told(fusion, weight):
    assert learner(built(fusion), replace(TRAIN, word_weight=weight)).with_words is None
