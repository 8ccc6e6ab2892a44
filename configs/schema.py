"""Every setting of the data set pipeline, the trainer and the generator, with its only default.

Values are checked in `__post_init__`: an impossible one raises ConfigError when it is given, not
hours later. Presets under configs/{dataset,train,infer} are YAML over these classes; see
configs/load.py. Rules and the global pass are in configs/quality.py, captions in
configs/captions.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from configs.captions import CaptionConfig
from configs.common import NO_ANSWER, PlacementConfig
from configs.common import check as _check
from configs.quality import (
    GlobalPassConfig,
    MeasureConfig,
    ReviewConfig,
    RightsConfig,
    RulesConfig,
    ThumbnailConfig,
)

# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """Where photographs come from, and what is stated of all of them."""

    # auto: by the path's ending
    kind: Literal["auto", "files", "webdataset", "parquet", "urls", "fgid"] = "auto"
    # folder (searched at any depth), glob, .tar, .parquet, .csv, .txt or FGID .json; or an fsspec
    # URL
    path: str = ""
    extensions: tuple[str, ...] = (".jpg", ".jpeg", ".png", ".webp")
    license: str = ""  # where the source itself doesn't state one
    author: str = ""
    # what is stated of the consent of the people shown, in words or a code of your own
    consent: str = ""
    tries: int = 4  # of reading an input, where the failure may pass
    backoff: float = 0.5  # seconds before the second try; about doubled before each further one
    find_copies: bool = True  # compare bytes of inputs of equal size while planning
    image_column: str = "image"  # of parquet: bytes, or a struct with `bytes`
    path_column: str = "path"  # of parquet: file names relative to it, where it has no image column
    url_column: str = "url"  # of lists of URLs
    # of tables and lists: a unique name for each row; "": the URL, or FILE#ROW
    name_column: str = ""
    timeout: float = 20.0  # seconds without a byte, and for connecting
    downloads: int = 32  # at a time, by each reader
    allow_private: bool = False  # URLs that lead to private, loopback and link-local addresses
    # take pictures whose server says noai, noimageai, noindex or noimageindex
    ignore_robots: bool = False

    def __post_init__(self) -> None:
        bad = [e for e in self.extensions if not e.startswith(".") or e != e.lower()]
        _check(
            not bad, f"source.extensions: {bad} must be lower-case and start with a dot, as in .jpg"
        )
        _check(self.tries >= 1, f"source.tries={self.tries}: expected at least 1")
        _check(self.backoff >= 0, f"source.backoff={self.backoff}: expected at least 0 seconds")
        _check(self.timeout > 0, f"source.timeout={self.timeout}: expected more than 0 seconds")
        _check(1 <= self.downloads <= 256, f"source.downloads={self.downloads}: expected 1 to 256")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResizeConfig:
    # squash: size × size, as the reference's mask script
    mode: Literal["short_side", "squash"] = "short_side"
    size: int = 512  # short side (or both), pixels; smaller pictures are enlarged
    max_aspect: float = 4.0  # long side over short side
    min_side: int = 64  # short side of the source, pixels
    max_bytes: int = 100_000_000  # of the encoded source
    max_pixels: int = 100_000_000  # declared by the header, checked before decoding
    jpeg_quality: int = 95
    placement: PlacementConfig = field(default_factory=PlacementConfig, metadata=NO_ANSWER)

    def __post_init__(self) -> None:
        _check(64 <= self.size <= 4096, f"resize.size={self.size}: expected 64 to 4096 pixels")
        _check(
            1 <= self.jpeg_quality <= 100,
            f"resize.jpeg_quality={self.jpeg_quality}: expected 1 to 100",
        )
        _check(self.max_aspect >= 1, f"resize.max_aspect={self.max_aspect}: expected at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectConfig:
    backend: str = "scrfd"
    weights: str = "scrfd_500m_bnkps"
    # detector input sizes, tried in order until a face is found
    scales: tuple[int, ...] = (640, 320)
    pad: float = 0.125  # border around the picture, in parts of its longer side: close-ups need it
    min_score: float = 0.5
    # first: the detector's own order, as the reference
    select: Literal["largest", "first"] = "largest"
    placement: PlacementConfig = field(default_factory=PlacementConfig, metadata=NO_ANSWER)

    def __post_init__(self) -> None:
        _check(
            bool(self.scales),
            "detect.scales is empty: give at least one detector size, as in [640, 320]",
        )
        bad = [s for s in self.scales if s % 32 or s <= 0]
        _check(not bad, f"detect.scales: {bad} must be positive multiples of 32")
        _check(
            0 < self.min_score < 1, f"detect.min_score={self.min_score}: expected between 0 and 1"
        )
        _check(0 <= self.pad <= 1, f"detect.pad={self.pad}: expected 0 to 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParseConfig:
    backend: str = "bisenet"
    weights: str = "parsing_bisenet"
    align: Literal["auto", "never", "always"] = "auto"
    # auto: align where the face box's height is under this part of the picture's
    align_below: float = 0.35
    size: int = 512  # network input, pixels
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = field(default="auto", metadata=NO_ANSWER)
    placement: PlacementConfig = field(default_factory=PlacementConfig, metadata=NO_ANSWER)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedConfig:
    backend: str = "arcface"
    weights: str = "w600k_mbf"
    placement: PlacementConfig = field(default_factory=PlacementConfig, metadata=NO_ANSWER)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsConfig:
    paths: tuple[str, ...] = ()  # NAME=FILE: use this file for that name in the weights table
    cache: str = ""  # "": $CONSISTENTID_CACHE, else ~/.cache/consistentid
    allow: Literal["any", "commercial"] = "any"  # commercial: refuse weights whose licence is not


@dataclass(frozen=True, slots=True, kw_only=True)
class RayConfig:
    address: str = ""  # "": $RAY_ADDRESS, else a local cluster of its own
    workers: int = 0  # copies of each actor group; 0: as many as fit
    object_store_mb: int = 500  # local cluster only
    # a shard whose worker died this often is processed picture by picture in a child process
    deaths: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetConfig:
    """`python -m pipelines.cli run`."""

    source: SourceConfig = field(default_factory=SourceConfig)
    output: str = ""
    shard_size: int = 1000
    executor: Literal["ray", "inline"] = "ray"
    threads: int = 0  # per model and process; 0: cores for inline, one for each Ray worker
    stuck_after: float = (
        # seconds that a stage may take over eight pictures (or a batch); then it is said, and on
        600.0
    )
    # Ray the worker ends, the shard is tried again, and at last picture by picture, each with this
    # limit
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


# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule; names as in diffusers' training scripts."""

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
    facial_weight: float = 0.01  # of the facial attention localisation loss (paper, section 3.3)
    mask_loss_prob: float = 0.5  # share of batches whose loss leaves the background out
    snr_gamma: float = 0.0  # 0: no min-SNR weighting
    drop_text: float = 0.05  # per sample: text alone, identity alone, both
    drop_identity: float = 0.05
    drop_both: float = 0.05

    def __post_init__(self) -> None:
        total = self.drop_text + self.drop_identity + self.drop_both
        _check(0 <= total <= 1, f"loss.drop_*: they add up to {total}, expected 0 to 1")
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
    """Which model, and where its frozen parts come from."""

    spec: Literal["tiny", "sd15", "sdxl"] = "sd15"
    mode: Literal["corrected", "legacy"] = "corrected"
    base: str = ""  # hub id or folder in diffusers layout; "": the spec's own (tiny: made locally)
    image_encoder: str = ""  # hub id or folder; "": the spec's own
    device: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """`python -m train.cli`."""

    data: str = ""  # OUT of make dataset: a folder or an fsspec URL
    # which side of the data set's split by identity
    split: Literal["train", "val", "all"] = "train"
    output: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    # start from this adapter: a checkpoint folder, .safetensors or a published .bin
    adapter: str = ""
    # train the UNet too: for the tiny base, which starts from random weights
    train_base: bool = False
    resolution: int = 512
    train_batch_size: int = 2
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    max_train_steps: int = 10_000
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    seed: int = 0
    threads: int = 0  # of torch on the CPU; 0: as OMP_NUM_THREADS says, else all cores
    num_workers: int = 2
    checkpointing_steps: int = 1000
    checkpoints_total_limit: int = 3  # 0: keep all
    # latest, a folder, or "" to refuse an output that has checkpoints
    resume_from_checkpoint: str = "latest"
    report_to: Literal["tensorboard", "none"] = "tensorboard"
    # steps between two looks at the loss: between them nothing waits for the device
    log_every: int = 10
    # prepared samples kept in memory by each worker: for sets seen many times over
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


# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedModelConfig:
    """The model behind an adapter: what it is, the adapter says; naming it here only guards against
    another one.
    """

    spec: Literal["auto", "tiny", "sd15", "sdxl"] = "auto"
    mode: Literal["auto", "corrected", "legacy"] = "auto"
    # hub id or folder in diffusers layout; "": the spec's own (tiny: base/ beside the adapter's
    # folder)
    base: str = ""
    # hub id or folder; "": image_encoder/ of a local base, else the spec's own
    image_encoder: str = ""
    variant: str = ""  # of the base's files, as in diffusers: fp16, …
    device: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionStrength:
    """How far each region's token goes from the word alone (0) to the word fused with the
    photograph's region (1).
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
    """`python -m infer.cli`."""

    model: AdaptedModelConfig = field(default_factory=AdaptedModelConfig)
    adapter: str = ""  # a checkpoint folder, .safetensors or a published .bin
    # configuration of the stages that read the photograph; "": the one kept in the checkpoint
    dataset: str = ""
    photo: str = ""
    identity: str = ""  # an identity.safetensors that an earlier run saved, in place of a photo
    prompts: tuple[str, ...] = ()
    output: str = "runs/portraits"
    overwrite: bool = False  # replace the portraits of another configuration in `output`
    prompt_template: str = "{prompt}"
    negative_prompt: str = ""
    scheduler: str = "EulerDiscreteScheduler"  # any of diffusers' schedulers, by class name
    num_inference_steps: int = 50
    # steps up to this one see the plain text, later ones the facial prompt
    start_merge_step: int = 30
    guidance_scale: float = 5.0
    height: int = 768
    width: int = 512
    num_images_per_prompt: int = 1
    # portraits made together; more is faster on a GPU and may change the last bit
    batch_size: int = 1
    id_scale: float = 1.0  # strength of the ID tokens' attention
    region_strength: RegionStrength = field(default_factory=RegionStrength)
    merge_lora: bool = True  # the adapter's LoRA goes into the UNet's weights: faster steps
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
            f"num_inference_steps={self.num_inference_steps}, "
            "or the facial regions would never be fused in",
        )
        _check(self.id_scale >= 0, f"id_scale={self.id_scale}: expected at least 0")
        _check("{prompt}" in self.prompt_template, "prompt_template must hold {prompt}")
        _check(
            not (self.photo and self.identity),
            "photo and identity are both given; give one of them",
        )
