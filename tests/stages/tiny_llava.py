"""Makes a checkpoint of some hundred kilobytes, of LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision,
Qwen2.5-VL, Qwen3-VL or Qwen3.5: the real classes and image processors, a small trained tokenizer,
seeded random weights.

It is loaded from disk like any other checkpoint. The generated words have no meaning, but depend on
the image and on the prompt. `python -m tests.stages.tiny_llava FOLDER` writes one.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

Kind = Literal["llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "qwen3_5"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Sizes of a checkpoint (of qwen2_5_vl: of its text model). With the default of 4 × 4 image
    tokens, captions of different images differ.
    """

    image: int = 28  # side, pixels
    patch: int = 7  # side, pixels
    hidden: int = 48
    layers: int = 3
    heads: int = 4
    wide: int = 2  # width of the layers' inner part, in times `hidden`
    vision_hidden: int = 32
    vision_layers: int = 3
    positions: int = 512
    # (rows, columns) of the tilings that llava_next and llava_onevision choose from
    tiles: tuple[tuple[int, int], ...] = ((1, 2), (2, 1), (2, 2))
    pixels: tuple[int, int] = (56 * 56, 112 * 112)  # of an image, lowest and highest: qwen

    @property
    def tilings(self) -> list[list[int]]:
        """(height, width) of the tilings in pixels."""
        return [[rows * self.image, columns * self.image] for rows, columns in self.tiles]


TINY = Size()
# with the published settings of llava-1.5-7b, llava-v1.6-mistral-7b, llava-onevision-qwen2-7b-ov,
# Qwen2.5-VL-7B, Qwen3-VL-8B and Qwen3.5-9B
PUBLISHED: Final[dict[Kind, Size]] = {
    "llava": Size(image=336, patch=14, positions=4096),
    "llava_next": Size(
        image=336,
        patch=14,
        positions=4096,
        tiles=((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)),
    ),
    "llava_onevision": Size(
        image=384,
        patch=14,
        positions=8192,
        tiles=tuple((rows, columns) for rows in range(1, 7) for columns in range(1, 7)),
    ),
    "qwen2_5_vl": Size(positions=8192, pixels=(56 * 56, 12_845_056)),
    "qwen3_vl": Size(positions=8192, pixels=(65_536, 16_777_216)),
    "qwen3_5": Size(positions=8192, pixels=(65_536, 16_777_216)),
}

TRAINING_TEXT = (
    "USER: ASSISTANT: Please describe the people in the image, including their clothing and "
    "facial expressions. "
    "Describe this person's facial features for me, including face, ears, eyes, nose, and mouth. "
    "The image features a person with long brown hair, wearing a blue shirt and smiling at the "
    "camera. "
    "Two ears are visible beside the hair, the nose is straight, the eyes are open, and the "
    "mouth is closed."
)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% "
    "endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# what the template of Qwen3.5 adds; the model thinks unless it is told not to
THINKING_TEMPLATE = (
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% else %}{{ '<think>\n' }}{% endif %}"
)


