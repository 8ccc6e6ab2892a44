"""The index of a large data set: `python -m bench.index --samples 10_000_000 --shard-size 2000`.

Writes a data set without pictures: manifests, sidecars with the columns of places, tars of the
right size that take no room on the disk, and identities of ten samples each. Makes its index, then
opens it in a new process and reads random places, keys and people. Memory is resident memory above
that of the imports. Pages that are mapped from the file are shared by all processes, and the system
takes them back when it needs memory.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import typer

from stages.storage import layout
from stages.storage.manifest import FileEntry, Manifest, RunInfo
from stages.storage.reader import IDENTITIES_SCHEMA
from stages.storage.sidecar import ROW_GROUP, sidecar_columns
from train.shards import ShardSet

SAMPLE = 200_192  # bytes
PEOPLE = 10  # samples of each person
COLUMNS = ("key", "status", "tar_offset", "tar_size", "sample_sha256")
READS = 1000


def main(
    samples: Annotated[int, typer.Option(min=1)] = 10_000_000,
    shard_size: Annotated[int, typer.Option(min=1)] = 2_000,
    folder: Annotated[Path, typer.Option(help="Removed afterwards.")] = Path("runs/index"),
    keep: Annotated[bool, typer.Option(help="Leave the data set there.")] = False,
) -> None:
    """Make a synthetic data set and its index, and open it."""
    data = folder / f"{samples}-{shard_size}"
    if not (data / layout.IDENTITIES).exists():
        write_data(data, samples, shard_size)
    print(f"{samples:,} samples in {-(-samples // shard_size):,} shards")
    arguments = ["-m", "bench.index", "open", str(data), str(folder / "index")]
    for what in ("made and opened", "opened again"):
        output = subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        print(f"{what}: {output.stdout.decode().strip()}")
    [index] = (folder / "index").iterdir()
    print(f"the index has {index.stat().st_size / samples:.0f} bytes a sample")
    if not keep:
        shutil.rmtree(folder)


def write_data(data: Path, samples: int, shard_size: int) -> None:
    """Writes all files of the data set but pictures and configuration."""
    (data / layout.SHARDS).mkdir(parents=True, exist_ok=True)
    schema = pa.schema(
        [column.to_arrow() for column in sidecar_columns(()) if column.name in COLUMNS],
        metadata={"format_version": str(layout.FORMAT_VERSION)},
    )
    columns = pa.schema([field for field in IDENTITIES_SCHEMA if field.name not in _NEAREST])
    with pq.ParquetWriter(data / layout.IDENTITIES, columns, compression="zstd") as identities:
        for index, first in enumerate(range(0, samples, shard_size)):
            count = min(shard_size, samples - first)
            keys = [
                hashlib.blake2b(b"%d" % number, digest_size=10).hexdigest()
                for number in range(first, first + count)
            ]
            write_shard(data, index, keys, schema)
            people = [f"id-{number // PEOPLE:012x}" for number in range(first, first + count)]
            identities.write_table(
                pa.table(
                    {
                        "key": keys,
                        "shard": [index] * count,
                        "identity_id": people,
                        "identity_size": [PEOPLE] * count,
                        "split_group": people,
                        "split": ["train"] * count,
                    },
                    schema=columns,
                )
            )


_NEAREST = ("nearest", "similarity")


def write_shard(data: Path, index: int, keys: list[str], schema: pa.Schema) -> None:
    """Writes a shard's manifest, its sidecar, and a tar of the right size."""
    count, digests = len(keys), os.urandom(32 * len(keys)).hex()
    table = pa.table(
        {
            "key": keys,
            "status": ["ok"] * count,
            "tar_offset": np.arange(count) * SAMPLE,
            "tar_size": np.full(count, SAMPLE),
            "sample_sha256": [digests[start : start + 64] for start in range(0, 64 * count, 64)],
        }
    )
    path = data / layout.in_shards(layout.sidecar(index))
    table = table.select(schema.names).cast(schema)
    pq.write_table(table, path, compression="zstd", row_group_size=ROW_GROUP)
    tar = data / layout.in_shards(layout.tar(index))
    tar.touch()
    os.truncate(tar, count * SAMPLE + 1024)
    manifest = Manifest(
        shard=layout.shard_name(index),
        inputs=count,
        written=count,
        dropped={},
        failed={},
        inputs_digest=os.urandom(32).hex(),
        signatures=tuple(f"stage-{number}:{os.urandom(8).hex()}" for number in range(12)),
        exclusions="",
        tar=FileEntry(name=tar.name, bytes=count * SAMPLE + 1024, sha256=os.urandom(32).hex()),
        quarantine=None,
        sidecar=FileEntry(name=path.name, bytes=path.stat().st_size, sha256=os.urandom(32).hex()),
        run=RunInfo(finished=0.0, seconds=0.0),
    )
    (data / layout.in_shards(layout.manifest(index))).write_text(manifest.to_json())


def memory() -> tuple[float, float]:
    """Resident memory of this process, and the part that isn't mapped from files, in MB."""
    info = psutil.Process().memory_info()
    return info.rss / 1e6, (info.rss - info.shared) / 1e6


def measure(data: Path, index: Path) -> None:
    """Opens the index in this process, and prints seconds and memory."""
    before = memory()

    def added() -> str:
        resident, own = (now - then for now, then in zip(memory(), before, strict=True))
        return f"{resident:.0f} MB ({own:.0f} MB not mapped from files)"

    start, used = time.monotonic(), time.process_time()
    shards = ShardSet(str(data), "train", index)
    seconds, used = time.monotonic() - start, time.process_time() - used
    print(f"{seconds:.2f} s ({used:.2f} s of CPU time), {added()}")
    numbers = random.Random(0).choices(range(len(shards)), k=READS)
    start = time.monotonic()
    places = [shards.place(number) for number in numbers]
    read = time.monotonic() - start
    start = time.monotonic()
    assert [shards.number(place.key) for place in places] == numbers
    searched = time.monotonic() - start
    start = time.monotonic()
    assert all(len(shards.others(number)) == PEOPLE - 1 for number in numbers)
    people = time.monotonic() - start
    print(
        f"  {READS:,} random places {1000 * read:.0f} ms, numbers of keys {1000 * searched:.0f} ms,"
        f" people {1000 * people:.0f} ms; then {added()}"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["open"]:
        measure(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        typer.run(main)
