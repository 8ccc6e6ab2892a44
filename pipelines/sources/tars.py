"""Pictures in WebDataset tars: one input for each sample that has one, read by a single ranged
read.

Planning walks the headers alone. Nothing of a tar is ever unpacked: a member's name only names its
record.
"""

from __future__ import annotations

import io
import itertools
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, Final

from pipelines.sources.base import Input
from pipelines.sources.paths import Found, InsideFiles, facts_of, find_files, read_range, text
from pipelines.sources.seen import Seen
from stages.base import Failed

# sample, extension: as webdataset splits it
_NAME: Final = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_HEADER: Final = 1 << 20  # bytes; no honest header is larger
_JSON: Final = 1 << 18  # bytes of a sample's .json that is read for its facts
# of tarfile's parsers
_BROKEN: Final = (tarfile.TarError, ValueError, LookupError, OverflowError, RecursionError)


@dataclass(slots=True)
class _Sample:
    name: str = ""
    facts: str = ""
    # NAME.jpg; more than one only of the very same name
    exact: list[tarfile.TarInfo] = field(default_factory=list)
    # NAME.more.jpg, where there is no NAME.jpg
    others: list[tarfile.TarInfo] = field(default_factory=list)

    @property
    def pictures(self) -> list[tarfile.TarInfo]:
        return self.exact or self.others


class WebDataset(InsideFiles):
    """Tars here or behind an fsspec URL. A sample's FACTS come from its .json."""

    def list(self) -> Iterator[Input]:
        for file in find_files(self.config.path, (".tar",), self.output):
            with file.open() as stream:
                yield from _named_apart(file, self._inputs(file, stream))

    def _inputs(self, file: Found, stream: IO[bytes]) -> Iterator[Input]:
        sample = _Sample()
        try:
            for member in _members(stream):
                match = _NAME.fullmatch(member.name)
                if match is None:
                    continue
                name, extension = match.groups()
                if name != sample.name:
                    yield from (_input(file, sample, picture) for picture in sample.pictures)
                    sample = _Sample(name)
                self._add(sample, member, f".{extension.lower()}", stream)
        except Failed as verdict:
            ended: Input | None = _ended(file, file.name, verdict.reason, verdict.detail)
        else:
            ended = None
        yield from (_input(file, sample, picture) for picture in sample.pictures)
        if ended is not None:
            yield ended

    def _add(
        self, sample: _Sample, member: tarfile.TarInfo, extension: str, stream: IO[bytes]
    ) -> None:
        if extension in self.config.extensions:
            if not sample.exact or sample.exact[0].name == member.name:
                sample.exact.append(member)
        elif extension[extension.rindex(".") :] in self.config.extensions:
            sample.others.append(member)
        elif extension == ".json" and _is_plain(member) and member.size <= _JSON:
            stream.seek(member.offset_data)
            try:
                sample.facts = facts_of(json.loads(stream.read(member.size)))
            except (ValueError, RecursionError):
                return  # no fault of the picture's

    def read(self, item: Input, count: int = -1) -> bytes:
        """Raises Failed: truncated_tar, damaged_tar, duplicate_name, outside_source, not_a_file,
        unreadable, too_many_bytes; Transient: unreachable.
        """
        place = json.loads(item.locator)
        if "reason" in place:
            raise Failed(place["reason"], place["detail"])
        if item.size > self.limit:
            raise Failed("too_many_bytes", f"{item.size:,} bytes, limit {self.limit:,}")
        length = item.size if count < 0 else min(count, item.size)
        if not length:
            return b""
        data = read_range(self._fs, place["tar"], place["offset"], place["offset"] + length)
        if len(data) != length:
            raise Failed(
                "unreadable",
                f"asked for {length:,} bytes, got {len(data):,}: the tar has changed, or "
                "its server sends it whole only",
            )
        return data


def _named_apart(file: Found, items: Iterable[Input]) -> Iterator[Input]:
    """`items`, but where a name stands in the tar again, the later one is ended, under a name of
    its own.
    """
    numbers = itertools.count(1)
    with Seen() as seen:
        for item in items:
            name = item.source
            while not seen.add(name):
                name = f"{item.source} (again, {next(numbers)})"
            if name == item.source:
                yield item
            else:
                yield _ended(
                    file,
                    name,
                    "duplicate_name",
                    f"another {item.source} stands before it in the tar",
                )


def _input(file: Found, sample: _Sample, member: tarfile.TarInfo) -> Input:
    name = f"{file.name}/{text(member.name.removeprefix('./'))}"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return _ended(file, name, "outside_source", "an absolute name, or one with ..")
    if not _is_plain(member):
        return _ended(file, name, "not_a_file", "a link, folder, device or sparse file in the tar")
    place = {"tar": file.path, "offset": member.offset_data}
    return Input(
        source=name,
        locator=json.dumps(place).encode(),
        size=member.size,
        version=file.version,
        facts=sample.facts,
    )


def _ended(file: Found, name: str, reason: str, detail: str) -> Input:
    locator = json.dumps({"reason": reason, "detail": detail}).encode()
    return Input(source=name, locator=locator, version=file.version)


def _is_plain(member: tarfile.TarInfo) -> bool:
    return member.isreg() and not member.issparse()


class _Headers(io.RawIOBase):
    """What tarfile reads headers through: a header that claims to be huge is refused, not read."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__()
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._stream.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()


def _members(stream: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """The members whose data is all there, in order.

    Raises Failed after the last of them: truncated_tar where the file ends too early, damaged_tar
    where something stands in it that is no tar.
    """
    end, last = stream.seek(0, io.SEEK_END), -1
    stream.seek(0)
    try:
        with tarfile.open(fileobj=_Headers(stream), mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined] # it would keep them all
                if member.size < 0 or member.offset <= last:
                    raise tarfile.ReadError("a size below zero")
                if member.offset_data + member.size > end:
                    raise Failed(
                        "truncated_tar", f"the file ends in the middle of {text(member.name)}"
                    )
                last = member.offset
                yield member
            stream.seek(tar.offset)
            block = stream.read(tarfile.BLOCKSIZE)
    except _BROKEN as error:
        if stream.tell() < end:
            raise Failed("damaged_tar", f"{type(error).__name__}: {error}") from None
        block = b""
    if len(block) < tarfile.BLOCKSIZE:
        raise Failed("truncated_tar", "the file ends without the mark of a tar's end")
    if any(block):
        raise Failed("damaged_tar", "what follows the last member is no header")