def make_tokenizer(image_token: str = "<image>") -> Any:
    """Returns a byte-level BPE tokenizer, trained on TRAINING_TEXT; `<s>` comes first, as in
    Llama's tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>", image_token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TRAINING_TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": image_token},
    )


def make_checkpoint(
    folder: Path, kind: Kind = "llava", seed: int = 0, chat_template: bool = True, size: Size = TINY
) -> Path:
    """Writes processor and model to `folder`, and returns it.

    llava_next and llava_onevision divide an image into tiles. qwen2_5_vl has another image token,
    and positions in three dimensions. The video processors of the last two need torchvision.
    """
    import torch

    qwen = kind in _QWEN_PROCESSORS
    tokenizer = make_tokenizer("<|image_pad|>" if qwen else "<image>")
    torch.manual_seed(seed)
    model, processor_parts = _MAKERS[kind](tokenizer, size)
    with torch.no_grad():
        # with smaller weights, the next word would hardly depend on image and prompt
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    model.eval().save_pretrained(folder)
    for part in processor_parts:
        part.save_pretrained(folder)
    if qwen:
        _write_settings(folder, _QWEN_PROCESSORS[kind])
    if kind == "llava_onevision":
        _write_settings(
            folder, "LlavaOnevisionProcessor", num_image_tokens=(size.image // size.patch) ** 2
        )
    if chat_template:
        image = "<|vision_start|><|image_pad|><|vision_end|>" if qwen else "<image>"
        template = CHAT_TEMPLATE.replace("<image>", image)
        template += THINKING_TEMPLATE if kind == "qwen3_5" else ""
        (folder / "chat_template.jinja").write_text(template)
    return folder


def _write_settings(folder: Path, processor_class: str, **settings: Any) -> None:
    """Writes the settings of a processor whose parts are already saved, as on the hub: its class is
    stated in the image processor's settings.
    """
    images = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(
        json.dumps(images | {"processor_class": processor_class})
    )
    if settings:
        (folder / "processor_config.json").write_text(
            json.dumps(settings | {"processor_class": processor_class})
        )


def _text(tokenizer: Any, size: Size) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": size.hidden,
        "intermediate_size": size.wide * size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads // 2,
        "max_position_embeddings": size.positions,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _vision(size: Size) -> dict[str, Any]:
    return {
        "hidden_size": size.vision_hidden,
        "intermediate_size": 2 * size.vision_hidden,
        "num_hidden_layers": size.vision_layers,
        "num_attention_heads": 2,
        "image_size": size.image,
        "patch_size": size.patch,
    }


def _llava(tokenizer: Any, size: Size) -> tuple[Any, tuple[Any, ...]]:
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = CLIPImageProcessorPil(**_crop(size))
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(**_llava_parts(tokenizer, size))
    )
    return model, (_llava_processor(transformers.LlavaProcessor, images, tokenizer, size),)


def _llava_next(tokenizer: Any, size: Size) -> tuple[Any, tuple[Any, ...]]:
    import transformers
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    images = LlavaNextImageProcessorPil(**_crop(size), image_grid_pinpoints=size.tilings)
    config = transformers.LlavaNextConfig(
        **_llava_parts(tokenizer, size), image_grid_pinpoints=size.tilings
    )
    model = transformers.LlavaNextForConditionalGeneration(config)
    return model, (_llava_processor(transformers.LlavaNextProcessor, images, tokenizer, size),)


def _crop(size: Size) -> dict[str, Any]:
    return {
        "size": {"shortest_edge": size.image},
        "crop_size": {"height": size.image, "width": size.image},
    }


def _llava_parts(tokenizer: Any, size: Size) -> dict[str, Any]:
    import transformers

    return {
        "vision_config": transformers.CLIPVisionConfig(**_vision(size)),
        "text_config": transformers.LlamaConfig(**_text(tokenizer, size)),
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
    }


def _llava_processor(kind: Any, images: Any, tokenizer: Any, size: Size) -> Any:
    return kind(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=size.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _onevision(tokenizer: Any, size: Size) -> tuple[Any, tuple[Any, ...]]:
    import transformers
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    tokenizer.add_tokens(["<video>"], special_tokens=True)
    square = {"height": size.image, "width": size.image}
    images = LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=size.tilings)
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**_vision(size), vision_use_head=False),
        text_config=transformers.Qwen2Config(**_text(tokenizer, size)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=size.tilings,
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config), (images, tokenizer)


def _qwen2_5(tokenizer: Any, size: Size) -> tuple[Any, tuple[Any, ...]]:
    import transformers

    ids = _qwen_ids(tokenizer)
    config = transformers.Qwen2_5_VLConfig(
        text_config={**_text(tokenizer, size), "rope_parameters": _rope()},
        vision_config={
            **_qwen_vision(size, patch=14),
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        **ids,
    )
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    return model, (_qwen_images(size, patch=14), tokenizer)


def _qwen3(tokenizer: Any, size: Size) -> tuple[Any, tuple[Any, ...]]:
    import transformers

    ids = _qwen_ids(tokenizer)
    config = transformers.Qwen3VLConfig(
        text_config={
            **_text(tokenizer, size),
            "head_dim": size.hidden // size.heads,
            "rope_parameters": {**_rope(), "mrope_interleaved": True},
        },
        vision_config={
            **_qwen_vision(size, patch=16),
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        **ids,
    )
    model = transformers.Qwen3VLForConditionalGeneration(config)
    return model, (_qwen_images(size, patch=16, **_HALF), tokenizer)


def _qwen3_5(tokenizer: Any, size: Size) -> tuple[Any, tuple[Any, ...]]:
    """Two layers of linear attention, and one of full attention."""
    import transformers

    ids = _qwen_ids(tokenizer)
    config = transformers.Qwen3_5Config(
        text_config={
            **_text(tokenizer, size),
            "head_dim": size.hidden // size.heads,
            "full_attention_interval": 3,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "rope_parameters": {
                **_rope(),
                "mrope_interleaved": True,
                "partial_rotary_factor": 1.0,
                "rope_theta": 10000.0,
            },
        },
        vision_config={**_qwen_vision(size, patch=16), "num_position_embeddings": 64},
        **ids,
    )
    model = transformers.Qwen3_5ForConditionalGeneration(config)
    return model, (_qwen_images(size, patch=16, **_HALF), tokenizer)


def _rope() -> dict[str, Any]:
    return {"rope_type": "default", "mrope_section": [2, 2, 2]}


def _qwen_vision(size: Size, patch: int) -> dict[str, Any]:
    return {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": patch,
        "out_hidden_size": size.hidden,
    }


def _qwen_ids(tokenizer: Any) -> dict[str, int]:
    """Adds the special tokens of Qwen-VL to the tokenizer, and returns their ids."""
    names = {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    names |= {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    tokenizer.add_tokens(list(names.values()), special_tokens=True)
    return {field: tokenizer.convert_tokens_to_ids(name) for field, name in names.items()}


def _qwen_images(size: Size, patch: int, **settings: Any) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    lowest, highest = size.pixels
    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": lowest, "longest_edge": highest}, patch_size=patch, **settings
    )


_HALF: Final = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_QWEN_PROCESSORS: Final[dict[str, str]] = {
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
    "qwen3_5": "Qwen3VLProcessor",
}
_MAKERS: Final = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _onevision,
    "qwen2_5_vl": _qwen2_5,
    "qwen3_vl": _qwen3,
    "qwen3_5": _qwen3_5,
}

if __name__ == "__main__":
    print(make_checkpoint(Path(sys.argv[1])))
