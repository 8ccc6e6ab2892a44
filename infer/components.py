"""Finding and loading what a pipeline is made of: precision, models, adapter, LoRA."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError

from configs.errors import ConfigError, WeightsError
from model.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from model.consistentid import load_model

logger = logging.getLogger("consistentid")

_MODELS: Final = (
    *("text_encoder", "text_encoder_2", "image_encoder", "vae", "unet", "controlnet"),
)
_HUB: Final = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
_LIBRARIES: Final = ("diffusers", "transformers")


def precision(dtype: Any, device: str | None = None) -> Any:
    """Returns the torch type for a setting: "auto", a name such as "float16", or a torch type.

    device: None for that which `torch_device("auto")` chooses. auto: float16 on a GPU, float32 on
    a CPU. A mapping from a part's name to its setting is one to its type. Raises ConfigError for
    an unknown name.
    """
    if isinstance(dtype, Mapping):
        return {name: precision(each, device) for name, each in dtype.items()}
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        on_cpu = device == "cpu" or (device is None and not torch.cuda.is_available())
        return torch.float32 if on_cpu else torch.float16
    torch_type = getattr(torch, dtype, None) if isinstance(dtype, str) else None
    if not isinstance(torch_type, torch.dtype) or not torch_type.is_floating_point:
        raise ConfigError(f"dtype={dtype!r}: expected auto, float32, float16 or bfloat16")
    return torch_type


def check_precision(model: Any, device: torch.device) -> None:
    """Warns of half precision on a CPU. device: on which the model runs."""
    if model.conv_in.weight.dtype == torch.float16 and device.type == "cpu":
        logger.warning(
            "float16 on a CPU is emulated, which takes many times as long as float32; use "
            'dtype="auto" or float32'
        )


def load_models(root: str, index: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Loads a pipeline's models, by name, and checks that none of their weights is missing.

    root: a folder in diffusers' layout or a hub id. index: its model_index.json. options: those of
    `from_pretrained`; a model that is among them isn't loaded. Raises WeightsError as `load_model`.
    """
    if options.get("device_map") or options.get("quantization_config"):
        return {}  # diffusers places or quantizes the weights while it loads them
    shared = {name: options.get(name) for name in _HUB}
    models = {}
    for name in _MODELS:
        library, kind = index.get(name) or (None, None)
        several = kind == "MultiControlNetModel"  # not a class of diffusers' own namespace
        if library in _LIBRARIES and kind and not several and name not in options:
            dtype = _dtype_of(options.get("dtype"), name)
            models[name] = _load(root, name, library, kind, options.get("variant"), dtype, shared)
    return models


def _load(
    root: str, name: str, library: str, kind: str, variant: str | None, dtype: Any, shared: Any
) -> Any:
    import diffusers
    import transformers

    model_class = getattr({"diffusers": diffusers, "transformers": transformers}[library], kind)
    options = {"subfolder": name, "dtype": dtype, **shared}
    try:
        return load_model(model_class, root, variant=variant, **options)
    except WeightsError as error:
        # as diffusers does: a part without files of the variant is loaded from its other files
        if variant is None or not isinstance(error.__cause__, OSError):
            raise
        return load_model(model_class, root, **options)


def _dtype_of(dtype: Any, name: str) -> torch.dtype:
    if isinstance(dtype, Mapping):
        dtype = dtype.get(name, dtype.get("default"))
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def check_complete(pipe: Any, source: str) -> None:
    """Checks that all weights of a pipeline's models were in a checkpoint file: diffusers leaves
    missing ones on the meta device. Raises WeightsError, which names the first.
    """
    for name, model in pipe.components.items():
        state = model.state_dict() if isinstance(model, torch.nn.Module) else {}
        missing = sorted(key for key, value in state.items() if value.is_meta)
        if missing:
            raise WeightsError(
                f"{source} lacks {len(missing)} weights of its {name}, the first is {missing[0]}. "
                "The file is incomplete or of another model: download it again, or name another."
            )


def load_image_encoder(root: str, dtype: torch.dtype) -> Any:
    """Loads an image encoder, frozen. root: a hub id, a folder of its own, or a base model's folder
    with `image_encoder/` in it. Raises WeightsError as `load_model`.
    """
    from transformers import CLIPVisionModelWithProjection

    subfolder = "image_encoder" if Path(root, "image_encoder").is_dir() else ""
    model = load_model(CLIPVisionModelWithProjection, root, subfolder=subfolder, dtype=dtype)
    return model.eval().requires_grad_(False)


def load_lora(pipe: Any, source: str, *, merge: bool) -> None:
    """Loads a LoRA into a pipeline's UNet, and its text encoders if it has weights for them.

    source: a .safetensors, its folder or a hub id. merge: whether to add it to the base's weights
    for good, so that nothing of it stays beside them. Raises WeightsError if it can't be loaded.
    """
    try:
        pipe.load_lora_weights(source, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise WeightsError(
            f"lora={source} could not be loaded: {error}. Expected a LoRA for this base model in a "
            ".safetensors: the file, its folder, or a hub id (which needs a network)."
        ) from error
    if merge:
        pipe.fuse_lora()
        pipe.unload_lora_weights()


def adapter_path(
    source: str | Path, subfolder: str = "", weight_name: str = "", **hub: Any
) -> Path:
    """Returns the path of an adapter's folder or file; one on the hub is downloaded.

    source: a folder, a file or a hub id. subfolder: in it. weight_name: the weights file in it; "":
    adapter.safetensors with its adapter.json. hub: cache_dir, revision, token and the like. Raises
    WeightsError if there is nothing, or if it can't be downloaded.
    """
    local = Path(source).expanduser()
    if local.exists():
        path = local / subfolder / weight_name
        if not path.exists():
            raise WeightsError(f"{path}: nothing there; check the path, subfolder and weight_name")
        return path
    if local.is_absolute() or str(source).count("/") != 1:
        raise WeightsError(
            f"{source}: nothing there. Name a folder or file of an adapter, or a hub id such as "
            "JackAILab/ConsistentID."
        )
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        if weight_name:
            return Path(
                hf_hub_download(str(source), weight_name, subfolder=subfolder or None, **hub)
            )
        prefix = f"{subfolder}/" if subfolder else ""
        names = (WEIGHTS_FILE, CONFIG_FILE, "dataset.yaml")
        files = [f"{prefix}{name}" for name in names]
        return Path(snapshot_download(str(source), allow_patterns=files, **hub)) / subfolder
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise WeightsError(
            f"{source}: no such folder, and it could not be downloaded from the hub: {error}"
        ) from error


def file_digest(source: Path) -> Future[str]:
    """Returns the sha256 of the weights file of an adapter's folder or file, which is computed in
    the background: for SDXL's it takes seconds.
    """
    weights = source / WEIGHTS_FILE if source.is_dir() else source
    stream = weights.open("rb")  # now, in case that it is replaced

    def digest() -> str:
        with stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    executor = ThreadPoolExecutor(1)
    future = executor.submit(digest)
    executor.shutdown(wait=False)
    return future
