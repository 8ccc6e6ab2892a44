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
    import torch
    from transformers import AutoModelForImageTextToText

    quantization = _quantization(config, device)
    name, revision = checkpoint.locate(config.model)
    source = {"revision": revision} if revision else {"local_files_only": True}
    try:
        processor: Any = _load_processor(name, source)
        model: Any = AutoModelForImageTextToText.from_pretrained(
            name,
            dtype=getattr(torch, config.dtype),
            use_safetensors=True,
            trust_remote_code=False,
            **quantization,
            **source,
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


def _quantization(config: LlavaConfig, device: str) -> dict[str, Any]:
    """Returns arguments of from_pretrained for `config.quantize`. Raises ConfigError if the GPU or
    the package that it needs is missing.
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
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def _load_processor(name: str, source: Mapping[str, Any]) -> Any:
    """Returns the checkpoint's processor, without its video processor if that can't be loaded.

    Processors of Qwen-VL and OneVision require a video processor, which needs torchvision. Without
    it, transformers 5.23 raises OSError, ImportError or AttributeError. Images need neither.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    arguments = {"trust_remote_code": False, **source}
    try:
        return AutoProcessor.from_pretrained(name, **arguments)
    except (OSError, ImportError, AttributeError):
        processor_class = PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(name, **arguments))]
        if "video_processor" not in processor_class.get_attributes():
            raise
        parts = {
            "image_processor": AutoImageProcessor.from_pretrained(name, **arguments),
            "tokenizer": AutoTokenizer.from_pretrained(name, **arguments),
        }
        settings, _ = processor_class.get_processor_dict(name, **source)
        unchecked = {"check_argument_for_proper_class": lambda self, name, argument: None}
        images_only: Any = type(processor_class.__name__, (processor_class,), unchecked)
        order = processor_class.get_attributes()
        return images_only.from_args_and_dict([parts.get(part) for part in order], settings)
