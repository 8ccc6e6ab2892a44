"""The setup of a run: checks of the configuration; models, optimizer, schedule, preparation."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from torch import nn

from configs.errors import ConfigError
from configs.training import OptimConfig, TrainConfig
from model.base import adapter_path
from model.checkpoint import load_adapter
from model.conditions import DropRates
from model.consistentid import BaseModels, ConsistentID, load_base
from model.spec import ModelSpec
from stages.storage.remote import refuse_credentials
from train.data import Preparation
from train.resume import check_accepted
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
    check_accepted(config)
    if config.model.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"model.device={config.model.device}: expected auto, cpu or cuda")
    if config.model.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "model.device=cuda, but torch finds no GPU. Set model.device=auto, or install a torch "
            "with CUDA and its driver."
        )
    make_optimizer(config.optim, config.max_train_steps, [nn.Parameter(torch.zeros(1))])


def make_models(
    config: TrainConfig, spec: ModelSpec, base: str, device: torch.device
) -> tuple[Frozen, TrainedModel]:
    """Loads the base model in the configured precision, and makes the trained parts in float32,
    with initial weights from the seed.

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
    _copy_weights(models)
    if config.mixed_precision == "fp16":
        models.vae.float()  # fp16 overflows in SDXL's VAE
    multiple = models.vae_factor * 2 ** (len(models.unet.config.block_out_channels) - 1)
    if config.resolution % multiple:
        raise ConfigError(
            f"resolution={config.resolution}: this base needs a multiple of {multiple}"
        )
    torch.manual_seed(config.seed)  # the initial weights depend on nothing else
    adapter = ConsistentID(spec, models.unet, config.model.mode).to(device)
    if config.adapter:
        load_adapter(Path(adapter_path(config.adapter)), adapter)
    if config.gradient_checkpointing:
        models.unet.enable_gradient_checkpointing()
    frozen = freeze(models, spec.vision_size, config.keep_features)
    return frozen, TrainedModel(adapter, models.unet).train()


def _copy_weights(models: BaseModels) -> None:
    """Copies all weights into memory of their own.

    Those of a file that is mapped into memory begin at any address, and on CPUs the last bit of a
    product depends on that.
    """
    for module in models.modules.values():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = tensor.data.clone()


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
