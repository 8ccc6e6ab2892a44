"""Settings of the trainer, each with its only default. Presets are in configs/train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Final, Literal

from configs.common import ALONE, PlacementConfig, WeightsConfig
from configs.common import check as _check
from configs.errors import ConfigError
from configs.ray_train import RayTrainConfig
from configs.schema import RayConfig

Part = Literal["projector", "facial_encoder", "identity_kv", "lora"]
# The parts of the adapter that can train, in the order of its files. identity_kv: the keys and
# values by which the UNet's cross-attention reads the ID tokens.
PARTS: Final[tuple[Part, ...]] = ("projector", "facial_encoder", "identity_kv", "lora")
_PRESETS: Final[Mapping[str, tuple[Part, ...]]] = {
    "full": PARTS,
    "paper": ("projector", "facial_encoder"),
    "projector_only": ("projector",),
}
# what a model without a part can't train
_LACKING: Final[Mapping[str, tuple[Part, ...]]] = {
    "projector": ("projector", "identity_kv"),
    "facial_encoder": ("facial_encoder",),
    "lora": ("lora",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PartRates:
    """Learning rates of parts; None: that of optim.learning_rate."""

    projector: float | None = None
    facial_encoder: float | None = None
    identity_kv: float | None = None
    lora: float | None = None

    def __post_init__(self) -> None:
        for name, rate in self.by_part().items():
            _check(rate > 0, f"optim.learning_rates.{name}={rate}: expected more than 0")

    def by_part(self) -> dict[str, float]:
        """Returns the rates that are not None, by part."""
        rates = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: rate for name, rate in rates.items() if rate is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule. Names are those of diffusers' training scripts."""

    # adamw8bit: its moments take 2 bytes for each parameter in place of 8; needs bitsandbytes
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    learning_rate: float = 1e-4
    # of single parts, as in optim.learning_rates.facial_encoder=1e-5
    learning_rates: PartRates = field(default_factory=PartRates)
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
class EmaConfig:
    """A moving average of the weights that train, which `final/` then holds."""

    decay: float = 0.0  # 0: no average. 0.9999 is usual for long runs
    on_cpu: bool = False  # spares the GPU's memory; each step copies it to the GPU and back

    def __post_init__(self) -> None:
        _check(0 <= self.decay < 1, f"ema.decay={self.decay}: expected 0 up to 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """Weights of the losses, noise, and dropout of conditions."""

    facial_weight: float = 0.01  # of the facial attention localisation loss (paper, section 3.3)
    mask_loss_prob: float = 0.5  # share of batches whose loss excludes the background
    # 0: no min-SNR weighting. For a base that predicts velocity, the weights fall with the SNR: if
    # its noise reaches an SNR of 0, the last 300 of 1,000 timesteps have 2 % of all weights
    snr_gamma: float = 0.0
    # Standard deviation of a number that is added to the noise of each channel of a sample, so that
    # pictures learn to be darker or brighter as a whole; 0.05 is usual (Guttenberg 2023)
    noise_offset: float = 0.0
    # Standard deviation of noise that is added to the latents beside what the model is to predict;
    # 0.1 in Ning et al. 2023, arXiv 2301.11706
    input_perturbation: float = 0.0
    # shares of samples trained without text, without identity, without both
    drop_text: float = 0.05
    drop_identity: float = 0.05
    drop_both: float | None = None  # None: 0.05, or in legacy mode the reference's 0.1
    # share of regions that are left out of a sample, each by itself: the noun then keeps the text's
    # token, and the localisation loss doesn't read it
    drop_region: float = 0.0

    def __post_init__(self) -> None:
        weights = ("facial_weight", "snr_gamma", "noise_offset", "input_perturbation")
        for name in ("drop_text", "drop_identity", "drop_both", *weights):
            value = getattr(self, name)
            _check(value is None or value >= 0, f"loss.{name}={value}: expected at least 0")
        for name in ("mask_loss_prob", "drop_region"):
            _check(
                0 <= getattr(self, name) <= 1,
                f"loss.{name}={getattr(self, name)}: expected 0 to 1",
            )

    def drops(self, *, legacy: bool) -> tuple[float, float, float]:
        """Returns the shares of samples without text, without identity, and without both; in legacy
        mode there are only those without text and photograph.
        """
        if legacy:
            return 0.0, 0.0, 0.1 if self.drop_both is None else self.drop_both
        return (
            self.drop_text,
            self.drop_identity,
            0.05 if self.drop_both is None else self.drop_both,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which model to train, and where its frozen parts come from."""

    spec: Literal["tiny", "small", "sd15", "sdxl"] = "sd15"
    mode: Literal["corrected", "legacy"] = "corrected"
    # parts of the adapter that are left out, to see what they are for: docs/training.md
    without: tuple[Literal["projector", "facial_encoder", "lora"], ...] = ()
    # hub id or folder in diffusers layout; "": the spec's default (tiny: created locally; small:
    # the one that comes with the project)
    base: str = ""
    image_encoder: str = ""  # hub id or folder; "": the spec's default
    # SDXL's conditioning on sizes. true: of each sample, the size of the source's image and the
    # place of the crop; fixed: of an image at the training resolution that isn't cropped
    sizes: Literal["true", "fixed"] = "true"
    device: str = "auto"

    def __post_init__(self) -> None:
        _check(
            len(set(self.without)) < 3,
            f"model.without={list(self.without)}: expected at most two, since nothing is left to "
            "train",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedConfig:
    """What of the adapter trains. The other parts stay as they were loaded or made."""

    # names of PARTS, or: full (all that the model has), paper (projector and facial_encoder),
    # projector_only
    parts: tuple[
        Literal[
            "full",
            "paper",
            "projector_only",
            "projector",
            "facial_encoder",
            "identity_kv",
            "lora",
        ],
        ...,
    ] = ("full",)

    def __post_init__(self) -> None:
        _check(bool(self.parts), "train.parts is empty: expected at least one part to train")

    def chosen(self, without: tuple[str, ...]) -> tuple[Part, ...]:
        """Returns the parts that train, in the order of PARTS.

        without: parts that the model lacks. Raises ConfigError if one of them is named; those that
        a preset includes are left out.
        """
        lacking = {part for name in without for part in _LACKING[name]}
        if wrong := [name for name in self.parts if name in lacking]:
            raise ConfigError(
                f"train.parts names {', '.join(wrong)}, which a model without {', '.join(without)} "
                "(model.without) doesn't have. Leave it out."
            )
        named = {part for name in self.parts for part in _PRESETS.get(name, (name,))}
        return tuple(part for part in PARTS if part in named - lacking)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource:
    """A data set to train on."""

    path: str = field(default="", metadata=ALONE)  # folder or fsspec URL
    # share of the samples that are trained on, in any unit: 3 and 1 are three quarters and one
    # quarter. None, for all data sets: the share is that of their numbers of samples.
    weight: float | None = None

    def __post_init__(self) -> None:
        _check(
            self.weight is None or self.weight > 0,
            f"data: weight {self.weight} of {self.path}: expected more than 0. To read none of a "
            "data set, leave it out.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationConfig:
    """What is measured and drawn of people on the validation side, every `validation_steps`."""

    samples: int = 32  # photographs, of different people, whose noise loss is measured
    portraits: int = 4  # people of whom portraits are drawn
    prompts: tuple[str, ...] = ("a photo of a person", "a portrait of a person, smiling")
    guidance_scale: float = 5.0
    num_inference_steps: int = 25

    def __post_init__(self) -> None:
        for name, least in (("samples", 2), ("portraits", 0), ("num_inference_steps", 1)):
            value = getattr(self, name)
            _check(value >= least, f"validation.{name}={value}: expected at least {least}")
        _check(bool(self.prompts), "validation.prompts is empty: expected at least one prompt")


@dataclass(frozen=True, slots=True, kw_only=True)
class FeaturesConfig:
    """Features of the frozen encoders, which `make features` stores beside a data set."""

    # what to compute. vae: mean and log variance of the training image's latents, 65 KB a sample at
    # 512 pixels. image: the image encoder's states of photograph and regions, 3.9 MB a sample with
    # CLIP ViT-H/14. text: the text encoders' states, 121 KB a sample with SD 1.5, 321 KB with SDXL
    kinds: tuple[Literal["vae", "image", "text"], ...] = ("vae",)
    # float32 gives the bits of a run that encodes each sample alone, if make features does so too
    # (placement.batch_size=1); float16 takes half the space
    dtype: Literal["float16", "float32"] = "float16"
    # whether training reads features that fit it; false: it encodes all samples
    use: bool = True
    executor: Literal["inline", "ray"] = "inline"  # runs `make features`
    ray: RayConfig = field(default_factory=RayConfig)
    stuck_after: float = 600.0  # seconds that a batch may take before a warning
    placement: PlacementConfig = field(default_factory=PlacementConfig)

    def __post_init__(self) -> None:
        _check(bool(self.kinds), "features.kinds is empty: expected some of vae, image, text")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """The settings of `python -m train.cli run`."""

    # one data set, as in data=OUT, or a list: [{path: OUT, weight: 3}, {path: OTHER, weight: 1}]
    data: tuple[DataSource, ...] = ()
    # which side of the data set's split
    split: Literal["train", "val", "all"] = "train"
    # share of samples whose conditions are another photograph of the same person, if there is one
    pair_prob: float = 0.0
    output: str = ""  # folder or fsspec URL
    # where a run whose output is a URL works; "": a folder in $CONSISTENTID_CACHE/train
    work_folder: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainedConfig = field(default_factory=TrainedConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    # start from this adapter: a checkpoint folder, .safetensors, a published .bin, or small: the
    # one that comes with the project
    adapter: str = ""
    # pixels, a multiple of what the base's VAE and UNet scale by together: 64 for Stable Diffusion
    resolution: int = 512
    # images are cropped to the nearest of several aspect ratios, which have about as many pixels as
    # the square of `resolution`, in place of that square; all samples of a step have one shape
    buckets: bool = False
    global_batch_size: int = 16  # samples of a step, over all processes, as in the paper
    # most samples that a process takes through the model together; what is left of its share of
    # the global batch follows in further micro-batches before the weights change
    micro_batch_size: int = 2
    gradient_checkpointing: bool = False
    # weights and images of UNet and VAE in the order that GPUs with tensor cores convolve fastest
    channels_last: bool = False
    # torch.compile of the UNet's transformer blocks, by this backend: inductor is the usual one
    compile: Literal["no", "inductor", "cudagraphs", "aot_eager"] = "no"
    max_train_steps: int = 10_000
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    seed: int = 0
    # only deterministic operations; false lets torch take faster ones, whose last bits vary on GPUs
    deterministic: bool = True
    threads: int = 0  # of torch on the CPU; 0: $OMP_NUM_THREADS, else all cores
    num_workers: int = 2  # processes that read samples
    # micro-batches that each of them requests while it prepares one; 0: none
    read_ahead: int = 8
    # samples of remote data sets that stay on the local disk, over all runs; 0: none
    cache_gb: float = 0.0
    cache_folder: str = ""  # "": samples/ in $CONSISTENTID_CACHE, else in ~/.cache/consistentid
    checkpointing_steps: int = 1000
    checkpoints_total_limit: int = 3  # 0: keep all
    # latest, a name, a folder or URL, or "": refuse an output that has checkpoints
    resume_from_checkpoint: str = "latest"
    # settings that may differ from those of the checkpoint, and data: other samples
    accept_changes: tuple[str, ...] = ()
    # steps between two validations, with one at the end; 0: none. They need two people on the
    # validation side of the data's split, and split=train
    validation_steps: int = 0
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    report_to: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    # steps between two log lines; reading the loss makes the CPU wait for the device
    log_every: int = 10
    log_keys: bool = False  # write the keys of every step's samples to OUT/keys.jsonl
    # prepared samples that each worker keeps in memory, for small data sets and many epochs
    keep_samples: int = 0
    # samples for which each process keeps the outputs of the frozen encoders in memory, for small
    # data sets. Set it to the number of samples or more: further samples are encoded in every
    # epoch, one at a time, which is slow
    keep_features: int = 0
    # compare each sample that is read with its digest
    verify_samples: bool = True
    # samples that can't be read are left out of the loss; the run stops if they are more than this
    # share of the data set
    max_bad_share: float = 0.001
    # an update whose gradient isn't finite is skipped; the run stops after this many in a row
    max_nonfinite_steps: int = 10
    ray: RayTrainConfig = field(default_factory=RayTrainConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)  # of the tiny base's vocabulary

    def __post_init__(self) -> None:
        positive = (
            "resolution",
            "global_batch_size",
            "micro_batch_size",
            "max_train_steps",
            "max_nonfinite_steps",
            "log_every",
        )
        for name in (*positive, "checkpointing_steps"):
            _check(getattr(self, name) > 0, f"{name}={getattr(self, name)}: expected at least 1")
        counts = (
            *("threads", "num_workers", "read_ahead", "checkpoints_total_limit"),
            "validation_steps",
        )
        for name in (*counts, "keep_samples", "keep_features", "cache_gb"):
            _check(getattr(self, name) >= 0, f"{name}={getattr(self, name)}: expected at least 0")
        _check(0 <= self.max_bad_share <= 1, f"max_bad_share={self.max_bad_share}: expected 0 to 1")
        _check(0 <= self.pair_prob <= 1, f"pair_prob={self.pair_prob}: expected 0 to 1")
        _check_sources(self.data)
        _check(
            not self.buckets or self.compile == "no",
            f"compile={self.compile}: with buckets=true, shapes change from step to step, and what "
            "is compiled would depend on their order. Set compile=no, or buckets=false.",
        )
        drops = sum(self.loss.drops(legacy=self.model.mode == "legacy"))
        _check(drops <= 1, f"loss.drop_* add up to {drops}: expected at most 1")
        self._check_parts()

    @property
    def trained_parts(self) -> tuple[Part, ...]:
        """The parts of the adapter that train, in the order of PARTS."""
        return self.train.chosen(self.model.without)

    def _check_parts(self) -> None:
        trained = self.trained_parts
        _check(
            bool(trained),
            f"train.parts={list(self.train.parts)} has nothing that the model has, since "
            f"model.without={list(self.model.without)}. Name other parts.",
        )
        for name in self.optim.learning_rates.by_part():
            _check(
                name in trained,
                f"optim.learning_rates.{name} is given, but {name} doesn't train (train.parts: "
                f"{', '.join(trained)}). Leave it out, or add the part.",
            )


def _check_sources(data: tuple[DataSource, ...]) -> None:
    paths = [source.path for source in data]
    twice = sorted({path for path in paths if paths.count(path) > 1})
    _check(not twice, f"data: {', '.join(twice)} is given twice. Raise its weight instead.")
    weighted = [source.path for source in data if source.weight is not None]
    _check(
        len(weighted) in (0, len(data)),
        f"data: weights are given for {', '.join(weighted)}, and not for "
        f"{', '.join(path for path in paths if path not in weighted)}. Give a weight to all data "
        "sets, or to none: then each is read in proportion to its number of samples.",
    )
