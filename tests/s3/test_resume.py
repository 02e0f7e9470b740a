"""What a job that resumes asks of a store: the listing tells it what is done."""

from collections import Counter
from urllib.parse import unquote

import pytest

from mmray.bundle import Bundle
from mmray.config import Columns, ComputeConfig, LabelConfig
from mmray.labeler import Labeler
from mmray.labeling import label_dataset
from mmray.lease import LEASE
from mmray.parquet import find_files, read_units
from mmray.plan import Shard
from mmray.planning import plan_labeling
from mmray.schema import KeptScores
from mmray.shards import Committer, Records
from mmray.storage import Folder
from mmray.tables import TableLabeler
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


def commit_all_but_one(rows, bundle, output):
    """Leave what a job leaves that is killed before its last file: files and their records."""
    config, columns = LabelConfig(precision="fp32"), Columns()
    folder, files = find_files(rows)
    plan = plan_labeling(folder, files, bundle, output, columns, config)
    label = TableLabeler(Labeler(bundle), columns, KeptScores.parse(config.scores))
    committer, records = Committer(output, plan.fingerprint), Records(output)
    for file in plan.files[:-1]:
        ((first, end, table),) = read_units(folder, file, file.units, salvage=True)
        records.add(committer.commit(Shard(file.path, first, end), label(table), file))
    records.publish()


@pytest.mark.usefixtures("cluster")
def test_resuming_asks_as_much_of_a_store_however_many_shards_are_committed(
    proxy, upload, bundle_uri, bucket
):
    def resumed(num_files):
        rows, output = upload(f"rows-{num_files}", num_files), f"{bucket}/labeled-{num_files}"
        commit_all_but_one(rows, Bundle.load(bundle_uri), Folder(output))
        counts = asked(proxy, lambda: label_dataset(rows, bundle_uri, output, compute=CPU))
        assert verify_dataset(rows, output).problems == []
        return counts

    few, many = resumed(3), resumed(23)
    assert few == many, "LISTs give a thousand keys, and no shard is asked for"
    assert many.keys() == {"GET", "PUT", "DELETE"}
