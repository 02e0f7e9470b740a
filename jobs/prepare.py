"""Turn a raw layout into the canonical Parquet dataset; the same command again writes the same files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mmray.cli import cluster, job

if TYPE_CHECKING:
    from mmray.prepare import Prepared

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


def show(prepared: Prepared) -> None:
    """Print what was written, and how often each label occurs."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    table.add_column(justify="right")
    for count, meaning in (
        (prepared.num_rows, "rows written"),
        (prepared.num_with_image, "with an image"),
        (prepared.num_missing, "images missing"),
        (prepared.num_unreadable, "images unreadable"),
        (prepared.num_duplicates, "rows that repeat an image_id"),
        (prepared.num_left_out, "images in the folder that no row names"),
        (prepared.num_bytes, f"bytes in {prepared.num_files:,} Parquet file(s)"),
        *((num_rows, f"rows with label {label}") for label, num_rows in prepared.labels.items()),
    ):
        table.add_row(f"{count:,}", meaning)
    Console(highlight=False, markup=False, emoji=False).print(table)
    if prepared.num_missing or prepared.num_unreadable:
        click.echo(f"Missing and unreadable images are listed in {prepared.rejected_uri}")


for command in (kaggle, coco, folder):
    main.add_command(command)

if __name__ == "__main__":
    main()
