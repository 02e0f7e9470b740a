"""Fixtures that several folders of tests use: one Ray cluster for the session, drawn data, the real data."""

import logging
import os
import socket
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmray.joining import RAY_ENVIRONMENT, WORKER_ENVIRONMENT

REPOSITORY = Path(__file__).parents[1]
os.environ |= RAY_ENVIRONMENT | WORKER_ENVIRONMENT
os.environ["RAY_BACKEND_LOG_LEVEL"] = "fatal"
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"

# Ray's workers take the environment of the moment in which the cluster starts, so where S3 will be is settled
# here; tests/s3 serves on this socket. Until then nobody listens, and no test can reach a real store.
S3_SOCKET = socket.socket()
S3_SOCKET.bind(("127.0.0.1", 0))
for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_REGION"):
    os.environ.pop(name, None)
os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{S3_SOCKET.getsockname()[1]}"
os.environ["AWS_ACCESS_KEY_ID"] = "key-of-the-tests"
os.environ["AWS_SECRET_ACCESS_KEY"] = "secret-of-the-tests"
os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"

LABELS = ("beach", "circle", "city", "forest", "square", "triangle")

# What may be wrong with a row: the image or the caption that it gets instead, and the status that follows.
DAMAGES: dict[str, tuple[dict[str, Any], str]] = {
    "null caption": ({"caption": None}, "no_caption"),
    "blank caption": ({"caption": " \t"}, "no_caption"),
    "null image": ({"image": None}, "no_image"),
    "bad image": ({"image": b"\xff\xd8\xff no JPEG"}, "bad_image"),
    "empty image": ({"image": b""}, "bad_image"),
    "bad image, null caption": ({"image": b"nothing", "caption": None}, "failed"),
    "null image, blank caption": ({"image": None, "caption": ""}, "failed"),
}


class Archive(NamedTuple):
    """A dataset that holds everything that may occur, and what is wrong with which of its rows."""

    folder: Path
    statuses: dict[str, dict[int, str]]
    """For each file, the statuses of rows that are not ok."""

    @property
    def num_rows(self) -> int:
        """Rows of all files that are data."""
        return sum(pq.read_metadata(self.folder / path).num_rows for path in self.statuses)


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """One local Ray cluster for all tests that need one; four logical CPUs, whatever the machine has."""
    import ray
    import ray.data

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    for name in ("ray.data", "ray.train"):
        # pytest keeps log records until a test ends: a failed run's would hold its actors, and they the CPUs.
        logging.getLogger(name).setLevel(logging.CRITICAL)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def coco18() -> Path:
    """Give the folder of the real data, or skip the test where it is not."""
    folder = REPOSITORY.parent / "shared" / "data" / "coco18"
    if not folder.is_dir():
        pytest.skip(f"the real data is not at {folder}")
    return folder


@pytest.fixture(scope="session")
def s3_socket() -> socket.socket:
    """The socket that the environment names as the S3 endpoint."""
    return S3_SOCKET


