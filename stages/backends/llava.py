"""Writes captions with a vision-language model of transformers: LLaVA-1.5, LLaVA-NeXT and others.

The two prompts of an image share a prefix (template, image, first words). The model processes it
once and uses its key-value cache for both prompts. Images go through the model in batches of
similar length, since every row is padded to the longest. The captions are those of two greedy
`generate` calls for each image. In half precision the last bits depend on the batch's shape, so
that a word may differ now and then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.captions import LlavaConfig
from configs.errors import ConfigError, WeightsError
from stages.backends.runtime import torch_device
from stages.codec import decode_jpeg
from stages.record import Record

if TYPE_CHECKING:
    from stages.backends.weights import Weights

# LLaVA-1.5's, for processors without a chat template
PLAIN_TEMPLATE = "USER: <image>\n{prompt} ASSISTANT:"
_BATCHES = 4  # batches of one call: their images are sorted by length
# endings of the files of a checkpoint that captions depend on
_HASHED_FILES = (".safetensors", ".json", ".txt", ".model", ".jinja")


class Llava:
    """A captioner that runs in this process.

    Building it loads `config.model` (a folder, a hub id, or ID@REVISION). Raises WeightsError if
    that fails.
    """

    def __init__(self, config: LlavaConfig, weights: Weights | None = None) -> None:
        import torch
        from transformers import AutoModelForImageTextToText

        self.config = config
        self.device = torch_device(config.device)
        quantization = _quantization(config, self.device)
        name, revision = locate(config.model)
        source = {"revision": revision} if revision else {"local_files_only": True}
        try:
            self.processor: Any = _load_processor(name, source)
            self.model: Any = AutoModelForImageTextToText.from_pretrained(
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
            self.model.to(self.device)
        self.model.eval()
        self.tokenizer: Any = self.processor.tokenizer
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.padding_side = "left"
        self.prompts = (self._templated(config.prompt), self._templated(config.face_prompt))

    @staticmethod
    def digests(config: LlavaConfig) -> Mapping[str, str]:
        """Returns what identifies the checkpoint, without loading it: its commit on the hub, or a
        sha256 over its files.
        """
        name, revision = locate(config.model)
        return {"checkpoint": revision or _folder_digest(Path(name))}

    @staticmethod
    def window(config: LlavaConfig, batch_size: int) -> int:
        """Returns the size of several batches, so that images can be sorted by length."""
        return batch_size * _BATCHES if batch_size > 1 else 1

    def caption(self, records: Sequence[Record], batch_size: int = 1) -> list[tuple[str, str]]:
        """Returns (caption, face caption) for each record. The model gets `batch_size` images at a
        time, longest first.
        """
        import torch

        images = [decode_jpeg(record.image) for record in records]
        lengths = self._image_tokens(images)
        order = sorted(
            range(len(images)), key=lambda index: (-lengths[index], images[index].shape[:2], index)
        )
        texts: dict[int, tuple[str, str]] = {}
        with torch.inference_mode():
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                captions = self._generate(*self._prefix([images[index] for index in batch]))
                texts |= zip(batch, zip(captions[::2], captions[1::2], strict=True), strict=True)
        return [texts[index] for index in range(len(images))]

    def _image_tokens(self, images: Sequence[Any]) -> list[int]:
        """Returns the number of tokens of each image. The other parts of a prompt have equal
        lengths.

        It depends on the image's size only. All processors of transformers have this method, which
        serving engines use.
        """
        sizes = [image.shape[:2] for image in images]
        counts: list[int] = self.processor._get_num_multimodal_tokens(
            image_sizes=sizes
        ).num_image_tokens
        return counts

    def _templated(self, prompt: str) -> str:
        if not self.processor.chat_template:
            return PLAIN_TEMPLATE.format(prompt=prompt)
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text: str = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return text

    def _prefix(self, images: Sequence[Any]) -> tuple[dict[str, Any], list[list[int]]]:
        """Returns the model inputs of the prefix that both prompts share (B rows), and the token
        ids that follow it (2·B lists: first and second prompt of each image).

        Raises WeightsError if the template puts the image behind the prompt: then the prompts share
        no prefix with the image in it.
        """
        from PIL import Image

        first, second = self.prompts
        special = {"add_special_tokens": not first.startswith(self.tokenizer.bos_token or "\0")}
        inputs = self.processor(
            images=[Image.fromarray(image) for image in images],
            text=[first] * len(images),
            padding=True,
            return_tensors="pt",
            **special,
        )
        image_id = self.model.config.image_token_id
        image_token = self.tokenizer.convert_ids_to_tokens(image_id)
        ids: list[list[int]] = [
            row[mask.bool()].tolist()
            for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        tails: list[list[int]] = []
        lengths: list[int] = []
        for row in ids:
            expanded = second.replace(image_token, image_token * row.count(image_id))
            other: list[int] = self.tokenizer(expanded, **special)["input_ids"]
            shared = _common_prefix(row, other)
            if image_id in row[shared:] or image_id in other[shared:] or not shared:
                raise WeightsError(
                    f"caption.llava.model={self.config.model!r}: its chat template must put the "
                    "image before the prompt."
                )
            tails += [row[shared:], other[shared:]]
            lengths.append(shared)
        cut = max(len(row) - length for row, length in zip(ids, lengths, strict=True))
        assert {len(row) - length for row, length in zip(ids, lengths, strict=True)} == {cut}, (
            "the first prompt's tail is the same for all images"
        )
        for name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
            if name in inputs:
                inputs[name] = inputs[name][:, :-cut]
        dtype = self.model.dtype
        moved = {
            n: v.to(self.device, dtype if v.is_floating_point() else None)
            for n, v in inputs.items()
        }
        return moved, tails

    def _generate(self, inputs: dict[str, Any], tails: list[list[int]]) -> list[str]:
        """Processes the prefixes once, then continues each with its two tails. Returns 2·B texts:
        of the first and the second prompt of each image.
        """
        import torch

        # `generate` processes the prefix, so that each model sets the positions in its own way
        greedy = self._greedy(max_new_tokens=1)
        cache = self.model.generate(**inputs, generation_config=greedy).past_key_values
        cache.batch_repeat_interleave(2)
        language_model = getattr(self.model, "model", self.model)
        # Qwen-VL: position offsets of images, one row for each sequence
        if getattr(language_model, "rope_deltas", None) is not None:
            language_model.rope_deltas = language_model.rope_deltas.repeat_interleave(2, dim=0)
        padded = self.tokenizer.pad({"input_ids": tails}, return_tensors="pt").to(self.device)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        ids = torch.cat([ids.repeat_interleave(2, dim=0), padded["input_ids"]], dim=1)
        mask = torch.cat([mask.repeat_interleave(2, dim=0), padded["attention_mask"]], dim=1)
        tokens = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            generation_config=self._greedy(max_new_tokens=self.config.max_new_tokens),
        ).sequences
        texts: list[str] = self.tokenizer.batch_decode(
            tokens[:, ids.shape[1] :], skip_special_tokens=True
        )
        return [text.strip() for text in texts]

    def _greedy(self, max_new_tokens: int) -> Any:
        """Returns settings for greedy decoding; those of the checkpoint's generation_config that
        would change it are not used.
        """
        from transformers import GenerationConfig

        own = self.model.generation_config
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            use_cache=True,
            return_dict_in_generate=True,
            bos_token_id=own.bos_token_id,
            eos_token_id=own.eos_token_id
            if own.eos_token_id is not None
            else self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )


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


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Returns the length of the longest common prefix after which each has at least one token."""
    length = 0
    for a, b in zip(one[:-1], other[:-1], strict=False):
        if a != b:
            break
        length += 1
    return length


