"""A bundle as ONNX gives the scores and decisions that it gives itself, for any number of rows and tokens."""

import json

import numpy as np
import pytest

from mmray.bundle import Bundle
from mmray.captions import tokenize
from mmray.decoding import decode_row
from mmray.labeler import Labeler, make_inputs
from mmray.onnx_export import inputs_of, to_onnx

onnxruntime = pytest.importorskip("onnxruntime")


def run(data, bundle, images, captions):
    """Give what the file makes of rows."""
    labeler, size_px = Labeler(bundle), bundle.model_config.image_size
    fusion = bundle.model_config.fusion
    rows = [decode_row(*row, fusion, size_px) for row in zip(images, captions, strict=True)]
    inputs = make_inputs(
        [row.pixels for row in rows],
        *tokenize(labeler.tokenizer, [row.caption for row in rows], bundle.model_config.max_tokens),
        has_caption=[row.caption is not None for row in rows],
        size_px=size_px,
    )
    session = onnxruntime.InferenceSession(data)
    assert [each.name for each in session.get_inputs()] == list(inputs_of(bundle))
    return session.run(None, {name: getattr(inputs, name).numpy() for name in inputs_of(bundle)})


@pytest.fixture(scope="module")
def rows(draw_rows):
    table = draw_rows(23, 5)
    images, captions = table["image"].to_pylist(), table["caption"].to_pylist()
    images[1], captions[2], captions[3] = None, None, "word " * 40
    return images, captions


def test_scores_decisions_and_metadata_are_the_bundles_own(bundle_uri, rows):
    bundle = Bundle.load(bundle_uri)
    data = to_onnx(bundle, decide=True)
    expected = Labeler(bundle)(*rows)
    scores, decided = run(data, bundle, *rows)
    assert np.abs(scores - expected.scores).max() <= 1e-4
    assert (decided == expected.decided).all()
    assert expected.fell_back.any() and not expected.fell_back.all()
    (one,), _ = run(data, bundle, rows[0][:1], ["beach"])
    assert np.abs(one - Labeler(bundle)(rows[0][:1], ["beach"]).scores[0]).max() <= 1e-4
    known = onnxruntime.InferenceSession(data).get_modelmeta().custom_metadata_map
    assert json.loads(known["labels"]) == list(bundle.vocabulary.labels)
    assert known["fingerprint"] == bundle.fingerprint
    assert (known["image_size"], known["max_tokens"]) == ("32", "16")


def test_members_answer_together(make_bundle, rows, tmp_path):
    bundle = Bundle.load(make_bundle(tmp_path / "bundle", members=2, ngrams=True))
    (scores,) = run(to_onnx(bundle), bundle, *rows)
    assert np.abs(scores - Labeler(bundle)(*rows).scores).max() <= 1e-4


@pytest.mark.parametrize("ngrams", [False, True])
def test_a_model_of_one_modality_takes_its_inputs_alone(make_bundle, rows, tmp_path, ngrams):
    bundle = Bundle.load(make_bundle(tmp_path / "bundle", fusion="text", ngrams=ngrams))
    images, captions = ([value for row, value in enumerate(part) if row not in (1, 2)] for part in rows)
    (scores,) = run(to_onnx(bundle), bundle, images, captions)
    assert np.abs(scores - Labeler(bundle)(images, captions).scores).max() <= 1e-4
