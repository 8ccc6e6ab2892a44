"""Settings of the data set pipeline, each with its only default.

`__post_init__` checks the values and raises ConfigError, so that a run with an impossible value
doesn't start. Presets in configs/dataset are YAML files for DatasetConfig; see
configs/load.py. Rules and the global pass are in configs/quality.py, captions in
configs/captions.py, the trainer's settings in configs/training.py, the generator's in
configs/portraits.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from configs.captions import CaptionConfig
from configs.common import NOT_HASHED, PlacementConfig, WeightsConfig
from configs.common import check as _check
from configs.quality import (
    ClaimsConfig,
    GlobalPassConfig,
    MeasureConfig,
    ReviewConfig,
    RightsConfig,
    RulesConfig,
    ThumbnailConfig,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """Where photographs come from, and the provenance of those for which the source states none."""

    # auto: by the path's ending
    kind: Literal["auto", "files", "webdataset", "parquet", "urls", "fgid"] = "auto"
    # folder (with its subfolders), glob, .tar, .parquet, .csv, .txt or FGID .json; or an fsspec URL
    path: str = ""
    # endings of images, in files and tars; GIF is read too, but its 256 colours make poor portraits
    extensions: tuple[str, ...] = (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".heic", ".heif", ".hif"),
        *(".tif", ".tiff", ".bmp"),
    )
    license: str = ""  # of inputs for which the source states none; so are the next two
    author: str = ""
    consent: str = ""  # of the people shown, in words or a code of your own
    # of files: the folder directly above a file names the person it shows, as in PERSON/001.jpg;
    # not in or below a folder whose name begins with _
    person_folder: bool = False
    tries: int = 4  # attempts to read an input, if the failures may be temporary
    backoff: float = 0.5  # seconds before the second attempt; about doubled before each further one
    find_copies: bool = True  # compare the bytes of inputs of equal size while planning
    # what a run does if samples would be lost because their inputs are gone or can't be read: stop
    # before it writes anything, keep these samples as they are, or drop them
    missing: Literal["stop", "keep", "drop"] = "stop"
    image_column: str = "image"  # of parquet: bytes, or a struct with `bytes`
    path_column: str = "path"  # of parquet without image column: file names relative to the table
    url_column: str = "url"  # of lists of URLs
    # of tables and lists: a unique name for each row; "": the URL, or FILE#ROW
    name_column: str = ""
    timeout: float = 20.0  # seconds to connect, and between two received parts
    downloads: int = 32  # at a time, by each reader
    allow_private: bool = False  # allow URLs of private, loopback and link-local addresses
    # use images whose server sends noai, noimageai, noindex or noimageindex
    ignore_robots: bool = False

    def __post_init__(self) -> None:
        bad = [e for e in self.extensions if not e.startswith(".") or e != e.lower()]
        _check(not bad, f"source.extensions: {bad}: expected lower case, with a dot, as in .jpg")
        _check(self.tries >= 1, f"source.tries={self.tries}: expected at least 1")
        _check(self.backoff >= 0, f"source.backoff={self.backoff}: expected at least 0 seconds")
        _check(self.timeout > 0, f"source.timeout={self.timeout}: expected more than 0 seconds")
        _check(1 <= self.downloads <= 256, f"source.downloads={self.downloads}: expected 1 to 256")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResizeConfig:
    """The size of stored images, and limits on the source's images."""

    # squash: size × size, as in the reference's mask script
    mode: Literal["short_side", "squash"] = "short_side"
    size: int = 512  # short side (squash: both), pixels; smaller images are enlarged
    max_aspect: float = 4.0  # long side over short side
    min_side: int = 64  # short side of the source, pixels
    max_bytes: int = 100_000_000  # of the encoded source
    max_pixels: int = 100_000_000  # as the header declares, checked before decoding
    jpeg_quality: int = 95
    placement: PlacementConfig = field(default_factory=PlacementConfig, metadata=NOT_HASHED)

    def __post_init__(self) -> None:
        _check(64 <= self.size <= 4096, f"resize.size={self.size}: expected 64 to 4096 pixels")
        _check(
            1 <= self.jpeg_quality <= 100,
            f"resize.jpeg_quality={self.jpeg_quality}: expected 1 to 100",
        )
        _check(self.max_aspect >= 1, f"resize.max_aspect={self.max_aspect}: expected at least 1")

    @property
    def largest(self) -> tuple[int, int]:
        """Short and long side of the largest resized image, pixels. Images that a source brings
        with label maps aren't resized.
        """
        aspect = 1.0 if self.mode == "squash" else self.max_aspect
        return self.size, round(self.size * aspect)


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectConfig:
    """Face detection, and which face is the main face."""

    backend: str = "scrfd"
    weights: str = "scrfd_500m_bnkps"
    # detector input sizes, pixels, tried in order until a face is found
    scales: tuple[int, ...] = (640, 320)
    # border added around the image, as a share of its longer side: close-ups need it
    pad: float = 0.125
    min_score: float = 0.5  # over 0, under 1
    # first: the first face in the detector's order, as in the reference
    select: Literal["largest", "first"] = "largest"
    device: str = field(default="auto", metadata=NOT_HASHED)  # auto, cpu or cuda
    placement: PlacementConfig = field(default_factory=PlacementConfig, metadata=NOT_HASHED)

    def __post_init__(self) -> None:
        _check(
            bool(self.scales),
            "detect.scales is empty: expected at least one detector size, for example [640, 320]",
        )
        bad = [s for s in self.scales if s % 32 or s <= 0]
        _check(not bad, f"detect.scales: {bad}: expected positive multiples of 32")
        _check(
            0 < self.min_score < 1, f"detect.min_score={self.min_score}: expected over 0, under 1"
        )
        _check(0 <= self.pad <= 1, f"detect.pad={self.pad}: expected 0 to 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParseConfig:
    """Face parsing, on the whole image and, for small faces, once more on the aligned face."""

    backend: str = "bisenet"
    weights: str = "parsing_bisenet"
    # whether to parse the aligned face too
    align: Literal["auto", "never", "always"] = "auto"
    # auto: if the face box's height is under this share of the image's
    align_below: float = 0.35
    size: int = 512  # side of the network's input, pixels
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = field(default="auto", metadata=NOT_HASHED)
    placement: PlacementConfig = field(default_factory=PlacementConfig, metadata=NOT_HASHED)

    def __post_init__(self) -> None:
        _check(self.size >= 32, f"parse.size={self.size}: expected at least 32 pixels")
        _check(self.align_below >= 0, f"parse.align_below={self.align_below}: expected at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedConfig:
    """Identity embeddings."""

    backend: str = "arcface"
    weights: str = "w600k_mbf"
    device: str = field(default="auto", metadata=NOT_HASHED)  # auto, cpu or cuda
    placement: PlacementConfig = field(default_factory=PlacementConfig, metadata=NOT_HASHED)


@dataclass(frozen=True, slots=True, kw_only=True)
class RayConfig:
    """The Ray executor."""

    address: str = ""  # "": $RAY_ADDRESS, else a new local cluster
    workers: int = 0  # copies of each actor group; 0: as many as fit
    object_store_mb: int = 500  # of a local cluster
    # after this many deaths of its worker, a shard is processed image by image in a child process
    deaths: int = 2

    def __post_init__(self) -> None:
        for name, least in (("workers", 0), ("object_store_mb", 80), ("deaths", 1)):
            value = getattr(self, name)
            _check(value >= least, f"ray.{name}={value}: expected at least {least}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetConfig:
    """The settings of `python -m pipelines.cli run`."""

    source: SourceConfig = field(default_factory=SourceConfig)
    output: str = ""  # folder or fsspec URL
    shard_size: int = 1000  # inputs of a shard; a change holds for new shards only
    executor: Literal["ray", "inline"] = "ray"
    threads: int = 0  # per model and process; 0: all cores for inline, one for each Ray worker
    # Seconds that a stage may take for eight images (or a batch, if that is larger). After that, a
    # message is logged. On Ray, the worker ends too: its shard is retried, and in the end processed
    # image by image, each with this limit.
    stuck_after: float = 600.0
    rights: RightsConfig = field(default_factory=RightsConfig)
    resize: ResizeConfig = field(default_factory=ResizeConfig)
    thumbnail: ThumbnailConfig = field(default_factory=ThumbnailConfig)
    detect: DetectConfig = field(default_factory=DetectConfig)
    parse: ParseConfig = field(default_factory=ParseConfig)
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    rules: RulesConfig = field(default_factory=RulesConfig)
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    claims: ClaimsConfig = field(default_factory=ClaimsConfig)
    review: ReviewConfig = field(default_factory=ReviewConfig)
    global_pass: GlobalPassConfig = field(default_factory=GlobalPassConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def __post_init__(self) -> None:
        _check(
            1 <= self.shard_size <= 100_000, f"shard_size={self.shard_size}: expected 1 to 100000"
        )
        _check(self.threads >= 0, f"threads={self.threads}: expected at least 0")
        _check(
            self.stuck_after > 0, f"stuck_after={self.stuck_after}: expected more than 0 seconds"
        )
