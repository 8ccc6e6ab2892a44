"""Captions by a vision-language model, through transformers' own classes: LLaVA-1.5, LLaVA-NeXT,
and others by name.

Both prompts of a picture begin alike (template, picture, first words), so that prefix is run
through the model once and its key-value cache serves both. The pictures of a batch go together, and
batches are made of pictures near in length, since every row is padded to the longest. The answers
are those of two plain greedy `generate` calls. In half precision the last bits depend on the
batch's shape, and with them, now and then, a word.
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

PLAIN_TEMPLATE = "USER: <image>\n{prompt} ASSISTANT:"  # LLaVA-1.5's, for processors that carry none
_BATCHES = 4  # that a call takes, to sort their pictures by length
# of a checkpoint: what can change its answers
_ANSWERING_FILES = (".safetensors", ".json", ".txt", ".model", ".jinja")


class Llava:
    """Loads `config.model` (a folder, a hub id, or ID@REVISION) when built. Raises WeightsError if
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
        if not quantization:  # a quantized model is where it belongs already, and can't be moved
            self.model.to(self.device)
        self.model.eval()
        self.tokenizer: Any = self.processor.tokenizer
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.padding_side = "left"
        self.prompts = (self._templated(config.prompt), self._templated(config.face_prompt))

    @staticmethod
    def digests(config: LlavaConfig) -> Mapping[str, str]:
        """What identifies the checkpoint, without loading it: its commit on the hub, or one sha256
        over its files.
        """
        name, revision = locate(config.model)
        return {"checkpoint": revision or _folder_digest(Path(name))}

    @staticmethod
    def window(config: LlavaConfig, batch_size: int) -> int:
        """Some batches together, so that there are lengths to choose from."""
        return batch_size * _BATCHES if batch_size > 1 else 1

    def caption(self, records: Sequence[Record], batch_size: int = 1) -> list[tuple[str, str]]:
        """(coarse, fine) description of each record's image, `batch_size` images at a time, the
        longest first.
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
                answers = self._answers(*self._prefix([images[index] for index in batch]))
                texts |= zip(batch, zip(answers[::2], answers[1::2], strict=True), strict=True)
        return [texts[index] for index in range(len(images))]

    def _image_tokens(self, images: Sequence[Any]) -> list[int]:
        """How many tokens each picture will take: all else of a prompt is of equal length.

        The processor knows without looking at pixels, in a method that all of transformers' have
        and serving engines rely on.
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
        """Model inputs of what both prompts share (B rows), and the token ids that follow it (2·B,
        prompts in turn).

        Raises WeightsError if the template puts the picture behind the prompt: then nothing of
        worth is shared.
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
                    "picture before the prompt."
                )
            tails += [row[shared:], other[shared:]]
            lengths.append(shared)
        cut = max(len(row) - length for row, length in zip(ids, lengths, strict=True))
        assert {len(row) - length for row, length in zip(ids, lengths, strict=True)} == {cut}, (
            "one tail per prompt"
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

    def _answers(self, inputs: dict[str, Any], tails: list[list[int]]) -> list[str]:
        """Prefill the prefixes once, then continue each with its two tails; the texts, prompts in
        turn.
        """
        import torch

        # `generate` itself prefills, so every model's own positions are right
        greedy = self._greedy(max_new_tokens=1)
        cache = self.model.generate(**inputs, generation_config=greedy).past_key_values
        cache.batch_repeat_interleave(2)
        language_model = getattr(self.model, "model", self.model)
        # Qwen-VL: picture positions, one row a sequence
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
        """Plain greedy decoding, whatever sampling habits the checkpoint's own generation_config
        carries.
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
    """Arguments of from_pretrained for `config.quantize`. Raises ConfigError where that can't be
    had.
    """
    import torch
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if config.quantize == "none":
        return {}
    lacks = (
        []
        if device.startswith("cuda") and torch.cuda.is_available()
        else [f"a GPU (the device here is {device})"]
    )
    if not is_bitsandbytes_available():
        lacks.append("the package bitsandbytes (`pip install -U bitsandbytes`)")
    if lacks:
        raise ConfigError(
            f"caption.llava.quantize={config.quantize!r} needs {' and '.join(lacks)} on every node "
            "that captions. caption.llava.quantize=none needs neither."
        )
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def _load_processor(name: str, source: Mapping[str, Any]) -> Any:
    """The checkpoint's processor; where its video half can't be loaded, the same class without it.

    Processors of Qwen-VL and OneVision insist on a video processor, which needs torchvision
    (transformers 5.23 fails on that with OSError, ImportError or AttributeError, as it happens).
    Pictures need neither.
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
        pictures_only: Any = type(processor_class.__name__, (processor_class,), unchecked)
        order = processor_class.get_attributes()
        return pictures_only.from_args_and_dict([parts.get(part) for part in order], settings)


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest common prefix that leaves each at least one token to continue with."""
    length = 0
    for a, b in zip(one[:-1], other[:-1], strict=False):
        if a != b:
            break
        length += 1
    return length


def locate(model: str) -> tuple[str, str]:
    """(folder, "") of a local checkpoint, or (hub id, commit) of one on the hub.

    The commit is read from the local cache if a snapshot is there, else asked of the hub, so that
    what is loaded is what the stage's signature names. Raises ConfigError if `model` is empty,
    WeightsError if there is no such thing.
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
                f"caption.llava.model={model!r}: the folder holds no config.json or no "
                "*.safetensors files."
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
            f"caption.llava.model={name!r} is no local folder, is not in the hub's local cache, "
            f"and the hub could not be asked for it: {type(error).__name__}: {error} Give a "
            "folder with the checkpoint, or download it first with "
            f"`hf download {name}` where there is a network."
        ) from error
    return name, str(commit)


def _folder_digest(folder: Path) -> str:
    """sha256 over the names and digests of the files that can change the answers; moving the folder
    changes nothing.
    """
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in _ANSWERING_FILES and path.is_file():
            stat = path.stat()
            digest = _file_digest(path, stat.st_size, stat.st_mtime_ns)
            total.update(f"{digest}  {path.relative_to(folder).as_posix()}\n".encode())
    return total.hexdigest()


@lru_cache(maxsize=256)
def _file_digest(path: Path, size: int, mtime_ns: int) -> str:
    """sha256 of a file, remembered while size and time stay: checkpoints weigh gigabytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
