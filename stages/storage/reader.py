"""DatasetReader: reads data sets, from a folder or an fsspec URL."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import IO, Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from configs.errors import ShardError
from stages.fields import Column
from stages.record import Record, Status
from stages.storage import layout, version2
from stages.storage.manifest import FileEntry, Manifest
from stages.storage.samples import parse_members, parse_sample, read_sample
from stages.storage.sidecar import (
    Row,
    SidecarFile,
    has_sample,
    is_quarantined,
    row_to_record,
    with_row_fields,
)
from stages.storage.store import Store

# The columns of identities.parquet, which has a row for each sample. identity_id is "id-" and the
# beginning of the key of the identity's earliest member, or "person-" and a digest of the person
# whom the source states.
IDENTITIES_SCHEMA = pa.schema(
    [
        pa.field(name, kind, metadata={"description": description})
        for name, kind, description in (
            ("key", pa.string(), "key of the sample"),
            ("shard", pa.int32(), "number of the sample's shard"),
            (
                "identity_id",
                pa.string(),
                "the person shown: samples with equal ids are taken for one person",
            ),
            ("identity_size", pa.int32(), "number of samples of that identity"),
            (
                "split_group",
                pa.string(),
                "identities that may be one person; they are on one side of the split",
            ),
            ("split", pa.string(), "train or val; an identity is on one side only"),
            (
                "nearest",
                pa.list_(pa.string()),
                "keys of the samples whose faces are most alike, the closest first",
            ),
            ("similarity", pa.list_(pa.float32()), "their cosines"),
        )
    ]
)

Value = TypeVar("Value")


class SamplePlace(NamedTuple):
    """Where a written sample is. tar: file name in the shards folder. offset, size: in bytes.
    sha256: of these bytes; "": unknown, in data sets before version 0.2.
    """

    key: str
    tar: str
    offset: int
    size: int
    sha256: str = ""


class DatasetReader:
    """Reads manifests, sidecar rows, samples, identities and configuration of a data set.

    Nothing is cached, since a run may change the data set. Files of older format versions are
    converted to this one. Methods raise ShardError for a file that is missing or damaged, or that
    doesn't match its manifest.
    """

    def __init__(self, output: str | Store) -> None:
        self.store = output if isinstance(output, Store) else Store(output)

    def __str__(self) -> str:
        return self.store.url

    def manifests(
        self, *, readable_only: bool = False, names: Iterable[str] | None = None
    ) -> dict[int, Manifest]:
        """Returns number → manifest of every committed shard, in order. readable_only: leave out
        manifests that are damaged, instead of raising ShardError. names: of the files of all
        shards, if the caller has listed them.
        """
        names = self.store.names(layout.SHARDS) if names is None else names
        paths = [layout.in_shards(name) for name in names if layout.is_manifest(name)]
        manifests = []
        for name, data in self.store.read_all(paths).items():
            try:
                manifests.append(Manifest.from_json(data, f"{self.store.url}/{name}"))
            except ShardError:
                if not readable_only:
                    raise
        return {m.index: m for m in sorted(manifests, key=lambda manifest: manifest.index)}

    def uncommitted(self) -> list[str]:
        """Returns the names of the shards that have files, but no manifest."""
        names = self.store.names(layout.SHARDS)
        committed = {name.partition(".")[0] for name in names if layout.is_manifest(name)}
        return sorted({n.partition(".")[0] for n in names if layout.is_of_shard(n)} - committed)

    def check_sizes(self) -> None:
        """Raises ShardError if a file of a committed shard is missing or has another size."""
        sizes = self.store.sizes(layout.SHARDS)
        for manifest in self.manifests().values():
            for file in manifest.files:
                if sizes.get(file.name) != file.bytes:
                    size = f"it has {sizes[file.name]:,}" if file.name in sizes else "it is missing"
                    raise self._damaged(file, f"{size}, expected {file.bytes:,} bytes")

    @contextmanager
    def sidecar(self, index: int) -> Iterator[SidecarFile]:
        """Opens a shard's sidecar, so that parts of it can be read."""
        name = layout.in_shards(layout.sidecar(index))
        try:
            with self.store.parquet(name) as file:
                yield SidecarFile(file)
        except FileNotFoundError as error:
            raise ShardError(
                f"{self.store.url}/{name} is missing. {layout.how_to_repair(name)}"
            ) from error

    def rows(
        self,
        index: int,
        columns: Sequence[Column | str] | None = None,
        status: Status | None = None,
    ) -> pa.Table:
        """Returns a shard's sidecar rows, in input order. columns: None means all. status: only
        rows with this status; None: all rows.
        """
        names = None if columns is None else [c if isinstance(c, str) else c.name for c in columns]
        hidden = status is not None and names is not None and "status" not in names
        with self.sidecar(index) as file:
            table = file.read([*(columns or ()), "status"] if hidden else columns)
        if status is not None:
            table = table.filter(pc.equal(table.column("status"), status.value))
        return table.drop_columns(["status"]) if hidden else table

    def columns(self) -> dict[str, Column]:
        """Returns name → column, for all columns that at least one shard has. Shards of different
        chains may have different columns.
        """
        columns: dict[str, Column] = {}
        chains = {(m.version, m.signatures): index for index, m in self.manifests().items()}
        for index in chains.values():
            with self.sidecar(index) as file:
                columns = file.columns | columns
        return columns

    def records(self, index: int) -> list[Record]:
        """Returns the records of all inputs of a shard, in order. Written and quarantined ones are
        complete; other dropped and failed ones have their reason, but no image, label map,
        embedding and captions.

        New shards are made from them, so the shard's files are compared with the digests of its
        manifest first. Raises ShardError if one differs.
        """
        manifest = self._manifest(index)
        with self._verified(manifest.sidecar), self.sidecar(index) as file:
            columns, rows = file.columns, file.read().to_pylist()
        with ExitStack() as stack:
            tar = stack.enter_context(self._verified(manifest.tar))
            quarantine = tar
            if manifest.quarantine:
                quarantine = stack.enter_context(self._verified(manifest.quarantine))
            return [
                with_row_fields(read_sample(quarantine if is_quarantined(row) else tar, row), row)
                if has_sample(row)
                else row_to_record(row, columns)
                for row in rows
            ]

    def sampled_rows(self, index: int) -> dict[str, Row]:
        """Returns key → row, with a few columns, of the inputs that have a sample. Needs no
        manifest; {} if there is no sidecar that can be read.
        """
        names = ("key", "sha256", "status", "reason", "quarantine_offset")
        try:
            rows = self.rows(index, names).to_pylist()
        except ShardError:
            return {}
        return {row["key"]: row for row in rows if has_sample(row)}

    def samples(self, index: int) -> Iterator[Record]:
        """Yields the written samples of a shard, in the order of its tar."""
        rows = self.rows(index, ("key", "source", "members"), Status.OK).to_pylist()
        if rows:
            manifest = self._manifest(index)
            with self._open(manifest.tar) as tar:
                for row in rows:
                    yield self._sample(tar, row, manifest.tar)

    def sample(self, index: int, row: Row) -> Record | None:
        """Returns the sample of a sidecar row with all columns, read by one range request; None if
        the row has no sample.
        """
        if not has_sample(row):
            return None
        manifest = self._manifest(index)
        quarantined = is_quarantined(row)
        file, kind = (manifest.quarantine, "quarantine") if quarantined else (manifest.tar, "tar")
        if file is None:
            raise ShardError(
                f"{manifest.shard}: a row is quarantined, but the manifest has no quarantine tar"
            )
        start = row[f"{kind}_offset"]
        data = self._with_file(
            file, lambda name: self.store.read(name, start, start + row[f"{kind}_size"])
        )
        members = [member | {"offset": member["offset"] - start} for member in row["members"]]
        sample = self._sample(io.BytesIO(data), {**row, "members": members}, file)
        return with_row_fields(sample, row)

    def parts_at(self, places: Sequence[SamplePlace]) -> list[bytes]:
        """Returns the bytes of the samples at these places, in that order. Raises ShardError if a
        tar is missing.
        """
        ranges = [(layout.in_shards(p.tar), p.offset, p.offset + p.size) for p in places]
        try:
            return self.store.read_ranges(ranges)
        except FileNotFoundError as error:
            raise ShardError(f"{self.store.url}: a tar is missing: {error}") from error

    def sample_in(
        self, part: bytes, place: SamplePlace, *, verify: bool = False
    ) -> Record | ShardError:
        """Returns the sample whose bytes `parts_at` returned; the error if it is damaged. verify:
        compare its bytes with its digest.
        """
        return self._parsed(part, place, verify, parse_sample)

    def members_in(
        self, part: bytes, place: SamplePlace, *, verify: bool = False
    ) -> dict[str, bytes] | ShardError:
        """Returns extension → contents of each file of a sample; otherwise as `sample_in`."""
        return self._parsed(part, place, verify, parse_members)

    def _parsed(
        self,
        part: bytes,
        place: SamplePlace,
        verify: bool,
        parse: Callable[[bytes, str, str], Value],
    ) -> Value | ShardError:
        tar = f"{self.store.url}/{layout.SHARDS}/{place.tar}"
        try:
            if verify and place.sha256 and hashlib.sha256(part).hexdigest() != place.sha256:
                raise ShardError(f"{tar}: the bytes of sample {place.key} are not those written")
            return parse(part, place.key, tar)
        except ShardError as error:
            return ShardError(f"{error}. {layout.how_to_repair(place.tar)}")

    def identities(self, columns: list[str] | None = None) -> pa.Table:
        """Returns the rows of identities.parquet; none if the global pass hasn't run yet."""
        if not self.store.exists(layout.IDENTITIES):
            schema = IDENTITIES_SCHEMA
            return pa.schema([schema.field(n) for n in columns or schema.names]).empty_table()
        return self.store.table(layout.IDENTITIES, columns)

    def config_text(self) -> str:
        """Returns the configuration of the last run, as YAML; "" if there is none. It isn't
        checked.
        """
        data = self.store.read_all([layout.CONFIG]).get(layout.CONFIG, b"")
        return data.decode(errors="replace")

    def config_values(self) -> dict[str, Any]:
        """Returns the configuration of the last run as plain values; {} if there is none. Keys may
        be those of an older version. Raises ShardError if it is damaged.
        """
        text = self.config_text()
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            values = " ".join(str(error).split())  # in one line
        if "\ufffd" in text:
            values = "it isn't UTF-8 text"
        if not text or (isinstance(values, dict) and text.endswith("\n")):
            return values or {}
        what = values if isinstance(values, str) else "it ends within a line"
        raise ShardError(
            f"{self.store.url}/{layout.CONFIG} is damaged: {what[:200]}. "
            f"{layout.how_to_repair(layout.CONFIG)}"
        )

    def dataset_info(self) -> dict[str, Any]:
        """Returns the contents of dataset.json (source, stages, signatures, weights), with the
        current names of stages; {} if it doesn't exist.
        """
        data = self.store.read_all([layout.DATASET]).get(layout.DATASET, b"{}")
        try:
            return version2.dataset_info(json.loads(data))
        except (ValueError, AttributeError, TypeError) as error:
            raise ShardError(
                f"{self.store.url}/{layout.DATASET} is not JSON of a data set: {error}. "
                f"{layout.how_to_repair(layout.DATASET)}"
            ) from error

    def _manifest(self, index: int) -> Manifest:
        name = layout.in_shards(layout.manifest(index))
        try:
            return Manifest.from_json(self.store.read(name), f"{self.store.url}/{name}")
        except FileNotFoundError as error:
            raise ShardError(f"{self.store.url}: shard {index} is not committed") from error

    @contextmanager
    def _verified(self, file: FileEntry) -> Iterator[IO[bytes]]:
        """Opens a file of a shard, compared with its digest."""
        with self._open(file) as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != file.sha256:
                raise self._damaged(file, "its sha256 is not that of its manifest")
            stream.seek(0)
            yield stream

    def _sample(self, tar: IO[bytes], row: Row, file: FileEntry) -> Record:
        """Returns the sample of a row. Raises ShardError, which names the file."""
        try:
            return read_sample(tar, row)
        except ShardError as error:
            raise self._damaged(file, str(error)) from error

    def _damaged(self, file: FileEntry, how: str) -> ShardError:
        return ShardError(
            f"{self.store.url}/{layout.SHARDS}/{file.name} is damaged: {how}. "
            f"{layout.how_to_repair(file.name)}"
        )

    def _open(self, file: FileEntry) -> Any:
        return self._with_file(file, self.store.open)

    def _with_file(self, file: FileEntry, read: Callable[[str], Value]) -> Value:
        """Returns `read(path)`. Raises ShardError if the file is missing."""
        try:
            return read(layout.in_shards(file.name))
        except FileNotFoundError as error:
            raise ShardError(
                f"{self.store.url}/{layout.SHARDS}/{file.name} is missing. "
                f"{layout.how_to_repair(file.name)}"
            ) from error
