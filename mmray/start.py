"""What training starts from: made once and published, so that a run that goes on agrees with how it began.

OUTPUT/_train/recipe.json   what is trained on what: another recipe is refused
OUTPUT/_train/start.json    vocabulary, label counts, caption tower
OUTPUT/_train/tokenizer/
OUTPUT/_train/ngrams.safetensors  the linear model of n-grams, where the recipe has one
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import ray
import safetensors.torch
import torch

from mmray.bundle import Bundle, tokenizer_files, tokenizer_of
from mmray.captions import load_tokenizer, tokenize, train_tokenizer
from mmray.config import ModelConfig, TrainConfig
from mmray.datasets import Rows, count_labels, sample_captions, sample_labeled
from mmray.errors import DataError, OutputError
from mmray.fingerprints import differences, fingerprint
from mmray.losses import class_weights
from mmray.model import MultimodalModel, build_model
from mmray.ngrams import fit_ngrams
from mmray.schema import Vocabulary
from mmray.storage import Folder
from mmray.towers import describe_encoder
from mmray.warm_start import take_over, without_other_labels
from mmray.words import word_rates

CAPTIONS_FOR_TOKENIZER = 1_000_000
CAPTIONS_FOR_WORDS = 100_000
TOKENS_FOR_NGRAMS = 4_000_000
RUN = "_train"
RECIPE, START = f"{RUN}/recipe.json", f"{RUN}/start.json"
NGRAMS = f"{RUN}/ngrams.safetensors"


@dataclass(frozen=True)
class Start:
    """What training starts from, beside the recipe."""

    vocabulary: Vocabulary
    num_labeled: int
    """Training rows whose labels were counted."""
    positives: np.ndarray
    """int64 (L,), those that bear each label."""
    text_config: dict[str, Any]
    tokenizer_files: dict[str, bytes]
    donors: dict[str, Bundle]
    """Parts of the model that earlier bundles give."""
    word_rates: np.ndarray | None = None
    """float64 (V,), share of captions that contain each word; None where the recipe does not ask for it."""
    ngrams: bytes | None = None
    """What `fit_ngrams` gave; None where the recipe does not ask for it."""

    def build(self, config: ModelConfig) -> MultimodalModel:
        """Build the model, with what donors give.

        Raises:
            ConfigError: a tower is unknown or out of reach, or a donor's does not fit.
            BundleError: a donor's weights are missing or damaged.
        """
        model = build_model(config, len(self.vocabulary), self.text_config, self.donors)
        model.expect(torch.tensor(self.positives / self.num_labeled, dtype=torch.float32))
        take_over(model, self.donors)
        if self.ngrams is not None:
            model.get_submodule("ngrams").load_state_dict(safetensors.torch.load(self.ngrams))
        return model


def recipe_of(
    parts: list[Rows], val: Rows, model: ModelConfig, train: TrainConfig, donors: Mapping[str, Bundle] | None
) -> dict[str, Any]:
    """Give all that the trained model depends on; without donors where they are not known yet."""
    init = None if donors is None else {part: bundle.fingerprint for part, bundle in donors.items()}
    # JSON has no tuples. Ids are not learned from.
    columns = asdict(val.columns) | {"image_prefixes": [*val.columns.image_prefixes]}
    del columns["id"]
    return {
        **{name: fingerprint(part.identity()) for name, part in zip(("data", "pseudo"), parts, strict=False)},
        "val": fingerprint(val.identity()),
        "columns": columns,
        "model": asdict(model),
        "train": asdict(train) | {"init": init, "freeze": [*train.freeze]},
    }


def is_finished(output: Folder, recipe: dict[str, Any]) -> bool:
    """Tell whether an output holds the recipe's bundle already.

    Raises:
        OutputError: another recipe has the output; says what differs.
    """
    known = output.read_json(RECIPE)
    finished = output.read_json("config.json") is not None
    if known is None:
        if finished:
            raise OutputError(f"{output} holds a bundle of unknown origin; choose another --output")
        return False
    for part, kind in (("model", ModelConfig), ("train", TrainConfig)):  # options that came later were off
        known[part] = json.loads(json.dumps(asdict(kind()))) | known[part]
    known["columns"].pop("id", None)  # recorded by an earlier mmray
    if recipe["train"]["init"] is None:
        known["train"]["init"] = None
    if found := differences(known, recipe):
        raise OutputError(f"{output} was trained otherwise ({'; '.join(found)}); choose another --output")
    return finished


def prepare_start(
    output: Folder,
    parts: list[Rows],
    val: Rows,
    model: ModelConfig,
    train: TrainConfig,
    donors: dict[str, Bundle],
) -> Start:
    """Find what training starts from, or make and publish it.

    Args:
        output: of the training.
        parts: rows to train on; those with labels come first.
        val: rows to validate on.
        model: what is to be trained.
        train: how it is to learn.
        donors: bundles that give parts of it.

    Raises:
        ConfigError: the caption's encoder or its tokenizer is unknown or out of reach.
        DataError: no labels, no caption for n-grams, or validation labels that training never shows.
    """
    # Without the recipe it is what another one left that was refused before it had taken the output.
    if output.read_json(RECIPE) is not None:
        return _published(output, donors)
    start = _made(parts, val, model, train, donors)
    rates = start.word_rates
    for name, data in start.tokenizer_files.items():
        output.publish(f"{RUN}/tokenizer/{name}", data)
    if start.ngrams is not None:
        output.publish(NGRAMS, start.ngrams)
    record = {
        "labels": list(start.vocabulary.labels),
        "num_labeled": start.num_labeled,
        "positives": start.positives.tolist(),
        "text_config": start.text_config,
        "tokenizer": sorted(start.tokenizer_files),
        "word_rates": None if rates is None else rates.tolist(),
        "ngrams": start.ngrams is not None,
    }
    output.publish_json(START, record)
    return start


def _published(output: Folder, donors: dict[str, Bundle]) -> Start:
    record = output.read_json(START)
    vocabulary, rates = Vocabulary(tuple(record["labels"])), record["word_rates"]
    return Start(
        vocabulary,
        num_labeled=record["num_labeled"],
        positives=np.array(record["positives"], np.int64),
        text_config=record["text_config"],
        tokenizer_files={name: output.read(f"{RUN}/tokenizer/{name}") for name in record["tokenizer"]},
        donors=without_other_labels(donors, vocabulary),
        word_rates=None if rates is None else np.array(rates),
        ngrams=output.read(NGRAMS) if record.get("ngrams") else None,  # left out by an earlier mmray
    )


def _made(
    parts: list[Rows], val: Rows, model: ModelConfig, train: TrainConfig, donors: dict[str, Bundle]
) -> Start:
    vocabulary, positives = count_labels(parts[0])
    unknown = sorted(set(count_labels(val)[0].labels) - set(vocabulary.labels), key=str)
    if unknown:
        raise DataError(f"{val.folder}: labels {unknown[:5]} occur in validation and never in training")
    if donor := donors.get("caption"):
        text_config, files = donor.text_config, donor.tokenizer_files
    elif model.pretrained:
        text_config = describe_encoder(model)  # first, since it knows best what is out of reach
        files = tokenizer_files(load_tokenizer(model.text))
    else:
        tokenizer = train_tokenizer(sample_captions(parts, CAPTIONS_FOR_TOKENIZER))
        text_config, files = describe_encoder(model, len(tokenizer)), tokenizer_files(tokenizer)
    rates = None
    if train.word_weight and "image" in model.towers:
        captions = sample_captions(parts, CAPTIONS_FOR_WORDS)
        rates = word_rates(tokenizer_of(files), captions, text_config["vocab_size"], model.max_tokens)
    taken = without_other_labels(donors, vocabulary)
    start = Start(vocabulary, parts[0].num_rows, positives, text_config, files, taken, rates)
    return replace(start, ngrams=_ngrams(parts[0], start, model, train)) if model.ngrams else start


def _ngrams(rows: Rows, start: Start, model: ModelConfig, train: TrainConfig) -> bytes:
    captions, targets = sample_labeled(rows, start.vocabulary, TOKENS_FOR_NGRAMS // model.max_tokens)
    if not captions:
        raise DataError(f"{rows.folder}: no row has a caption for n-grams; use --no-ngrams")
    positives = torch.from_numpy(start.positives)
    weights = class_weights(start.num_labeled, positives) if train.loss == "weighted-bce" else None

    @ray.remote(num_cpus=0.5)  # where workers will be, since a head computes nothing
    def fit(captions: list[str], targets: np.ndarray) -> bytes:
        ids, mask = tokenize(tokenizer_of(start.tokenizer_files), captions, model.max_tokens)
        return fit_ngrams(
            torch.from_numpy(ids),
            torch.from_numpy(mask),
            torch.from_numpy(targets),
            num_tokens=start.text_config["vocab_size"],
            rates=positives / start.num_labeled,
            pos_weight=weights,
        )

    fitted: bytes = ray.get(fit.remote(captions, targets))
    return fitted
