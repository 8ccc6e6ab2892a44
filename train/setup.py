"""The setup of a run: checks of the configuration, models, and preparation of samples."""

from __future__ import annotations

from collections.abc import Callable, Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import torch

from configs.errors import ConfigError
from configs.training import TrainConfig
from model.base import adapter_path
from model.conditions import DropRates
from model.consistentid import BaseModels, ConsistentID, copy_weights, load_base
from model.spec import Embedder, ModelSpec
from model.start import load_start
from stages.storage.remote import refuse_credentials
from train.buckets import Buckets, bucket_sizes
from train.data import Preparation
from train.features.kinds import needed_encoders
from train.mixture import Mixture
from train.optimization import make_optimizer
from train.resume import check_accepted
from train.sharding import check_sharding
from train.step import Frozen, TrainedModel, freeze

_DTYPES: Final = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def check_config(config: TrainConfig) -> None:
    """Raises ConfigError for settings that are wrong whatever the data and the models are."""
    sources = [source.path for source in config.data]
    urls = (*sources, config.output, config.adapter, config.model.base)
    for url in (*urls, config.resume_from_checkpoint):
        refuse_credentials(url)
    if not sources or not all(sources):
        raise ConfigError("data is empty. Set data=OUT, the output of make dataset.")
    if not config.output:
        raise ConfigError(
            "output is empty. Set output=FOLDER, the folder or URL for checkpoints and the adapter."
        )
    if config.work_folder and "://" not in config.output:
        raise ConfigError(
            f"work_folder={config.work_folder} is for an output at a URL, but "
            f"output={config.output} is a folder. Leave work_folder empty."
        )
    if config.validation_steps and config.split != "train":
        raise ConfigError(
            f"validation_steps={config.validation_steps} measures on the validation side of the "
            f"data, and split={config.split} trains on it. Set split=train, or validation_steps=0."
        )
    check_accepted(config)
    if config.report_to == "wandb" and find_spec("wandb") is None:
        raise ConfigError(
            "report_to=wandb, but wandb isn't installed. Install it (pip install wandb), or set "
            "report_to=tensorboard."
        )
    check_device(config)
    check_sharding(config)
    make_optimizer(config, {})


def check_device(config: TrainConfig) -> None:
    """Raises ConfigError for a device that torch doesn't find, or that can't compute as asked."""
    if config.model.device not in ("auto", "cpu", "cuda", "mps"):
        raise ConfigError(f"model.device={config.model.device}: expected auto, cpu, cuda or mps")
    check_mps(config, is_available=torch.backends.mps.is_available())
    if config.model.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "model.device=cuda, but torch finds no GPU. Set model.device=auto, or install a torch "
            "with CUDA and its driver."
        )


def check_mps(config: TrainConfig, *, is_available: bool) -> None:
    """Raises ConfigError if a GPU of Apple is asked for and not available, or would be used in
    another precision than float32.
    """
    if config.model.device == "mps" and not is_available:
        raise ConfigError(
            "model.device=mps, but torch finds no GPU of Apple. Set model.device=auto."
        )
    if config.model.device in ("mps", "auto") and is_available and config.mixed_precision != "no":
        raise ConfigError(
            f"mixed_precision={config.mixed_precision}: on GPUs of Apple, training needs float32. "
            "Set mixed_precision=no."
        )


def make_models(
    config: TrainConfig,
    spec: ModelSpec,
    base: str,
    device: torch.device,
    embedder: Embedder | None = None,
    message: Callable[[str], None] = lambda _: None,
    features: Collection[str] = (),
) -> tuple[Frozen, TrainedModel]:
    """Loads the base model in the configured precision, and makes the adapter in float32, with
    initial weights from the seed. Only the parts that train require gradients.

    base: a folder or a hub id. embedder: of the data's identities. message: is told what of
    `config.adapter` was loaded. features: kinds that are read in place of encoding samples. Raises
    WeightsError if the base or `config.adapter` can't be loaded, ConfigError if the base can't take
    images of the configured resolution.
    """
    models = load_base(
        spec,
        base,
        image_encoder=config.model.image_encoder or None,
        device=device,
        dtype=_DTYPES[config.mixed_precision],
    )
    for module in models.modules.values():
        copy_weights(module)
    if config.mixed_precision == "fp16":
        models.vae.float()  # fp16 overflows in SDXL's VAE
    if config.resolution % (multiple := _multiple(models)):
        raise ConfigError(
            f"resolution={config.resolution}: this base needs a multiple of {multiple}"
        )
    torch.manual_seed(config.seed)  # the initial weights depend on nothing else
    adapter = ConsistentID(spec, models.unet, config.model.mode).to(device)
    if config.adapter:
        message(load_start(Path(adapter_path(config.adapter)), adapter, embedder))
    adapter.train_only(config.trained_parts)
    _speed_up(config, models)
    unneeded = {*features} - {*needed_encoders(config)}
    frozen = freeze(models, spec.vision_size, config.keep_features, unneeded)
    return frozen, TrainedModel(adapter, models.unet).train()


def _multiple(base: BaseModels) -> int:
    """Returns what the sides of training images must be multiples of, in pixels."""
    return int(base.vae_factor * 2 ** (len(base.unet.config.block_out_channels) - 1))


def make_buckets(config: TrainConfig, mixture: Mixture, base: BaseModels) -> Buckets | None:
    """Returns the samples in buckets; None if the run has none."""
    if not config.buckets:
        return None
    sizes = bucket_sizes(config.resolution, _multiple(base))
    return mixture.buckets(sizes, config.global_batch_size)


def _speed_up(config: TrainConfig, models: BaseModels) -> None:
    """Applies the settings that only change how fast the models run, and in how much memory."""
    if config.gradient_checkpointing:
        models.unet.enable_gradient_checkpointing()
    if config.channels_last:
        models.unet.to(memory_format=torch.channels_last)
        models.vae.to(memory_format=torch.channels_last)
    if config.compile != "no":
        # layers differ in their hooks, and torch gives up after eight versions of shared code
        models.unet.compile_repeated_blocks(backend=config.compile, isolate_recompiles=True)


def make_preparation(
    config: TrainConfig, spec: ModelSpec, frozen: Frozen, buckets: Buckets | None = None
) -> Preparation:
    """Returns the settings by which records become micro-batches for these models."""
    base, legacy = frozen.base, config.model.mode == "legacy"
    text, identity, both = config.loss.drops(legacy=legacy)
    return Preparation(
        tokenizer=base.tokenizer,
        tokenizer_2=base.tokenizer_2,
        spec=spec,
        mode=config.model.mode,
        resolution=config.resolution,
        latent_channels=base.vae.config.latent_channels,
        vae_factor=base.vae_factor,
        timesteps=frozen.noise_schedule.config.num_train_timesteps,
        drop=DropRates(
            text=text,
            identity=identity,
            both=both,
            region=config.loss.drop_region,
            legacy=legacy,
        ),
        seed=config.seed,
        noise_offset=config.loss.noise_offset,
        input_perturbation=config.loss.input_perturbation,
        true_sizes=config.model.sizes == "true",
        cache_size=config.keep_samples,
        verify=config.verify_samples,
        buckets=buckets,
    )
