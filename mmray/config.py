"""Settings: one frozen dataclass per concern, checked where it is made.

Each field names its type, default and help once; `mmray.cli` makes the command line of them, and a recipe
(YAML) sets them by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import pyarrow as pa

from mmray.columns import require_columns, require_kinds
from mmray.errors import ConfigError
from mmray.options import option, require_choice, require_range
from mmray.schema import KeptScores
from mmray.uris import Prefixes

SELECTIONS = ("class-aware", "confidence")
TARGETS = ("soft", "hard")
AXES = (
    *("fusion", "loss", "decision", "calibration", "ema"),
    *("modality-dropout", "self-training", "backbone"),
)
FUSIONS = ("image", "text", "logits", "concat", "cross-attention")
TOWERS = ("image", "caption")
ONLY_TOWER = {"image": "image", "text": "caption"}
"""Fusions of one tower alone, and which it is."""
LOSSES = ("bce", "weighted-bce", "focal", "asymmetric")
MAX_EPOCHS = 10_000


@dataclass(frozen=True)
class Columns:
    """Names of the input's columns."""

    image: str = option("image", "Column of encoded images.", flag="--image-column")
    caption: str = option("caption", "Column of captions.", flag="--caption-column")
    labels: str = option("labels", "Column of label lists.", flag="--label-column")
    id: str = option("image_id", "Column of row ids.", flag="--id-column")
    image_prefixes: tuple[str, ...] = option(
        (),
        "Fetch images named by URI from below here (s3://…, https://…); repeatable.",
        flag="--image-prefix",
    )

    def __post_init__(self) -> None:
        """Refuse prefixes that nothing could be fetched from."""
        Prefixes.parse(self.image_prefixes)

    def require(self, schema: pa.Schema, where: str, needs: Sequence[str] = ("image", "caption")) -> None:
        """Check that a file has the columns that are needed, and that images and captions are such.

        Args:
            schema: of the file.
            where: the file, for the message.
            needs: fields of this class.

        Raises:
            DataError: a column is missing, or of another type.
        """
        flags = {field.name: field.metadata["flag"] for field in fields(self)}
        require_columns(schema, {flags[name]: getattr(self, name) for name in needs}, where)
        if "image" in needs:
            require_kinds(schema, self.image, self.caption, where, fetchable=bool(self.image_prefixes))


@dataclass(frozen=True)
class Workers:
    """How many workers: a fixed number, or between two."""

    minimum: int
    maximum: int

    @classmethod
    def parse(cls, text: str | int) -> Workers:
        """Read `N` or `MIN:MAX`.

        Raises:
            ConfigError: neither, or not 1 <= MIN <= MAX.
        """
        low, colon, high = str(text).partition(":")
        high = high if colon else low
        if low.isdecimal() and high.isdecimal():
            workers = cls(int(low), int(high))
            if 1 <= workers.minimum <= workers.maximum:
                return workers
        raise ConfigError(f"--num-workers {text!r} is neither N nor MIN:MAX with 1 <= MIN <= MAX")


@dataclass(frozen=True)
class ModelConfig:
    """What the model is made of."""

    vision: str = option("efficientnet_b4", "Image tower: any timm model.")
    text: str = option(
        "google/bert_uncased_L-2_H-128_A-2", "Caption tower: any transformers encoder, hub name or folder."
    )
    fusion: str = option("cross-attention", "How the towers meet.", choices=FUSIONS)
    image_size: int = option(380, "Side of the square that images are resized to, in pixels.")
    max_tokens: int = option(64, "Captions are cut to this many tokens.")
    width: int = option(256, "Width of the fusion.")
    num_heads: int = option(4, "Attention heads of the fusion.")
    dropout: float = option(0.1, "Dropout in the fusion.")
    members: int = option(1, "Caption towers that learn apart; logits are averaged.")
    ngrams: bool = option(
        False,
        "A linear model of captions' tokens and pairs as a further member.",
        flag="--ngrams/--no-ngrams",
    )
    pretrained: bool = option(
        True,
        "Start from published weights; without, nothing touches the network.",
        flag="--pretrained/--no-pretrained",
    )

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        require_choice("--fusion", self.fusion, FUSIONS)
        require_range("--image-size", self.image_size, 16, 4096)
        require_range("--max-tokens", self.max_tokens, 4, 512)
        require_range("--width", self.width, 1, 65_536)
        require_range("--dropout", self.dropout, 0, 0.95)
        if self.num_heads < 1 or self.width % self.num_heads:
            raise ConfigError(f"--width {self.width} cannot be shared by --num-heads {self.num_heads}")
        require_range("--members", self.members, 1, 100)
        if self.members > 1 and "caption" not in self.towers:
            raise ConfigError("--members counts caption towers, and --fusion image has none")
        if self.ngrams and "caption" not in self.towers:
            raise ConfigError("--ngrams reads captions, and --fusion image reads none; use --no-ngrams")

    @property
    def towers(self) -> tuple[str, ...]:
        """The TOWERS that the model has."""
        return towers_of(self.fusion)

    def record(self) -> dict[str, Any]:
        """Give it as JSON, without options that came later and are off: its sum is as before they came."""
        off = {"members": 1, "ngrams": False}.items()
        return {name: value for name, value in asdict(self).items() if (name, value) not in off}


