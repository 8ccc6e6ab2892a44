"""Reading samples by number: the records as they were written, and errors of damaged shards."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest

from configs.errors import ConfigError, PipelineError, ShardError, SourceError
from configs.training import DataSource
from stages.storage.reader import DatasetReader
from stages.storage.store import Store
from tests.train.helpers import keys, run, small
from train.shards import ShardSet


@pytest.fixture
def copy(data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data, tmp_path / "data"))


def test_every_sample_is_the_record_that_was_written(data: Path, shards: ShardSet) -> None:
    written = [
        record for index in range(3) for record in DatasetReader(Store(str(data))).records(index)
    ]
    read = shards.records(range(len(shards)))
    assert keys(shards) == [record.key for record in written]
    for one, other in zip(read, written, strict=True):
        assert (one.key, one.image, one.parsing, one.caption) == (
            other.key,
            other.image,
            other.parsing,
            other.caption,
        )
        assert one.identity is not None and other.identity is not None
        np.testing.assert_array_equal(one.identity, other.identity)


def test_samples_are_returned_in_the_requested_order(shards: ShardSet) -> None:
    assert [record.key for record in shards.records([7, 0, 3])] == [
        shards.key(number) for number in (7, 0, 3)
    ]


def test_a_shard_without_a_manifest_is_ignored(copy: Path, shards: ShardSet) -> None:
    # this leaves a gap in the numbering, and a tar like that of a killed writer
    (copy / "shards/fgid-000001.json").unlink()
    assert keys(ShardSet(str(copy))) == [*keys(shards)[:3], *keys(shards)[6:]]


def test_shards_at_a_url_are_read_in_place(data: Path, shards: ShardSet) -> None:
    fsspec.filesystem("memory").put(str(data), "/fgid", recursive=True)
    remote = ShardSet("memory://fgid")
    assert (keys(remote), remote.digest) == (keys(shards), shards.digest)
    assert remote.records([4])[0].image == shards.records([4])[0].image
    assert remote.dataset_config() == (data / "config.yaml").read_text()


@pytest.mark.parametrize("with_folder", [False, True])
def test_the_error_without_a_data_set_says_what_to_do(tmp_path: Path, with_folder: bool) -> None:
    if with_folder:
        (tmp_path / "none/shards").mkdir(parents=True)
    with pytest.raises(SourceError, match="Run make dataset first"):
        ShardSet(str(tmp_path / "none"))


def test_a_data_set_without_a_sample_is_an_error(copy: Path) -> None:
    for manifest in (copy / "shards").glob("*.json"):
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "written": 0}))
    with pytest.raises(SourceError, match="hold no sample"):
        ShardSet(str(copy))


def test_the_error_names_a_truncated_tar(copy: Path) -> None:
    tar = copy / "shards/fgid-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-2048])
    with pytest.raises(ShardError, match=r"fgid-000001\.tar holds .* its manifest says"):
        ShardSet(str(copy))


def test_the_error_names_the_sample_that_a_sidecar_misplaces(copy: Path) -> None:
    path = copy / "shards/fgid-000000.parquet"
    table = pq.read_table(path)
    keys = table.column("key").to_pylist()
    pq.write_table(table.set_column(0, "key", [[keys[1], keys[0], *keys[2:]]]), path)
    [record] = ShardSet(str(copy)).records([0])
    assert isinstance(record, ShardError) and keys[1] in str(record)


@pytest.mark.parametrize("text", ["", "[]", '{"shard": "fgid-000000", "written": 3}'])
def test_the_error_names_an_invalid_manifest(copy: Path, text: str) -> None:
    (copy / "shards/fgid-000000.json").write_text(text)
    with pytest.raises(PipelineError, match=r"fgid-000000\.json"):
        ShardSet(str(copy))


def test_a_data_set_of_an_unknown_format_version_is_refused(copy: Path) -> None:
    path = copy / "shards/fgid-000001.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    with pytest.raises(ShardError, match=r"fgid-000001\.json.*version 99"):
        ShardSet(str(copy))


def test_a_version_2_data_set_trains(tiny_base: Path, tmp_path: Path) -> None:
    config = small(Path("tests/data/dataset_v2"), tiny_base, tmp_path / "out", max_train_steps=2)
    outcome = run(config)
    assert outcome.adapter is not None and outcome.step == 2


@pytest.mark.parametrize("key", ["data", "output", "adapter"])
def test_credentials_in_a_url_are_refused_and_kept_nowhere(
    tiny_base: Path, data: Path, tmp_path: Path, key: str
) -> None:
    url = "s3://me:not-to-be-seen@bucket/fgid"
    config = small(data, tiny_base, tmp_path / "out")
    value = (*config.data, DataSource(path=url)) if key == "data" else url
    config = replace(config, **{key: value})
    with pytest.raises(ConfigError, match="environment") as error:
        run(config)
    assert "not-to-be-seen" not in str(error.value)
    with pytest.raises(ConfigError, match="environment"):
        ShardSet(url)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if b"not-to-be-seen" in path.read_bytes()]
