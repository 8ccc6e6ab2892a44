"""Images in WebDataset tars: one input for each sample with an image, read by one range request.

Planning reads the tar headers and the .json members only. Nothing is unpacked to disk: a member's
name is used for its record's name alone.
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
from pipelines.sources.name_set import NameSet
from pipelines.sources.paths import (
    ContainerSource,
    SourceFile,
    find_files,
    provenance_json,
    read_range,
    to_unicode,
)
from stages.base import Failed

# (sample name, extension), split as webdataset splits them: at the first dot of the base name
_SAMPLE_NAME: Final = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_MAX_HEADER: Final = 1 << 20  # bytes; a larger header is damaged or malicious
_MAX_JSON: Final = 1 << 18  # bytes; a larger .json isn't read for provenance
# what tarfile's parsers raise for damaged headers
_PARSE_ERRORS: Final = (tarfile.TarError, ValueError, LookupError, OverflowError, RecursionError)


@dataclass(slots=True)
class _Sample:
    """The members of one sample that have been read so far."""

    name: str = ""
    provenance: str = ""
    # NAME.jpg; more than one if the tar contains two members with this name
    images: list[tarfile.TarInfo] = field(default_factory=list)
    # NAME.more.jpg: inputs only if there is no NAME.jpg
    suffixed_images: list[tarfile.TarInfo] = field(default_factory=list)

    def inputs(self, file: SourceFile) -> Iterator[Input]:
        for member in self.images or self.suffixed_images:
            yield _input(file, self, member)


class WebDataset(ContainerSource):
    """Tars, local or behind an fsspec URL. A sample's provenance comes from its .json.

    A truncated or damaged tar yields its complete samples, and one input of the tar's own name
    that fails with `truncated_tar` or `damaged_tar`.
    """

    def list(self) -> Iterator[Input]:
        for file in find_files(self.config.path, (".tar",), self.output):
            with file.open() as stream:
                yield from _with_unique_names(file, self._inputs(file, stream))

    def _inputs(self, file: SourceFile, stream: IO[bytes]) -> Iterator[Input]:
        sample = _Sample()
        tar_failure: Failed | None = None
        try:
            for member in _members(stream):
                match = _SAMPLE_NAME.fullmatch(member.name)
                if match is None:
                    continue
                name, extension = match.groups()
                if name != sample.name:
                    yield from sample.inputs(file)
                    sample = _Sample(name)
                self._add(sample, member, f".{extension.lower()}", stream)
        except Failed as failure:
            tar_failure = failure
        yield from sample.inputs(file)
        if tar_failure is not None:
            yield _failed_input(file, file.name, tar_failure.reason, tar_failure.detail)

    def _add(
        self, sample: _Sample, member: tarfile.TarInfo, extension: str, stream: IO[bytes]
    ) -> None:
        if extension in self.config.extensions:
            if not sample.images or sample.images[0].name == member.name:
                sample.images.append(member)
        elif extension[extension.rindex(".") :] in self.config.extensions:
            sample.suffixed_images.append(member)
        elif extension == ".json" and _is_regular(member) and member.size <= _MAX_JSON:
            stream.seek(member.offset_data)
            try:
                sample.provenance = provenance_json(json.loads(stream.read(member.size)))
            except (ValueError, RecursionError):
                return  # a broken .json doesn't make its image unusable

    def read(self, item: Input, count: int = -1) -> bytes:
        """Raises Failed: truncated_tar, damaged_tar, duplicate_name, outside_source, not_a_file,
        unreadable, too_many_bytes; TransientFailure: unreachable.
        """
        locator = json.loads(item.locator)
        if "reason" in locator:
            raise Failed(locator["reason"], locator["detail"])
        if item.size > self.max_bytes:
            raise Failed("too_many_bytes", f"{item.size:,} bytes, limit {self.max_bytes:,}")
        length = item.size if count < 0 else min(count, item.size)
        if not length:
            return b""
        start = locator["offset"]
        data = read_range(self._fs, locator["tar"], start, start + length)
        if len(data) != length:
            raise Failed(
                "unreadable",
                f"asked for {length:,} bytes, got {len(data):,}: the tar has changed, or its "
                "server sends it whole only",
            )
        return data


def _with_unique_names(file: SourceFile, items: Iterable[Input]) -> Iterator[Input]:
    """Yields `items`. One whose name occurred before in the tar gets a new name, and fails with
    `duplicate_name`.
    """
    numbers = itertools.count(1)
    with NameSet() as names:
        for item in items:
            name = item.source
            while not names.add(name):
                name = f"{item.source} (again, {next(numbers)})"
            if name == item.source:
                yield item
            else:
                detail = f"another {item.source} stands before it in the tar"
                yield _failed_input(file, name, "duplicate_name", detail)


def _input(file: SourceFile, sample: _Sample, member: tarfile.TarInfo) -> Input:
    name = f"{file.name}/{to_unicode(member.name.removeprefix('./'))}"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return _failed_input(file, name, "outside_source", "an absolute name, or one with ..")
    if not _is_regular(member):
        detail = "a link, folder, device or sparse file in the tar"
        return _failed_input(file, name, "not_a_file", detail)
    locator = {"tar": file.path, "offset": member.offset_data}
    return Input(
        source=name,
        locator=json.dumps(locator).encode(),
        size=member.size,
        version=file.version,
        provenance=sample.provenance,
    )


def _failed_input(file: SourceFile, name: str, reason: str, detail: str) -> Input:
    """Returns an input whose `read` raises Failed with `reason`."""
    locator = json.dumps({"reason": reason, "detail": detail}).encode()
    return Input(source=name, locator=locator, version=file.version)


def _is_regular(member: tarfile.TarInfo) -> bool:
    return member.isreg() and not member.issparse()


class _HeaderStream(io.RawIOBase):
    """Passes tarfile's reads on to `stream`; refuses headers that claim more than _MAX_HEADER."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__()
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._stream.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()


def _members(stream: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """Yields the members whose data is complete, in order.

    Afterwards raises Failed: truncated_tar if the file ends too early, damaged_tar if something in
    it is no tar header.
    """
    end, previous_offset = stream.seek(0, io.SEEK_END), -1
    stream.seek(0)
    try:
        with tarfile.open(fileobj=_HeaderStream(stream), mode="r:") as tar:
            while (member := tar.next()) is not None:
                # tarfile keeps every member in this list; empty it to bound memory
                tar.members = []  # type: ignore[attr-defined]
                if member.size < 0 or member.offset <= previous_offset:
                    raise tarfile.ReadError("a size below zero")
                if member.offset_data + member.size > end:
                    name = to_unicode(member.name)
                    raise Failed("truncated_tar", f"the file ends in the middle of {name}")
                previous_offset = member.offset
                yield member
            stream.seek(tar.offset)
            block = stream.read(tarfile.BLOCKSIZE)
    except _PARSE_ERRORS as error:
        if stream.tell() < end:
            raise Failed("damaged_tar", f"{type(error).__name__}: {error}") from None
        block = b""
    if len(block) < tarfile.BLOCKSIZE:
        raise Failed("truncated_tar", "the file ends without the mark of a tar's end")
    if any(block):
        raise Failed("damaged_tar", "what follows the last member is no header")