def towers_of(fusion: str) -> tuple[str, ...]:
    """Give those of the TOWERS that a fusion joins."""
    return (ONLY_TOWER[fusion],) if fusion in ONLY_TOWER else TOWERS


@dataclass(frozen=True)
class TrainConfig:
    """How the model learns."""

    epochs: int = option(10, "Passes over the training rows.")
    batch_size_per_worker: int = option(32, "Rows in one step of one worker.")
    learning_rate: float = option(1e-3, "Peak rate at a global batch of 64; grows with its root.")
    weight_decay: float = option(0.05, "Decay of weights; norms and biases are spared.")
    warmup_epochs: float = option(1.0, "Epochs of linear warm-up, before the cosine.")
    clip_norm: float = option(1.0, "Largest norm of the gradient.")
    ema_decay: float = option(0.999, "EMA decay of weights, <= 1-n^(-2/3) at step n; 0 is off.")
    patience: int = option(5, "Stop after this many epochs without a better sample F1.")
    loss: str = option("weighted-bce", "Training loss.", choices=LOSSES)
    crop: float = option(0.5, "Least share of the area that a crop keeps; 1 is off.")
    colour: float = option(0.2, "Largest change of a picture's colours; 0 is off.")
    rand_augment: float = option(0.0, "Magnitude of RandAugment, 0 to 10; 0 is off.")
    word_dropout: float = option(0.1, "Share of the captions' tokens that are masked.")
    modality_dropout: float = option(0.1, "Share of rows that lose their image; as many, a caption.")
    word_weight: float = option(0.0, "Weight of telling caption words from images; 0 is off.")
    init: tuple[str, ...] = option(
        (), "Bundle or recipe of an earlier stage to take towers from; repeatable."
    )
    freeze: tuple[str, ...] = option(
        (), f"Tower that stays as --init gives it, {' or '.join(TOWERS)}; repeatable."
    )
    seed: int = option(0, "Seed of shuffling, augmentation and initial weights.")

    def __post_init__(self) -> None:
        """Refuse what cannot train."""
        require_choice("--loss", self.loss, LOSSES)
        for tower in self.freeze:
            require_choice("--freeze", tower, TOWERS)
        if self.word_weight and "image" in self.freeze:
            raise ConfigError("--word-weight teaches the image tower, which --freeze image keeps as it is")
        require_range("--epochs", self.epochs, 1, MAX_EPOCHS)
        require_range("--batch-size-per-worker", self.batch_size_per_worker, 1, 65_536)
        require_range("--learning-rate", self.learning_rate, 1e-8, 10)
        require_range("--weight-decay", self.weight_decay, 0, 10)
        require_range("--warmup-epochs", self.warmup_epochs, 0, MAX_EPOCHS)
        require_range("--seed", self.seed, 0, 2**32 - 1)
        require_range("--ema-decay", self.ema_decay, 0, 0.999_999)
        require_range("--patience", self.patience, 1, MAX_EPOCHS)
        require_range("--crop", self.crop, 0.05, 1)
        require_range("--colour", self.colour, 0, 1)
        require_range("--rand-augment", self.rand_augment, 0, 10)
        require_range("--word-dropout", self.word_dropout, 0, 0.9)
        require_range("--modality-dropout", self.modality_dropout, 0, 0.5)
        require_range("--word-weight", self.word_weight, 0, 100)
        require_range("--clip-norm", self.clip_norm, 1e-6, 1e6)


