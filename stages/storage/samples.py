"""Samples: writes complete records as members of a tar, and reads them.

The members are KEY.jpg, KEY.parsing.png, KEY.identity.npy, KEY.txt and KEY.json, by the table of
stored fields (stages/fields.py). The JSON of all samples has one type: it has no nulls, and no
lists of varying length except `faces`, which is never empty. So libraries that infer a schema from
the first samples can read the rest.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import threading
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import IO, Any, Final

import numpy as np

from configs.errors import ShardError
from stages.fields import Annotation, empty_value, stored_fields
from stages.record import IDENTITY_DIM, Record, Status, face_from_dict, face_to_dict
from stages.storage import version2
from stages.storage.layout import FORMAT_VERSION, READABLE

_IDENTITY: Final = "identity"
_MEMBERS: Final = {name: entry.member for name, entry in stored_fields(Record) if entry.member}
_JSON: Final = {name: entry for name, entry in stored_fields(Record) if entry.json}

# numpy parses a file's header with `ast`, which in Python 3.11 fails at random with a SystemError
# where two threads use it at once (python/cpython#106905)
PARSING: Final = threading.Lock()

# what reading a damaged member raises; numpy's header may be anything that looks like Python
DAMAGED: Final = (
    *(KeyError, ValueError, TypeError, AttributeError, EOFError, MemoryError),
    *(SyntaxError, tokenize.TokenError),
)

# fields of a record that only its row in the sidecar has
NOT_IN_TARS: Final = frozenset(
    name for name, entry in stored_fields(Record) if not (entry.member or entry.json)
)

# extension → description of each member of a sample
MEMBERS: Final[Mapping[str, str]] = {
    **{entry.member: entry.description for _, entry in stored_fields(Record) if entry.member},
    "json": "all other fields: provenance, faces, captions, annotations",
}


def to_members(record: Record, annotations: Sequence[type[Annotation]]) -> dict[str, bytes]:
    """Returns extension → bytes of a complete record, in the order of the tar.

    annotations: of the chain. One that the record doesn't have is written with empty values; the
    JSON's `annotations` names those that it has. Raises ValueError if the record is not complete.
    """
    if not record.complete or not (record.ok or record.quarantined):
        raise ValueError(
            f"record {record.key} ({record.source}) is not a complete sample: status "
            f"{record.status}"
        )
    values = {name: _member(getattr(record, name)) for name in _MEMBERS}
    members = {_MEMBERS[name]: data for name, data in values.items()}
    members["json"] = json.dumps(
        _metadata(record, annotations), ensure_ascii=False, sort_keys=True
    ).encode()
    return dict(sorted(members.items()))


def _member(value: Any) -> bytes:
    if isinstance(value, np.ndarray):
        with io.BytesIO() as out:
            np.save(out, np.asarray(value, np.float32), allow_pickle=False)
            return out.getvalue()
    return value.encode() if isinstance(value, str) else bytes(value)


def _metadata(record: Record, annotations: Sequence[type[Annotation]]) -> dict[str, Any]:
    """Returns the values of a sample's JSON."""
    values = {name: getattr(record, name) for name in _JSON}
    values["faces"] = [face_to_dict(face) for face in record.faces]
    plain = {n: empty_value(_JSON[n]) if value is None else value for n, value in values.items()}
    missing = {
        kind.name: {name: empty_value(entry) for name, entry in stored_fields(kind)}
        for kind in annotations
        if kind.name not in record.annotations
    }
    return {
        "version": FORMAT_VERSION,
        **plain,
        **missing,
        **record.annotations,
        "annotations": " ".join(sorted(record.annotations)),
    }


def from_members(members: Mapping[str, bytes]) -> Record:
    """Returns the record of a sample, with status ok. Missing fields get their defaults.

    members: extension → bytes. Raises KeyError for a missing member, ValueError for a format
    version that this program can't read.
    """
    meta: dict[str, Any] = json.loads(members["json"])
    version = meta.get("version", meta.get("schema"))
    if version not in READABLE:
        raise ValueError(
            f"sample {meta.get('key')}: format version {version}, this program reads "
            f"{', '.join(map(str, READABLE))}"
        )
    if version == 2:
        meta = version2.sample(meta)
    with PARSING:
        identity = np.load(io.BytesIO(members[_MEMBERS[_IDENTITY]]), allow_pickle=False)
    if np.shape(identity) != (IDENTITY_DIM,):
        raise ValueError(f"an identity of shape {np.shape(identity)}, expected ({IDENTITY_DIM},)")
    values = {name: meta[name] for name in _JSON if name in meta}
    values |= {n: members[m] for n, m in _MEMBERS.items() if n not in (*_JSON, _IDENTITY)}
    values["faces"] = tuple(face_from_dict(face) for face in meta["faces"])
    values["identity_norm"] = values.get("identity_norm") or None  # 0 means not recorded
    return Record(
        **values,
        identity=np.asarray(identity, np.float32),
        annotations={name: meta[name] for name in meta["annotations"].split()},
        status=Status.OK,
    )


