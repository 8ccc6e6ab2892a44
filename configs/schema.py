"""Settings of the data set pipeline, the trainer and the generator, each with its only default.

`__post_init__` checks the values and raises ConfigError, so that a run with an impossible value
doesn't start. Presets in configs/{dataset,train,infer} are YAML files for these classes; see
configs/load.py. Rules and the global pass are in configs/quality.py, captions in
configs/captions.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from configs.captions import CaptionConfig
from configs.common import NOT_HASHED, PlacementConfig
from configs.common import check as _check
from configs.quality import (
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
    extensions: tuple[str, ...] = (".jpg", ".jpeg", ".png", ".webp")
    license: str = ""  # of inputs for which the source states none; so are the next two
    author: str = ""
    consent: str = ""  # of the people shown, in words or a code of your own
    tries: int = 4  # attempts to read an input, if the failures may be temporary
    backoff: float = 0.5  # seconds before the second attempt; about doubled before each further one
    find_copies: bool = True  # compare the bytes of inputs of equal size while planning
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


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedConfig:
    """Identity embeddings."""

    backend: str = "arcface"
    weights: str = "w600k_mbf"
    placement: PlacementConfig = field(default_factory=PlacementConfig, metadata=NOT_HASHED)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsConfig:
    """Where weights files come from, and which licenses are allowed."""

    paths: tuple[str, ...] = ()  # NAME=FILE: use this file for that name in the weights table
    cache: str = ""  # "": $CONSISTENTID_CACHE, else ~/.cache/consistentid
    # commercial: refuse weights whose license doesn't allow commercial use
    allow: Literal["any", "commercial"] = "any"


@dataclass(frozen=True, slots=True, kw_only=True)
class RayConfig:
    """The Ray executor."""

    address: str = ""  # "": $RAY_ADDRESS, else a new local cluster
    workers: int = 0  # copies of each actor group; 0: as many as fit
    object_store_mb: int = 500  # of a local cluster
    # after this many deaths of its worker, a shard is processed image by image in a child process
    deaths: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetConfig:
    """The settings of `python -m pipelines.cli run`."""

    source: SourceConfig = field(default_factory=SourceConfig)
    output: str = ""  # folder or fsspec URL
    shard_size: int = 1000  # inputs of a shard
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
    review: ReviewConfig = field(default_factory=ReviewConfig)
    global_pass: GlobalPassConfig = field(default_factory=GlobalPassConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def __post_init__(self) -> None:
        _check(
            1 <= self.shard_size <= 100_000, f"shard_size={self.shard_size}: expected 1 to 100000"
        )
        _check(
            self.stuck_after > 0, f"stuck_after={self.stuck_after}: expected more than 0 seconds"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule. Names are those of diffusers' training scripts."""

    learning_rate: float = 1e-4
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-2
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    lr_scheduler: str = "constant_with_warmup"  # any name of diffusers.optimization.SchedulerType
    lr_warmup_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "adam_epsilon", "max_grad_norm"):
            _check(
                getattr(self, name) > 0, f"optim.{name}={getattr(self, name)}: expected more than 0"
            )
        for name in ("adam_beta1", "adam_beta2"):
            _check(
                0 <= getattr(self, name) < 1,
                f"optim.{name}={getattr(self, name)}: expected 0 up to 1",
            )
        _check(
            self.lr_warmup_steps >= 0,
            f"optim.lr_warmup_steps={self.lr_warmup_steps}: expected at least 0",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """Weights of the losses, and dropout of conditions."""

    facial_weight: float = 0.01  # of the facial attention localisation loss (paper, section 3.3)
    mask_loss_prob: float = 0.5  # share of batches whose loss excludes the background
    snr_gamma: float = 0.0  # 0: no min-SNR weighting
    # shares of samples trained without text, without identity, without both
    drop_text: float = 0.05
    drop_identity: float = 0.05
    drop_both: float = 0.05

    def __post_init__(self) -> None:
        total = self.drop_text + self.drop_identity + self.drop_both
        _check(0 <= total <= 1, f"loss.drop_* add up to {total}: expected 0 to 1")
        for name in ("drop_text", "drop_identity", "drop_both", "facial_weight", "snr_gamma"):
            _check(
                getattr(self, name) >= 0, f"loss.{name}={getattr(self, name)}: expected at least 0"
            )
        _check(
            0 <= self.mask_loss_prob <= 1,
            f"loss.mask_loss_prob={self.mask_loss_prob}: expected 0 to 1",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which model to train, and where its frozen parts come from."""

    spec: Literal["tiny", "sd15", "sdxl"] = "sd15"
    mode: Literal["corrected", "legacy"] = "corrected"
    # hub id or folder in diffusers layout; "": the spec's default (tiny: created locally)
    base: str = ""
    image_encoder: str = ""  # hub id or folder; "": the spec's default
    device: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """The settings of `python -m train.cli`."""

    data: str = ""  # a data set: folder or fsspec URL
    # which side of the data set's split
    split: Literal["train", "val", "all"] = "train"
    output: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    # start from this adapter: a checkpoint folder, .safetensors or a published .bin
    adapter: str = ""
    # train the UNet too; for the tiny base, which starts from random weights
    train_base: bool = False
    resolution: int = 512  # pixels, a multiple of 8
    train_batch_size: int = 2
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    max_train_steps: int = 10_000
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    seed: int = 0
    threads: int = 0  # of torch on the CPU; 0: $OMP_NUM_THREADS, else all cores
    num_workers: int = 2  # processes that read samples
    checkpointing_steps: int = 1000
    checkpoints_total_limit: int = 3  # 0: keep all
    # latest, a folder, or "": refuse an output that has checkpoints
    resume_from_checkpoint: str = "latest"
    report_to: Literal["tensorboard", "none"] = "tensorboard"
    # steps between two log lines; reading the loss makes the CPU wait for the device
    log_every: int = 10
    # prepared samples that each worker keeps in memory, for small data sets and many epochs
    keep_samples: int = 0
    weights: WeightsConfig = field(default_factory=WeightsConfig)  # of the tiny base's vocabulary

    def __post_init__(self) -> None:
        positive = (
            "resolution",
            "train_batch_size",
            "gradient_accumulation_steps",
            "max_train_steps",
            "log_every",
        )
        for name in (*positive, "checkpointing_steps"):
            _check(getattr(self, name) > 0, f"{name}={getattr(self, name)}: expected at least 1")
        for name in ("threads", "num_workers", "checkpoints_total_limit", "keep_samples"):
            _check(getattr(self, name) >= 0, f"{name}={getattr(self, name)}: expected at least 0")
        _check(self.resolution % 8 == 0, f"resolution={self.resolution}: expected a multiple of 8")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedModelConfig:
    """The model of an adapter. The adapter states its spec and mode; another value than auto makes
    a run with a different adapter fail.
    """

    spec: Literal["auto", "tiny", "sd15", "sdxl"] = "auto"
    mode: Literal["auto", "corrected", "legacy"] = "auto"
    # hub id or folder in diffusers layout; "": the spec's default (tiny: base/ beside the adapter's
    # folder)
    base: str = ""
    # hub id or folder; "": image_encoder/ of a local base, else the spec's default
    image_encoder: str = ""
    variant: str = ""  # of the base's files, as in diffusers, for example fp16
    device: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionStrength:
    """The weight of the photograph in each region's token: 0 (the word alone) to 1 (fully fused
    with the region's image).
    """

    face: float = 1.0
    ears: float = 1.0
    eyes: float = 1.0
    nose: float = 1.0
    mouth: float = 1.0

    def __post_init__(self) -> None:
        for name in ("face", "ears", "eyes", "nose", "mouth"):
            value = getattr(self, name)
            _check(0 <= value <= 1, f"region_strength.{name}={value}: expected 0 to 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class InferConfig:
    """The settings of `python -m infer.cli`."""

    model: AdaptedModelConfig = field(default_factory=AdaptedModelConfig)
    adapter: str = ""  # a checkpoint folder, .safetensors or a published .bin
    # configuration of the stages that process the photograph; "": the one in the checkpoint
    dataset: str = ""
    photo: str = ""
    identity: str = ""  # an identity.safetensors of an earlier run, in place of a photo
    prompts: tuple[str, ...] = ()
    output: str = "runs/portraits"
    overwrite: bool = False  # replace portraits in `output` that have another configuration
    prompt_template: str = "{prompt}"
    negative_prompt: str = ""
    scheduler: str = "EulerDiscreteScheduler"  # any of diffusers' schedulers, by class name
    num_inference_steps: int = 50
    # steps up to this one use the plain text, later ones the text with fused regions
    start_merge_step: int = 30
    guidance_scale: float = 5.0
    height: int = 768
    width: int = 512
    num_images_per_prompt: int = 1
    # portraits generated together; more is faster on a GPU and may change the last bit
    batch_size: int = 1
    id_scale: float = 1.0  # weight of the ID tokens' attention
    region_strength: RegionStrength = field(default_factory=RegionStrength)
    merge_lora: bool = True  # add the adapter's LoRA to the UNet's weights: faster steps
    seed: int = 2024
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        for name in ("num_inference_steps", "num_images_per_prompt", "batch_size"):
            _check(getattr(self, name) > 0, f"{name}={getattr(self, name)}: expected at least 1")
        _check(
            self.guidance_scale >= 1, f"guidance_scale={self.guidance_scale}: expected at least 1"
        )
        for name in ("height", "width"):
            value = getattr(self, name)
            _check(value > 0 and value % 8 == 0, f"{name}={value}: expected a multiple of 8")
        _check(
            0 <= self.start_merge_step <= self.num_inference_steps,
            f"start_merge_step={self.start_merge_step}: expected 0 to "
            f"num_inference_steps={self.num_inference_steps}; "
            "a later step would never fuse the facial regions",
        )
        _check(self.id_scale >= 0, f"id_scale={self.id_scale}: expected at least 0")
        _check(
            "{prompt}" in self.prompt_template,
            f"prompt_template={self.prompt_template!r}: expected a text with {{prompt}} in it",
        )
        _check(
            not (self.photo and self.identity),
            "photo and identity are both given: give one of them",
        )