@pytest.fixture(scope="session")
def make_bundle(draw_rows: Callable[..., pa.Table]) -> Callable[..., str]:
    """Give `make(folder, labels=…, **settings) -> its path`: a tiny bundle that was never trained.

    Its thresholds are such that each label is decided for some rows, and none for some others.
    """

    def make(folder: Path, labels: tuple[Any, ...] = LABELS, **settings: Any) -> str:
        import torch

        from mmray.bundle import save_bundle, tokenizer_files
        from mmray.captions import train_tokenizer
        from mmray.config import ModelConfig
        from mmray.decisions import Calibration
        from mmray.labeler import Labeler
        from mmray.model import build_model
        from mmray.schema import Vocabulary
        from mmray.storage import Folder
        from mmray.towers import describe_encoder

        config = ModelConfig(
            vision="test_efficientnet",
            text="bert_uncased_L-1_H-32_A-2",
            image_size=32,
            max_tokens=16,
            width=32,
            num_heads=2,
            pretrained=False,
            **settings,
        )
        tokenizer = train_tokenizer(["a drawing from the beach, the city, the forest", "seen today"] * 2)
        text_config = describe_encoder(config, len(tokenizer))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = build_model(config, len(labels), text_config)
        with torch.no_grad():
            for parameter in list(model.head.parameters())[-2:]:  # the output layer
                parameter *= 6
            if model.ngrams:
                model.ngrams.weights.normal_(generator=torch.Generator().manual_seed(0))
        parts: dict[str, Any] = {
            "model_config": config,
            "text_config": text_config,
            "vocabulary": Vocabulary(labels),
            "calibration": Calibration(np.linspace(0.8, 1.2, len(labels)), np.full(len(labels), 0.1)),
            "tokenizer_files": tokenizer_files(tokenizer),
            "weights": model.state_dict(),
            "metrics": {},
            "card": "",
        }
        save_bundle(Folder(str(folder)), thresholds=np.full(len(labels), 0.5), **parts)
        rows = draw_rows(60, 99)
        seen = Labeler.load(str(folder))(rows["image"].to_pylist(), rows["caption"].to_pylist())
        thresholds = np.quantile(seen.scores.astype(np.float64), 0.85, axis=0)
        save_bundle(Folder(str(folder)), thresholds=thresholds, **parts)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def bundle_uri(make_bundle: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Give a tiny bundle of the labels that drawn scenes bear."""
    return make_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="session")
def draw_rows() -> Callable[..., pa.Table]:
    """Give `draw(num_rows, seed=0, extras=False) -> canonical rows`; extras are columns of every kind."""

    def draw(num_rows: int, seed: int = 0, *, extras: bool = False) -> pa.Table:
        from mmray.demo import draw_scene

        generator = np.random.default_rng(seed)
        scenes = [draw_scene(generator) for _ in range(min(num_rows, 61))]
        images, captions, labels = ([scene[part] for scene in scenes] for part in range(3))
        places = generator.integers(len(scenes), size=num_rows) if scenes else []
        words = [f"{captions[place]} Nr. {row}" for row, place in enumerate(places)]
        table = pa.table(
            {
                "image_id": pa.array([f"{seed}-{row:05}" for row in range(num_rows)], pa.string()),
                "image": pa.array([images[place] for place in places], pa.binary()),
                "caption": pa.array(words, pa.string()),
                "labels": pa.array([labels[place] for place in places], pa.list_(pa.string())),
            }
        )
        for name, column in extra_columns(num_rows, generator).items() if extras else ():
            table = table.append_column(name, column)
        return table

    return draw


def extra_columns(num_rows: int, generator: np.random.Generator) -> dict[str, pa.Array]:
    """Make a column of each kind that may pass through; about every third value is null."""
    numbers = generator.integers(1, 1000, num_rows).tolist()

    def column(value: Callable[[int], Any], kind: pa.DataType) -> pa.Array:
        return pa.array([value(number) if number % 3 else None for number in numbers], kind)

    size = pa.struct([("width", pa.int32()), ("by", pa.struct([("who", pa.string())]))])
    nan = float("nan")
    return {
        "whole": column(int, pa.int16()),
        "real": column(lambda number: nan if number % 5 == 0 else number / 7, pa.float64()),
        "flag": column(lambda number: number % 2 == 0, pa.bool_()),
        "nothing": pa.nulls(num_rows),
        "kind": column(lambda number: f"wörd {number % 7}", pa.string()).dictionary_encode(),
        "tags": column(lambda number: [f"tag {number % 7}", None][: number % 4], pa.list_(pa.string())),
        "box": column(lambda number: [number, nan], pa.list_(pa.float32(), 2)),
        "size": column(lambda number: {"width": number, "by": {"who": None}}, size),
        "taken": column(lambda number: datetime.fromtimestamp(number * 1e6, UTC), pa.timestamp("us", "UTC")),
        "price": column(lambda number: Decimal(number) / 4, pa.decimal128(9, 2)),
        "hash": column(lambda number: number.to_bytes(4), pa.binary(4)),
        "facts": column(lambda number: [("depth", number)], pa.map_(pa.string(), pa.int64())),
    }


@pytest.fixture(scope="session")
def spoil() -> Callable[..., tuple[pa.Table, dict[int, str]]]:
    """Give `spoil(rows, {row: damage}) -> the rows with this damage, and {row: status}`; see DAMAGES."""

    def spoil(rows: pa.Table, damages: dict[int, str]) -> tuple[pa.Table, dict[int, str]]:
        for name in ("image", "caption"):
            values = rows[name].to_pylist()
            for row, damage in damages.items():
                values[row] = DAMAGES[damage][0].get(name, values[row])
            index = rows.schema.get_field_index(name)
            rows = rows.set_column(index, name, pa.array(values, rows.schema.field(name).type))
        return rows, {row: DAMAGES[damage][1] for row, damage in damages.items()}

    return spoil


@pytest.fixture(scope="session")
def archive(
    draw_rows: Callable[..., pa.Table],
    spoil: Callable[..., tuple[pa.Table, dict[int, str]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Archive:
    """Give an archive of nested files that differ in columns, types and layout. Copy it to change it."""
    folder, statuses = tmp_path_factory.mktemp("archive") / "rows", {}

    def write(path: str, rows: pa.Table, damages: dict[int, str], **settings: Any) -> None:
        rows, statuses[path] = spoil(rows, damages)
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows, folder / path, **settings)

    every = list(DAMAGES)
    # Four shards: one for the first row group, two for the second, one for the third.
    big = draw_rows(2350, 1)
    write(
        "big.parquet",
        big,
        dict(zip((0, 3, 998, 999, 1000, 2299, 2349), every, strict=True)),
        row_group_size=1200,
    )
    rows = draw_rows(90, 2, extras=True)
    taken = {"predicted_labels": ["mine"] * 90, "scores": [1.5] * 90, "status": ["new"] * 90}
    taken |= {"error": [None] * 90, "model": range(90)}
    for name, values in taken.items():
        rows = rows.append_column(name, pa.array(values))
    write(
        "country=at/year=2025/a.parquet",
        rows,
        dict(zip(range(10, 80, 10), every, strict=True)),
        row_group_size=17,
    )
    rows = draw_rows(60, 3, extras=True).select(["taken", "labels", "caption", "image", "size", "image_id"])
    rows, status = spoil(rows, {7: "null image", 8: "bad image", 9: "null caption"})
    images = [image and {"bytes": image, "path": "x.jpg"} for image in rows["image"].to_pylist()]
    rows = rows.set_column(
        3, "image", pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    )
    rows = rows.set_column(2, "caption", rows["caption"].cast(pa.large_string()))
    (folder / "country=at/year=2026").mkdir(parents=True)
    pq.write_table(rows, folder / "country=at/year=2026/a.parquet", row_group_size=60)
    statuses["country=at/year=2026/a.parquet"] = status
    write("country=de/empty.parquet", draw_rows(0, 4), {})
    write("holiday [*] é.parquet", draw_rows(30, 5), {29: "bad image"})
    for hidden in ("_old/a.parquet", ".trash/a.parquet", "country=de/_tmp.parquet"):
        (folder / hidden).parent.mkdir(parents=True, exist_ok=True)
        (folder / hidden).write_bytes(b"not to be read")
    (folder / "notes.txt").write_text("no data")
    return Archive(folder, dict(sorted(statuses.items())))


@pytest.fixture(scope="session")
def labeled(
    cluster: None, archive: Archive, bundle_uri: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Give what `label_dataset` made of the archive. Copy it to change it."""
    from mmray.config import LabelConfig
    from mmray.labeling import label_dataset

    output = tmp_path_factory.mktemp("labeled") / "rows"
    label_dataset(str(archive.folder), bundle_uri, str(output), config=LabelConfig(max_failed_fraction=0.05))
    return output