class TarWriter:
    """Writes samples to a stream, as a tar that doesn't depend on the time or the user.

    count: the number of bytes written so far.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()  # of the present sample
        self.count = 0

    def add(self, key: str, members: Mapping[str, bytes]) -> dict[str, Any]:
        """Appends a sample and returns its place in bytes: the `offset` of its first header, its
        `size` with headers and padding, and in `members` the name, data offset and size of each;
        and `sha256`, the digest of these bytes.
        """
        start, places = self.count, []
        self._digest = hashlib.sha256()
        for extension, data in members.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size, info.mode = len(data), 0o644  # mtime, uid and gid stay 0
            self._write(info.tobuf(tarfile.USTAR_FORMAT))
            places.append({"name": extension, "offset": self.count, "size": len(data)})
            self._write(data)
            self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return {
            "offset": start,
            "size": self.count - start,
            "members": places,
            "sha256": self._digest.hexdigest(),
        }

    def finish(self) -> None:
        """Writes the end of the archive."""
        end = 2 * tarfile.BLOCKSIZE
        self._write(bytes(end + -(self.count + end) % tarfile.RECORDSIZE))

    def _write(self, data: bytes) -> None:
        self._stream.write(data)
        self._digest.update(data)
        self.count += len(data)


def read_sample(tar: IO[bytes], row: Mapping[str, Any]) -> Record:
    """Returns the sample of a sidecar row (key, source, members) from an open tar, with status ok.

    Raises ShardError if the tar has something else at this place.
    """
    members = {}
    for member in row["members"]:
        tar.seek(member["offset"])
        members[member["name"]] = tar.read(member["size"])
    return record_of(members, row["key"], f"sample {row['key']} ({row['source']})")


def parse_sample(data: bytes, key: str, place: str) -> Record:
    """Returns the sample `key`, with status ok; otherwise as `parse_members`."""
    return record_of(parse_members(data, key, place), key, f"{place}: sample {key}")


def parse_members(data: bytes, key: str, place: str) -> dict[str, bytes]:
    """Returns extension → contents of the files of sample `key`, from the bytes of its part of a
    tar, with headers.

    place: for error messages. Raises ShardError if it is not that sample.
    """
    members: dict[str, bytes] = {}
    try:
        for name, contents in _members_in(data):
            owner, _, extension = name.partition(".")
            if owner != key:
                raise ShardError(f"{place}: expected sample {key}, got {name!r}")
            members[extension] = contents
    except ValueError as error:
        raise ShardError(f"{place}: sample {key} can't be read: {error}") from error
    return members


def _members_in(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yields name and contents of each member in a part of a tar that TarWriter wrote.

    `tarfile` takes longer, because it reads every kind of tar. Raises ValueError if
    this is not such a part.
    """
    start = 0
    while start < len(data):
        header = data[start : start + tarfile.BLOCKSIZE]
        if header[156:157] != tarfile.REGTYPE or header[257:263] != tarfile.POSIX_MAGIC[:6]:
            raise ValueError(f"there is no header of a file at byte {start}")
        name, size = header[:100].rstrip(b"\0").decode(), int(header[124:135], 8)
        start += tarfile.BLOCKSIZE
        if not 0 <= size <= len(data) - start:
            raise ValueError(f"{name!r} has {size} bytes, {len(data) - start} are left")
        yield name, data[start : start + size]
        start += size + -size % tarfile.BLOCKSIZE


def record_of(members: Mapping[str, bytes], key: str, place: str) -> Record:
    """Returns the record of the sample `key` from its members (extension → bytes), with status ok.

    place: for error messages. Raises ShardError if they are not that sample.
    """
    try:
        record = from_members(members)
    except DAMAGED as error:
        raise ShardError(f"{place} can't be read: {type(error).__name__}: {error}") from error
    if record.key != key:
        raise ShardError(f"{place}: the tar has sample {record.key} at its place")
    return record


def read_tar(tar: IO[bytes]) -> Iterator[Record]:
    """Yields the samples of an open, undamaged tar, in order, with status ok. Fields of NOT_IN_TARS
    have their defaults.
    """
    with tarfile.open(fileobj=tar, mode="r:") as archive:
        for key, group in groupby(archive, lambda member: member.name.partition(".")[0]):
            members = {}
            for member in group:
                stream = archive.extractfile(member)
                assert stream is not None, "a sample's members are files"
                members[member.name.partition(".")[2]] = stream.read()
            yield record_of(members, key, f"sample {key}")