@dataclass(frozen=True)
class SelfTrainConfig:
    """How a student learns from what its teacher says of unlabeled rows."""

    rounds: int = option(1, "Students in a row, each the next one's teacher.")
    select: str = option(
        "class-aware",
        "Match labels' frequencies, or take sure scores.",
        choices=SELECTIONS,
    )
    keep: float = option(0.8, "Share of the expected rows that class-aware takes.")
    confidence: float = option(0.9, "Scores from here on are true, up to 1 - this false.")
    targets: str = option("soft", "What the student learns: the scores, or 0 and 1.", choices=TARGETS)

    def __post_init__(self) -> None:
        """Refuse what cannot select."""
        require_choice("--select", self.select, SELECTIONS)
        require_choice("--targets", self.targets, TARGETS)
        require_range("--rounds", self.rounds, 1, 100)
        require_range("--keep", self.keep, 0, 1)
        require_range("--confidence", self.confidence, 0.5, 1)


@dataclass(frozen=True)
class AblationConfig:
    """Which parts of a recipe are varied, and how often each variant is trained."""

    axes: tuple[str, ...] = option(
        AXES[:-2],
        f"Varied, of {', '.join(AXES)}, repeatable [default: all but the last two].",
        flag="--axis",
    )
    seeds: int = option(3, "Trainings of each variant, with this many seeds in a row.")
    backbones: tuple[str, ...] = option(
        ("efficientnet_b4", "mobilenetv3_small_100", "ghostnet_050"),
        "Image tower of the axis backbone; repeatable.",
        flag="--backbone",
    )
    side_by_side: int = option(1, "Trainings at a time.")

    def __post_init__(self) -> None:
        """Refuse what cannot be compared."""
        for axis in self.axes:
            require_choice("--axis", axis, AXES)
        require_range("--seeds", self.seeds, 1, 1000)
        require_range("--side-by-side", self.side_by_side, 1, 10_000)


@dataclass(frozen=True)
class ComputeConfig:
    """Where the work runs. Labels do not depend on it; training does, on the number of workers."""

    num_workers: str | None = option(
        None, "N or MIN:MAX [default: one per GPU; on CPUs one per node, to train 1]."
    )
    use_gpu: bool | None = option(
        None, "Use GPUs [default: if the cluster has one].", flag="--use-gpu/--no-gpu"
    )

    def __post_init__(self) -> None:
        """Refuse a number of workers that cannot be."""
        if self.num_workers is not None:
            Workers.parse(self.num_workers)


@dataclass(frozen=True)
class ScoringConfig:
    """How the model computes."""

    batch_size: int = option(64, "Rows that the model takes at once.")
    precision: str | None = option(
        None, "Arithmetic of the model [default: bf16 on GPU, else fp32].", choices=("fp32", "bf16")
    )
    flip: bool = option(False, "Average over each image and its mirror image.", flag="--flip")
    decode: str | None = option(
        None,
        "Where images are decoded [default: in a pool from 8 CPUs for each GPU on, else beside the model]; "
        "gpu decodes plain JPEGs, to somewhat other pixels.",
        choices=("beside", "pool", "gpu"),
    )
    compiled: bool = option(
        False, "Compile the image tower: pays on GPUs, for many images.", flag="--compile"
    )
    actors_per_gpu: int = option(2, "Actors with a model each that share a GPU.")

    def __post_init__(self) -> None:
        """Refuse what cannot compute."""
        require_range("--batch-size", self.batch_size, 1, 65_536)
        require_range("--actors-per-gpu", self.actors_per_gpu, 1, 100)


@dataclass(frozen=True)
class LabelConfig(ScoringConfig):
    """What a labeling job writes, and when it gives up."""

    max_failed_fraction: float = option(0.01, "Stop when more of the planned rows than this have failed.")
    scores: str = option("all", "Scores to keep: all, top-K or none.")
    limit: int | None = option(None, "Label only the first N rows.")
    skip_unreadable_files: bool = option(
        False, "Leave out input files without a readable footer.", flag="--skip-unreadable-files"
    )

    def __post_init__(self) -> None:
        """Refuse what cannot label."""
        super().__post_init__()
        KeptScores.parse(self.scores)
        require_range("--max-failed-fraction", self.max_failed_fraction, 0, 1)
        if self.limit is not None:
            require_range("--limit", self.limit, 1, 10**15)
