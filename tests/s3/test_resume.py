"""What a job that resumes asks of a store: the listing tells it what is done."""

from collections import Counter
from urllib.parse import unquote

import pytest

from mmray.config import ComputeConfig
from mmray.labeling import label_dataset
from mmray.lease import LEASE
from mmray.shards import MANIFEST, SUCCESS
from mmray.storage import Folder
from mmray.verify import verify_dataset

CPU = ComputeConfig(use_gpu=False)


@pytest.fixture
def upload(bucket, draw_rows, bundle_uri):
    """Give `upload(name, num_files) -> URI of an input of so many files`."""
    import io

    import pyarrow.parquet as pq

    def upload(name, num_files):
        rows = draw_rows(num_files, 1)
        for number in range(num_files):
            content = io.BytesIO()
            pq.write_table(rows.slice(number, 1), content)
            Folder(f"{bucket}/{name}").publish(f"{number:02}.parquet", content.getvalue())
        return f"{bucket}/{name}"

    return upload


def asked(proxy, resume):
    """Give what resuming asks for, by method; the lease's requests grow with time."""
    proxy.requests.clear()
    resume()
    return Counter(request.method for request in proxy.requests if LEASE not in unquote(request.target))


@pytest.mark.usefixtures("cluster")
def test_resuming_asks_as_much_of_a_store_however_many_shards_are_committed(
    proxy, upload, bundle_uri, bucket
):
    def resumed(num_files):
        rows, output = upload(f"rows-{num_files}", num_files), f"{bucket}/labeled-{num_files}"
        label_dataset(rows, bundle_uri, output, compute=CPU)
        # As a job leaves it that is killed before its last file: its records are there, the manifest is not.
        manifest = Folder(output).read_json(MANIFEST)
        Folder(output).publish_json("_mmray/records/00000000.json", manifest["files"][:-1])
        Folder(output).remove([SUCCESS, MANIFEST, manifest["files"][-1]["path"]])
        counts = asked(proxy, lambda: label_dataset(rows, bundle_uri, output, compute=CPU))
        assert verify_dataset(rows, output).problems == []
        return counts

    few, many = resumed(3), resumed(23)
    assert few == many, "LISTs give a thousand keys, and no shard is asked for"
    assert many.keys() == {"GET", "PUT", "DELETE"}
