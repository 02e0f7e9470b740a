"""A bundle: the folder that holds all that labeling needs, and needs no network.

config.json         schema version, model config, caption tower's config, sums of weights and tokenizer
model.safetensors   weights, float32
labels.json         the vocabulary, in class order
thresholds.json     the decision: calibration of the scores, and thresholds
tokenizer/          as transformers saves it
metrics.json        what validation measured
README.md           the model card
"""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmray.config import ModelConfig
from mmray.decisions import Calibration
from mmray.errors import BundleError, ConfigError, DataError, one_line
from mmray.fingerprints import fingerprint
from mmray.options import from_json
from mmray.schema import Vocabulary
from mmray.storage import Folder

if TYPE_CHECKING:
    from torch import Tensor

    from mmray.model import MultimodalModel

SCHEMA_VERSION = 2
TOKENIZER_FILES = (".json", ".txt", ".model", ".jinja")


@dataclass(frozen=True, eq=False)
class Bundle:
    """What is known of a bundle before its weights are read."""

    model_config: ModelConfig
    text_config: dict[str, Any]
    vocabulary: Vocabulary
    thresholds: np.ndarray
    """float64 (L,), of calibrated scores."""
    calibration: Calibration
    tokenizer_files: dict[str, bytes] = field(repr=False)
    weights_sha256: str
    folder: Folder

    @property
    def fingerprint(self) -> str:
        """Sum up all that a prediction depends on."""
        return fingerprint(
            {
                "model": self.model_config.record(),
                "text": self.text_config,
                "labels": list(self.vocabulary.labels),
                **_decision(self.thresholds, self.calibration),
                "tokenizer": _sums(self.tokenizer_files),
                "weights": self.weights_sha256,
            }
        )

    @classmethod
    def load(cls, uri: str) -> Bundle:
        """Read a bundle's small files.

        Raises:
            BundleError: it is incomplete, damaged, or of another schema version.
        """
        folder = Folder(uri)
        try:
            config = _checked(folder, "config.json", {"schema_version", "model", "text_config", "sums"})
            if config["schema_version"] != SCHEMA_VERSION:
                raise BundleError(
                    f"{uri}: schema version {config['schema_version']}, this mmray reads {SCHEMA_VERSION}"
                )
            labels = _checked(folder, "labels.json", {"labels"})["labels"]
            decision = _checked(folder, "thresholds.json", {"thresholds", "scales", "offsets"})
            thresholds, scales, offsets = (
                np.array(decision[name], float) for name in ("thresholds", "scales", "offsets")
            )
            names = [name for name in config["sums"] if name.startswith("tokenizer/")]
            if any(name.count("/") > 1 for name in names):  # would be written somewhere else
                raise BundleError(f"{uri}/config.json names {names}: a tokenizer's files stand in one folder")
            if code := [name for name in names if not name.endswith(TOKENIZER_FILES)]:
                raise BundleError(f"{uri}/config.json names {code}: a tokenizer is JSON and text")
            files = {name.removeprefix("tokenizer/"): folder.read(name) for name in names}
            vocabulary = Vocabulary(tuple(labels))
            model_config = from_json(ModelConfig, config["model"], f"{uri}/config.json")
            if (
                model_config.pretrained or ":" in model_config.vision
            ):  # would be fetched, or read from elsewhere
                raise BundleError(f"{uri}/config.json names a model that is not in the bundle")
            weights = config["sums"]["model.safetensors"]
        except (FileNotFoundError, KeyError, TypeError, ValueError, DataError, ConfigError) as error:
            raise BundleError(f"{uri} is no complete bundle: {error}; train.py makes one") from None
        for name, data in files.items():
            if hashlib.sha256(data).hexdigest() != config["sums"][f"tokenizer/{name}"]:
                raise BundleError(f"{uri}/tokenizer/{name} is damaged: its sum is not the one in config.json")
        for name, numbers in {"thresholds": thresholds, "scales": scales, "offsets": offsets}.items():
            if numbers.shape != (len(vocabulary),):
                raise BundleError(f"{uri}: {numbers.size} {name} for {len(vocabulary)} labels")
        calibration = Calibration(scales, offsets)
        return cls(
            *(model_config, config["text_config"], vocabulary, thresholds, calibration),
            *(files, weights, folder),
        )

    def model(self) -> MultimodalModel:
        """Build the model with its weights, on the CPU, ready to label.

        Raises:
            BundleError: the weights are damaged or belong to another model.
        """
        import safetensors.torch

        from mmray.model import build_model

        data = self.weights()
        model = build_model(self.model_config, len(self.vocabulary), self.text_config)
        try:
            model.load_state_dict(safetensors.torch.load(data))
        except RuntimeError as error:
            raise BundleError(f"{self.folder}: weights of another model: {one_line(error)}") from None
        return model.eval()

    def weights(self) -> bytes:
        """Read the weights, a safetensors file.

        Raises:
            BundleError: they are missing or damaged.
        """
        try:
            data = self.folder.read("model.safetensors")
        except FileNotFoundError:
            raise BundleError(
                f"{self.folder} is no complete bundle: model.safetensors is missing; train.py makes one"
            ) from None
        if hashlib.sha256(data).hexdigest() != self.weights_sha256:
            raise BundleError(
                f"{self.folder}/model.safetensors is damaged: its sum is not the one in config.json"
            )
        return data

    def tokenizer(self) -> Any:
        """Load the tokenizer."""
        return tokenizer_of(self.tokenizer_files)


