"""Loads a vision-language model and its processor from a checkpoint in transformers' layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from configs.captions import LlavaConfig
from configs.errors import ConfigError, WeightsError
from stages.backends.llava import checkpoint


def load(config: LlavaConfig, device: str) -> tuple[Any, Any]:
    """Returns processor and model of `config.model`, the model on `device` and in eval mode.

    Raises ConfigError for a quantization that isn't possible here, WeightsError for a checkpoint
    that can't be loaded.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    name, revision = checkpoint.locate(config.model)
    source: dict[str, Any] = {"revision": revision} if revision else {"local_files_only": True}
    source["trust_remote_code"] = False
    try:
        settings: Any = AutoConfig.from_pretrained(name, **source)
        dtype = _dtype(config.dtype, settings, device)
        quantization = _quantization(config, device, dtype)
        processor: Any = _load_processor(name, settings, source)
        model: Any = AutoModelForImageTextToText.from_pretrained(
            name, dtype=dtype, use_safetensors=True, **quantization, **source
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise WeightsError(
            f"caption.llava.model={config.model!r} could not be loaded as an "
            f"image-text-to-text model: {type(error).__name__}: {error} Expected a checkpoint "
            "in transformers' layout with safetensors weights, such as "
            "llava-hf/llava-1.5-7b-hf; caption.backend=attributes needs none."
        ) from error
    if not quantization:  # a quantized model is on its device already and can't be moved
        model.to(device)
    return processor, model.eval()


def automatic_dtype(stored: str, device: str, has_bfloat16: bool) -> str:
    """Returns the dtype for `caption.llava.dtype=auto`, of 16 bits except on a CPU, where these are
    slow.

    stored: dtype of the checkpoint. A GPU keeps float16; other checkpoints get bfloat16, which has
    float32's range, if the GPU has it.
    """
    if device.startswith("cpu"):
        return "float32"
    return "bfloat16" if has_bfloat16 and stored != "float16" else "float16"


def _dtype(chosen: str, settings: Any, device: str) -> Any:
    """Returns the torch dtype for a configured one and the checkpoint's settings."""
    import torch

    if chosen == "auto":
        stored = settings.dtype or settings.get_text_config().dtype
        has_bfloat16 = device.startswith("cuda") and torch.cuda.is_bf16_supported(
            including_emulation=False
        )
        chosen = automatic_dtype(str(stored).removeprefix("torch."), device, has_bfloat16)
    return getattr(torch, chosen)


def _quantization(config: LlavaConfig, device: str, dtype: Any) -> dict[str, Any]:
    """Returns arguments of from_pretrained for `config.quantize`, which computes in `dtype`. Raises
    ConfigError if the GPU or the package that it needs is missing.
    """
    import torch
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if config.quantize == "none":
        return {}
    missing = []
    if not (device.startswith("cuda") and torch.cuda.is_available()):
        missing.append(f"a GPU (the device here is {device})")
    if not is_bitsandbytes_available():
        missing.append("the package bitsandbytes (`pip install -U bitsandbytes`)")
    if missing:
        raise ConfigError(
            f"caption.llava.quantize={config.quantize!r} needs {' and '.join(missing)} on every "
            "node that captions. caption.llava.quantize=none needs neither."
        )
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def _load_processor(name: str, settings: Any, source: Mapping[str, Any]) -> Any:
    """Returns the checkpoint's processor, without its video processor if that can't be loaded.
    settings: the checkpoint's.

    Processors of Qwen-VL and OneVision require a video processor, which needs torchvision. Without
    it, transformers 5.23 raises OSError, ImportError or AttributeError, or ValueError if the
    checkpoint has one file of settings for images and videos. Images need neither.
    """
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    try:
        processor: Any = AutoProcessor.from_pretrained(name, **source)
        stated, _ = processor.get_processor_dict(name, **source)
    except (OSError, ImportError, AttributeError, ValueError):
        processor_class = PROCESSOR_MAPPING.get(type(settings), None)
        if not processor_class or "video_processor" not in processor_class.get_attributes():
            raise
        parts = {
            "image_processor": AutoImageProcessor.from_pretrained(name, **source),
            "tokenizer": AutoTokenizer.from_pretrained(name, **source),
        }
        stated, _ = processor_class.get_processor_dict(name, **source)
        unchecked = {"check_argument_for_proper_class": lambda self, name, argument: None}
        images_only: Any = type(processor_class.__name__, (processor_class,), unchecked)
        order = processor_class.get_attributes()
        processor = images_only.from_args_and_dict([parts.get(part) for part in order], stated)
    _complete(processor, stated, settings)
    return processor


def _complete(processor: Any, stated: Mapping[str, Any], settings: Any) -> None:
    """Sets what the processor must know of the model to count image tokens, and its files don't
    state. They are often missing in checkpoints that were trained from another one.

    stated: the processor's settings in its files.
    """
    vision = getattr(settings, "vision_config", None)
    patch, side = getattr(vision, "patch_size", None), getattr(vision, "image_size", None)
    of_the_model = {
        "patch_size": patch,
        "num_image_tokens": (side // patch) ** 2 if side and patch else None,
        "vision_feature_select_strategy": getattr(
            settings, "vision_feature_select_strategy", "default"
        ),
        # CLIP has a class token beside those of the patches, SigLIP has none
        "num_additional_image_tokens": int("clip" in getattr(vision, "model_type", "")),
    }
    for name, value in of_the_model.items():
        if stated.get(name) is None and hasattr(processor, name):
            setattr(processor, name, value)
