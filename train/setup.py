"""The setup of a run: checks of the configuration; models, optimizer, schedule, preparation."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from configs.errors import ConfigError, WeightsError
from configs.training import OptimConfig, TrainConfig
from model.checkpoint import CONFIG_FILE, load_adapter
from model.conditions import DropRates
from model.consistentid import ConsistentID, load_base
from model.spec import ModelSpec
from stages.backends.weights import default_cache
from stages.storage.remote import refuse_credentials
from train.cache import SampleCache
from train.data import Preparation
from train.step import Frozen, TrainedModel, freeze

# Settings that may differ when a run is resumed. Others would change the model that it makes. A
# name that ends in a dot stands for all settings below it. Of data, the digest of the samples is
# compared, which depends on the weights.
_MAY_CHANGE: Final = (
    "data",
    "output",
    "model.device",
    "max_train_steps",
    "micro_batch_size",
    "max_bad_share",
    "max_nonfinite_steps",
    "verify_samples",
    "gradient_checkpointing",
    "mixed_precision",
    "threads",
    "num_workers",
    "read_ahead",
    "cache_gb",
    "cache_folder",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "report_to",
    "log_every",
    "keep_samples",
    "weights.",
)
_DTYPES: Final = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def check_config(config: TrainConfig) -> None:
    """Raises ConfigError for settings that are wrong whatever the data and the models are."""
    sources = [source.path for source in config.data]
    for url in (*sources, config.output, config.adapter, config.model.base):
        refuse_credentials(url)
    if not sources or not all(sources):
        raise ConfigError("data is empty. Set data=OUT, the output of make dataset.")
    if not config.output:
        raise ConfigError(
            "output is empty. Set output=FOLDER, the folder for checkpoints and the adapter."
        )
    if "://" in config.output:
        raise ConfigError(
            f"output={config.output}: expected a local folder. Train to one, then copy it."
        )
    if config.model.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"model.device={config.model.device}: expected auto, cpu or cuda")
    if config.model.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "model.device=cuda, but torch finds no GPU. Set model.device=auto, or install a torch "
            "with CUDA and its driver."
        )
    make_optimizer(config.optim, config.max_train_steps, [nn.Parameter(torch.zeros(1))])


def check_same_run(config: TrainConfig, checkpoint: Path) -> None:
    """Raises ConfigError if `config` would make another model than the run that wrote the
    checkpoint, WeightsError if the checkpoint doesn't state that run's settings.
    """
    before, now = flatten(_settings_of(checkpoint)), flatten(asdict(config))
    changes = [
        f"{key}={before.get(key)!r}, now {now[key]!r}"
        for key in now
        if now[key] != before.get(key) and not key.startswith(_MAY_CHANGE)
    ]
    if changes:
        raise ConfigError(
            f"{checkpoint} was made with other settings: {'; '.join(changes)}. Use the same "
            "settings, or another output."
        )


def _settings_of(checkpoint: Path) -> dict[str, Any]:
    """Returns the settings of the run that wrote a checkpoint, from its adapter.json."""
    path = checkpoint / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["train"]
        settings: dict[str, Any] = {key: values[key] for key in values}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{path} doesn't state the settings of its run ({type(error).__name__}: {error}). "
            "Resume from another checkpoint."
        ) from error
    return settings


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Returns nested settings with dotted keys, and lists as text."""
    items: dict[str, str | int | float | bool] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            items.update(flatten(value, f"{prefix}{key}."))
        else:
            items[f"{prefix}{key}"] = (
                value if isinstance(value, str | int | float | bool) else str(value)
            )
    return items


def sample_cache(config: TrainConfig) -> SampleCache | None:
    """Returns the configured cache for samples of remote data sets; None if there is none."""
    if not config.cache_gb:
        return None
    folder = Path(config.cache_folder) if config.cache_folder else default_cache("samples")
    return SampleCache(folder.expanduser(), int(config.cache_gb * 1e9))


def make_models(
    config: TrainConfig, spec: ModelSpec, base: str, device: torch.device
) -> tuple[Frozen, TrainedModel]:
    """Loads the base model in the configured precision, and makes the trained parts in float32.

    base: a folder or a hub id. Raises WeightsError if the base or `config.adapter` can't be
    loaded, ConfigError if the base can't take images of the configured resolution.
    """
    models = load_base(
        spec,
        base,
        image_encoder=config.model.image_encoder or None,
        device=device,
        dtype=_DTYPES[config.mixed_precision],
    )
    if config.mixed_precision == "fp16":
        models.vae.float()  # fp16 overflows in SDXL's VAE
    multiple = models.vae_factor * 2 ** (len(models.unet.config.block_out_channels) - 1)
    if config.resolution % multiple:
        raise ConfigError(
            f"resolution={config.resolution}: this base needs a multiple of {multiple}"
        )
    if config.train_base:
        models.unet.float().requires_grad_(True)
    adapter = ConsistentID(spec, models.unet, config.model.mode).to(device)
    if config.adapter:
        load_adapter(Path(config.adapter), adapter)
    if config.gradient_checkpointing:
        models.unet.enable_gradient_checkpointing()
    return freeze(models, spec.vision_size), TrainedModel(adapter, models.unet).train()


def make_optimizer(
    config: OptimConfig, steps: int, parameters: list[nn.Parameter]
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Makes AdamW and its learning rate schedule over `steps` steps of the optimizer.

    Raises ConfigError for an unknown schedule.
    """
    from diffusers.optimization import SchedulerType, get_scheduler

    # piecewise_constant needs further settings
    names = [kind.value for kind in SchedulerType if kind.value != "piecewise_constant"]
    if config.lr_scheduler not in names:
        raise ConfigError(
            f"optim.lr_scheduler={config.lr_scheduler}: expected one of {', '.join(names)}"
        )
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=True,  # it can skip an update on the device
    )
    schedule: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=steps,
    )
    return optimizer, schedule


def make_preparation(config: TrainConfig, spec: ModelSpec, frozen: Frozen) -> Preparation:
    """Returns the settings by which records become micro-batches for these models."""
    base = frozen.base
    side = config.resolution // base.vae_factor
    return Preparation(
        tokenizer=base.tokenizer,
        tokenizer_2=base.tokenizer_2,
        spec=spec,
        mode=config.model.mode,
        resolution=config.resolution,
        latent_shape=(base.vae.config.latent_channels, side, side),
        timesteps=frozen.noise_schedule.config.num_train_timesteps,
        drop=DropRates(
            text=config.loss.drop_text,
            identity=config.loss.drop_identity,
            both=config.loss.drop_both,
            legacy=config.model.mode == "legacy",
        ),
        seed=config.seed,
        cache_size=config.keep_samples,
        verify=config.verify_samples,
    )
