"""Hand over a model as ONNX, or a labeled output to people and to cleanlab."""

from __future__ import annotations

from typing import Any

import click

from mmray.cli import cluster, job, options
from mmray.config import Columns
from mmray.options import make

predictions = click.option(
    "--predictions", "predictions_uri", required=True, metavar="URI", help="A finished output of label.py."
)
output = click.option("--output", "output_uri", required=True, metavar="URI", help="The file to write.")
count = click.option("--count", default=500, show_default=True, help="Rows, at most.")


@click.group(context_settings={"max_content_width": 110})
def main() -> None:
    """Hand over a model, or what it labeled. A URI is a local path or s3://bucket/prefix.

    Example: export.py onnx --model models/first --output first.onnx
    """


@job("onnx")
@click.option("--model", "model_uri", required=True, metavar="URI", help="The bundle.")
@output
@click.option("--decisions", is_flag=True, help="Also give the labels that are decided.")
def onnx(model_uri: str, output_uri: str, decisions: bool) -> None:
    """Write a bundle's model as ONNX: pixels and token ids in, calibrated scores out, any number of rows.

    Example: export.py onnx --model models/first --output first.onnx --decisions
    """
    from mmray.bundle import Bundle
    from mmray.files import file_place
    from mmray.onnx_export import to_onnx

    place, name = file_place(output_uri)
    data = to_onnx(Bundle.load(model_uri), decide=decisions)
    place.publish(name, data)
    click.echo(f"{output_uri}: {len(data) / 1e6:.1f} MB")


@job("uncertain")
@predictions
@output
@count
def uncertain(predictions_uri: str, output_uri: str, count: int) -> None:
    """Write the rows most worth a person's time, as Parquet: by entropy of their scores, labels taking turns.

    Example: export.py uncertain --predictions labeled/ --output uncertain.parquet --count 1000
    """
    with cluster():
        from mmray.export import export_uncertain

        num_rows = export_uncertain(predictions_uri, output_uri, count)
    click.echo(f"{output_uri}: {num_rows:,} rows")


@job("label-studio")
@predictions
@click.option("--input", "input_uri", required=True, metavar="URI", help="The rows that were labeled.")
@options(Columns, only=("image_prefixes",))
@output
@count
def label_studio(
    predictions_uri: str, input_uri: str, image_prefixes: tuple[str, ...], output_uri: str, count: int
) -> None:
    """Write these rows as tasks for Label Studio, the model's labels filled in; and the form, as XML.

    Example: export.py label-studio --predictions labeled/ --input archive/ --output tasks.json
    """
    with cluster():
        from mmray.export import export_label_studio

        num_rows = export_label_studio(predictions_uri, input_uri, output_uri, count, image_prefixes)
    click.echo(f"{output_uri}: {num_rows:,} tasks; the form is {output_uri}.config.xml")


@job("cleanlab")
@click.option("--data", "data_uri", required=True, metavar="URI", help="Rows with labels.")
@predictions
@output
@options(Columns, only=("labels", "id"))
def cleanlab(data_uri: str, predictions_uri: str, output_uri: str, **settings: Any) -> None:
    """Write scores and true labels, by which cleanlab finds wrong ones, as a NumPy archive.

    Example: export.py cleanlab --data rows/ --predictions labeled/ --output rows.npz
    """
    with cluster():
        from mmray.export import export_cleanlab

        num_rows = export_cleanlab(data_uri, predictions_uri, output_uri, make(Columns, settings))
    click.echo(f"{output_uri}: {num_rows:,} rows")


for command in (onnx, uncertain, label_studio, cleanlab):
    main.add_command(command)

if __name__ == "__main__":
    main()
