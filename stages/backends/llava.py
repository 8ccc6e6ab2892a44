"""Writes captions with a vision-language model of transformers: LLaVA-1.5, LLaVA-NeXT and others.

The two prompts of an image share a prefix (template, image, first words). The model processes it
once and uses its key-value cache for both prompts. Images go through the model in batches of
similar length, since every row is padded to the longest. The captions are those of two greedy
`generate` calls for each image. In half precision the last bits depend on the batch's shape, so
that a word may differ now and then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from configs.captions import LlavaConfig
from configs.errors import ConfigError, WeightsError
from stages.backends import checkpoint
from stages.backends.protocols import Answer
from stages.backends.runtime import torch_device
from stages.codec import decode_jpeg
from stages.record import Record

if TYPE_CHECKING:
    from stages.backends.weights import Weights

Result = TypeVar("Result")

# LLaVA-1.5's, for processors without a chat template
PLAIN_TEMPLATE = "USER: <image>\n{prompt} ASSISTANT:"
_BATCHES = 4  # batches of one call: their images are sorted by length


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
        name, revision = checkpoint.locate(config.model)
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
        return {"checkpoint": checkpoint.digest(config.model)}

    @staticmethod
    def window(config: LlavaConfig, batch_size: int) -> int:
        """Returns the size of several batches, so that images can be sorted by length."""
        return batch_size * _BATCHES if batch_size > 1 else 1

    def caption(
        self, records: Sequence[Record], batch_size: int = 1
    ) -> list[tuple[Answer, Answer]]:
        """Returns the answers to both prompts for each record. The model gets `batch_size` images
        at a time, longest first.
        """

        def answer(images: Sequence[Any]) -> list[tuple[Answer, Answer]]:
            answers = self._generate(*self._prefix(images))
            return list(zip(answers[::2], answers[1::2], strict=True))

        return self._in_batches(records, batch_size, answer)

    def ask(self, records: Sequence[Record], prompt: str, batch_size: int = 1) -> list[Answer]:
        """Returns the answer to `prompt` for each record, with batches as in `caption`."""
        text = self._templated(prompt)

        def answer(images: Sequence[Any]) -> list[Answer]:
            inputs = self._moved(self._inputs(images, text))
            tokens = self.model.generate(
                **inputs, generation_config=self._greedy(self.config.max_new_tokens)
            ).sequences
            return self._answers(tokens[:, inputs["input_ids"].shape[1] :])

        return self._in_batches(records, batch_size, answer)

    def _in_batches(
        self,
        records: Sequence[Record],
        batch_size: int,
        answer: Callable[[Sequence[Any]], list[Result]],
    ) -> list[Result]:
        """Returns what `answer` gives for the image of each record. It gets `batch_size` images at
        a time, longest first.
        """
        import torch

        images = [decode_jpeg(record.image) for record in records]
        lengths = self._image_tokens(images)
        order = sorted(
            range(len(images)), key=lambda index: (-lengths[index], images[index].shape[:2], index)
        )
        results: dict[int, Result] = {}
        with torch.inference_mode():
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                results |= zip(batch, answer([images[index] for index in batch]), strict=True)
        return [results[index] for index in range(len(images))]

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

    def _inputs(self, images: Sequence[Any], text: str) -> Any:
        """Returns the processor's model inputs: a row for each image, with the same text."""
        from PIL import Image

        return self.processor(
            images=[Image.fromarray(image) for image in images],
            text=[text] * len(images),
            padding=True,
            return_tensors="pt",
            **self._special(text),
        )

    def _special(self, text: str) -> dict[str, bool]:
        """Returns the argument by which a text that begins with BOS doesn't get a second one."""
        return {"add_special_tokens": not text.startswith(self.tokenizer.bos_token or "\0")}

    def _moved(self, inputs: Any) -> dict[str, Any]:
        """Returns the inputs on the model's device, numbers with a point in its dtype."""
        dtype = self.model.dtype
        return {
            name: value.to(self.device, dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }

    def _prefix(self, images: Sequence[Any]) -> tuple[dict[str, Any], list[list[int]]]:
        """Returns the model inputs of the prefix that both prompts share (B rows), and the token
        ids that follow it (2·B lists: first and second prompt of each image).

        Raises WeightsError if the template puts the image behind the prompt: then the prompts share
        no prefix with the image in it.
        """
        first, second = self.prompts
        inputs = self._inputs(images, first)
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
            other: list[int] = self.tokenizer(expanded, **self._special(first))["input_ids"]
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
        return self._moved(inputs), tails

    def _generate(self, inputs: dict[str, Any], tails: list[list[int]]) -> list[Answer]:
        """Processes the prefixes once, then continues each with its two tails. Returns 2·B answers:
        to the first and the second prompt of each image.
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
        return self._answers(tokens[:, ids.shape[1] :])

    def _answers(self, tokens: Any) -> list[Answer]:
        """Returns the answers of generated tokens (rows, T). A row without an end-of-text token was
        ended by the limit.
        """
        import torch

        ends = torch.tensor(self._end_tokens(), device=tokens.device)
        ended = torch.isin(tokens, ends).any(dim=1).tolist()
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [
            Answer(text.strip(), "stop" if stopped else "length")
            for text, stopped in zip(texts, ended, strict=True)
        ]

    def _end_tokens(self) -> list[int]:
        """Returns the ids that end an answer: the checkpoint may state one, several or none."""
        ends = self.model.generation_config.eos_token_id
        if ends is None:
            ends = self.tokenizer.eos_token_id
        return ends if isinstance(ends, list) else [ends]

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
            eos_token_id=self._end_tokens(),
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
