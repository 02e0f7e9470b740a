"""Turn a raw layout into the canonical Parquet dataset; the same command again writes the same files."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from mmray.cli import cluster, job, options
from mmray.config import Columns
from mmray.options import make

if TYPE_CHECKING:
    from mmray.prepare import Prepared
    from mmray.schema import Label

images = click.option("--images", "images_uri", required=True, metavar="URI", help="Folder of images.")
output = click.option("--output", "output_uri", required=True, metavar="URI", help="Folder for the dataset.")
split_help = "Write train/ and val/, with about this share of the image ids in val/ [default: no split]."
val_fraction = click.option("--val-fraction", type=float, default=0.0, metavar="F", help=split_help)


@click.group(context_settings={"max_content_width": 110})
def main() -> None:
    """Turn a raw layout into the canonical Parquet dataset. A URI is a local path or s3://bucket/prefix.

    Example: prepare.py kaggle --csv train.csv --images s3://raw/images --output s3://rows --val-fraction 0.1
    """


@job("kaggle")
@click.option(
    "--csv", "csv_uri", required=True, metavar="URI", help="ImageID,Labels,Caption or ImageID,Caption."
)
@images
@output
@val_fraction
def kaggle(csv_uri: str, images_uri: str, output_uri: str, val_fraction: float) -> None:
    """Prepare the Kaggle layout: a CSV whose captions may hold line breaks and bare quotes."""
    with cluster():
        from mmray.prepare import prepare_kaggle

        show(prepare_kaggle(csv_uri, images_uri, output_uri, val_fraction))


@job("coco")
@click.option("--instances", "instances_uri", required=True, metavar="URI", help="instances_*.json: labels.")
@click.option("--captions", "captions_uri", required=True, metavar="URI", help="captions_*.json.")
@images
@output
@val_fraction
def coco(
    instances_uri: str, captions_uri: str, images_uri: str, output_uri: str, val_fraction: float
) -> None:
    """Prepare COCO's annotations: one row per image, its first caption, the names of its categories."""
    with cluster():
        from mmray.prepare import prepare_coco

        show(prepare_coco(instances_uri, captions_uri, images_uri, output_uri, val_fraction))


@job("folder")
@images
@click.option("--csv", "csv_uri", metavar="URI", help="Names the rows: columns image, caption, labels.")
@output
@val_fraction
def folder(images_uri: str, csv_uri: str | None, output_uri: str, val_fraction: float) -> None:
    """Prepare a folder of images: all of them, or those that a CSV names.

    Labels in the CSV are separated by spaces, or by | where they hold spaces themselves.
    """
    with cluster():
        from mmray.prepare import prepare_folder

        show(prepare_folder(images_uri, output_uri, csv_uri, val_fraction))


@job("label-studio")
@click.option("--answers", "answers_uri", required=True, metavar="URI", help="Label Studio's JSON export.")
@click.option("--input", "input_uri", required=True, metavar="URI", help="The rows that were asked about.")
@output
@options(Columns, only=("image", "caption", "id", "image_prefixes"))
def label_studio(answers_uri: str, input_uri: str, output_uri: str, **settings: Any) -> None:
    """Prepare what people answered to the tasks of export.py label-studio, to train on next."""
    from mmray.answers import prepare_answers

    answered = prepare_answers(answers_uri, input_uri, output_uri, make(Columns, settings))
    counts = [(answered.num_rows, "rows written"), (answered.num_without_image, "without an image")]
    show_counts([*counts, *by_label(answered.labels)])


def by_label(labels: dict[Label, int]) -> list[tuple[int, str]]:
    """Say how often each label occurs."""
    return [(num_rows, f"rows with label {label}") for label, num_rows in labels.items()]


def show_counts(counts: Iterable[tuple[int, str]]) -> None:
    """Print numbers and what they mean."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    table.add_column(justify="right")
    for count, meaning in counts:
        table.add_row(f"{count:,}", meaning)
    Console(highlight=False, markup=False, emoji=False).print(table)


def show(prepared: Prepared) -> None:
    """Print what was written, and how often each label occurs."""
    counts = [
        (prepared.num_rows, "rows written"),
        (prepared.num_with_image, "with an image"),
        (prepared.num_missing, "images missing"),
        (prepared.num_unreadable, "images unreadable"),
        (prepared.num_duplicates, "rows that repeat an image_id"),
        (prepared.num_left_out, "images in the folder that no row names"),
        (prepared.num_bytes, f"bytes in {prepared.num_files:,} Parquet file(s)"),
        *by_label(prepared.labels),
    ]
    show_counts(counts)
    if prepared.num_missing or prepared.num_unreadable:
        click.echo(f"Missing and unreadable images are listed in {prepared.rejected_uri}")


for command in (kaggle, coco, folder, label_studio):
    main.add_command(command)

if __name__ == "__main__":
    main()
