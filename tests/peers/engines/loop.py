"""The ceiling: two processes, each with half of the files, without any engine between file and model."""

from __future__ import annotations

from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from shared import BATCH_ROWS, Model, decode, decode_by_pillow, engine

NUM_PROCESSES = 2


def work(files: list[Path], model_path: str, output_path: Path, idiom: bool) -> None:
    """Score some files."""
    model = Model(model_path)
    decoder, side = decode_by_pillow if idiom else decode, model.config.image_size
    for path in files:
        ids, scores = [], []
        columns = ["image_id", "image", "caption"]
        for batch in pq.ParquetFile(path).iter_batches(BATCH_ROWS, columns=columns):
            pixels = [decoder(data.as_py(), side) for data in batch["image"]]
            scores.extend(model(pixels, batch["caption"].to_pylist()))
            ids += batch["image_id"].to_pylist()
        kind = pa.list_(pa.float32(), model.num_labels)
        pq.write_table(pa.table({"image_id": ids, "scores": pa.array(scores, kind)}), output_path / path.name)


@engine
def main(input_path: Path, model_path: str, output_path: Path, idiom: bool) -> None:
    output_path.mkdir(parents=True)
    files, start = sorted(input_path.glob("*.parquet")), get_context("spawn")
    shares = [files[first::NUM_PROCESSES] for first in range(NUM_PROCESSES)]
    workers = [start.Process(target=work, args=(share, model_path, output_path, idiom)) for share in shares]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