def locate(model: str) -> tuple[str, str]:
    """Returns (folder, "") for a local checkpoint, (hub id, commit) for one on the hub.

    The commit is that of a snapshot in the local cache, else that which the hub states, so that the
    loaded checkpoint is the one in the stage's signature. Raises ConfigError if `model` is empty,
    WeightsError if there is no such checkpoint.
    """
    if not model:
        raise ConfigError(
            "caption.llava.model is empty, and caption.backend=llava needs one: a folder or a hub "
            "id, such as llava-hf/llava-1.5-7b-hf. caption.backend=attributes needs none."
        )
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
            raise WeightsError(
                f"caption.llava.model={model!r}: the folder has no config.json or no "
                "*.safetensors file."
            )
        return str(folder), ""
    if model.startswith(("/", ".", "~")) or model.count("/") != 1:
        raise WeightsError(
            f"caption.llava.model={model!r}: there is no such folder, and a hub id looks like "
            "OWNER/NAME."
        )
    return _hub_commit(*model.partition("@")[::2])


@lru_cache(maxsize=8)
def _hub_commit(name: str, revision: str) -> tuple[str, str]:
    from huggingface_hub import HfApi, try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json", revision=revision or None)
    if isinstance(cached, str):
        return name, Path(cached).parent.name  # …/snapshots/COMMIT/config.json
    try:
        commit = HfApi().model_info(name, revision=revision or None, timeout=30).sha
    except Exception as error:
        raise WeightsError(
            f"caption.llava.model={name!r} is not a local folder, is not in the hub's local "
            f"cache, and the hub could not be reached: {type(error).__name__}: {error} Give a "
            f"folder with the checkpoint, or download it with `hf download {name}` first."
        ) from error
    return name, str(commit)


def _folder_digest(folder: Path) -> str:
    """Returns a sha256 over the relative names and the digests of the files that captions depend
    on.
    """
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in _HASHED_FILES and path.is_file():
            stat = path.stat()
            digest = _file_digest(path, stat.st_size, stat.st_mtime_ns)
            total.update(f"{digest}  {path.relative_to(folder).as_posix()}\n".encode())
    return total.hexdigest()


@lru_cache(maxsize=256)
def _file_digest(path: Path, size: int, mtime_ns: int) -> str:
    """Returns a file's sha256, cached while its size and time are the same, since checkpoints have
    gigabytes.
    """
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