def save_bundle(
    folder: Folder,
    *,
    model_config: ModelConfig,
    text_config: dict[str, Any],
    vocabulary: Vocabulary,
    thresholds: np.ndarray,
    calibration: Calibration,
    tokenizer_files: dict[str, bytes],
    weights: dict[str, Tensor],
    metrics: dict[str, Any],
    card: str,
) -> Bundle:
    """Write a bundle; `config.json` comes last, so that what has one is complete."""
    import safetensors.torch

    data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in weights.items()})
    folder.publish("model.safetensors", data)
    for name, content in tokenizer_files.items():
        folder.publish(f"tokenizer/{name}", content)
    folder.publish_json("labels.json", {"labels": list(vocabulary.labels)})
    folder.publish_json("thresholds.json", _decision(thresholds, calibration))
    folder.publish_json("metrics.json", metrics)
    folder.publish("README.md", card.encode())
    sums = {f"tokenizer/{name}": total for name, total in _sums(tokenizer_files).items()}
    record = {
        "schema_version": SCHEMA_VERSION,
        "model": asdict(model_config)
        | {"pretrained": False},  # the weights are here: nothing is fetched again
        "text_config": text_config,
        "sums": sums | {"model.safetensors": hashlib.sha256(data).hexdigest()},
    }
    folder.publish_json("config.json", record)
    return Bundle.load(folder.uri)


def tokenizer_of(files: dict[str, bytes]) -> Any:
    """Load a tokenizer from what `tokenizer_files` gave."""
    from mmray.captions import load_tokenizer

    with tempfile.TemporaryDirectory() as scratch:
        for name, data in files.items():
            (Path(scratch) / name).write_bytes(data)
        return load_tokenizer(scratch)


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """Give the files that hold a tokenizer: name -> bytes."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        return {path.name: path.read_bytes() for path in sorted(Path(scratch).iterdir())}


def _decision(thresholds: np.ndarray, calibration: Calibration) -> dict[str, list[float]]:
    numbers = {"thresholds": thresholds, "scales": calibration.scales, "offsets": calibration.offsets}
    return {name: array.tolist() for name, array in numbers.items()}


def _sums(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def _checked(folder: Folder, name: str, keys: set[str]) -> dict[str, Any]:
    record = folder.read_json(name)
    if record is None:
        raise BundleError(f"{folder} is no complete bundle: {name} is missing; train.py makes one")
    if not isinstance(record, dict) or set(record) != keys:
        found = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise BundleError(f"{folder}/{name} holds {found} instead of {sorted(keys)}; another mmray wrote it")
    return record
