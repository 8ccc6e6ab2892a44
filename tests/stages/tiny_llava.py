"""A LLaVA-1.5, LLaVA-NeXT or Qwen2.5-VL checkpoint of some hundred kilobytes, made locally: real classes, real image
processing, a tokenizer trained on the spot, seeded random weights.

It is loaded from disk like any other checkpoint. Its words mean nothing, but they depend on the picture and on the
prompt, which is what the tests need. Run `python -m tests.stages.tiny_llava FOLDER` to look at one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal

Kind = Literal["llava", "llava_next", "qwen2_5_vl"]

IMAGE_SIZE = 28
PATCH_SIZE = 7  # 4 × 4 = 16 image tokens
TILINGS = [[28, 56], [56, 28], [56, 56]]  # llava_next: (height, width) a picture may be spread over

TRAINING_TEXT = (
    "USER: ASSISTANT: Please describe the people in the image, including their clothing and facial expressions. "
    "Describe this person's facial features for me, including face, ears, eyes, nose, and mouth. "
    "The image features a person with long brown hair, wearing a blue shirt and smiling at the camera. "
    "Two ears are visible beside the hair, the nose is straight, the eyes are open, and the mouth is closed."
)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def make_tokenizer(image_token: str = "<image>") -> Any:
    """Byte-level BPE, trained on TRAINING_TEXT; `<s>` is put in front, as Llama's tokenizer does."""
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


def make_checkpoint(folder: Path, kind: Kind = "llava", seed: int = 0, chat_template: bool = True) -> Path:
    """Write processor and model to `folder` and return it.

    llava_next cuts a picture into as many tiles as fit it. qwen2_5_vl has another picture token, positions in three
    dimensions, and a processor that can't be loaded whole without torchvision.
    """
    import torch

    tokenizer = make_tokenizer("<|image_pad|>" if kind == "qwen2_5_vl" else "<image>")
    torch.manual_seed(seed)
    model, processor_files = (_qwen if kind == "qwen2_5_vl" else _llava)(tokenizer, kind, chat_template)
    with torch.no_grad():
        for parameter in model.parameters():  # far from nought, or picture and prompt hardly sway the next word
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    model.eval().save_pretrained(folder)
    for part in processor_files:
        part.save_pretrained(folder)
    if kind == "qwen2_5_vl":  # laid out as on the hub: no processor_config.json
        settings = json.loads((folder / "preprocessor_config.json").read_text())
        settings["processor_class"] = "Qwen2_5_VLProcessor"
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
        template = CHAT_TEMPLATE.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
        (folder / "chat_template.jinja").write_text(template)
    return folder


def _text(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _llava(tokenizer: Any, kind: Kind, chat_template: bool) -> tuple[Any, tuple[Any, ...]]:
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    crop = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
    settings: dict[str, Any] = {
        "vision_config": transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
        ),
        "text_config": transformers.LlamaConfig(**_text(tokenizer)),
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
    }
    if kind == "llava":
        images: Any = CLIPImageProcessorPil(**crop)
        model: Any = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**settings))
        processor_class: Any = transformers.LlavaProcessor
    else:
        images = LlavaNextImageProcessorPil(**crop, image_grid_pinpoints=TILINGS)
        config = transformers.LlavaNextConfig(**settings, image_grid_pinpoints=TILINGS)
        model = transformers.LlavaNextForConditionalGeneration(config)
        processor_class = transformers.LlavaNextProcessor
    processor = processor_class(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE if chat_template else None,
    )
    return model, (processor,)


def _qwen(tokenizer: Any, kind: Kind, chat_template: bool) -> tuple[Any, tuple[Any, ...]]:
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    names = {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    names |= {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    tokenizer.add_tokens(list(names.values()), special_tokens=True)
    config = transformers.Qwen2_5_VLConfig(
        text_config={**_text(tokenizer), "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2]}},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 14,
            "out_hidden_size": 48,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        **{field: tokenizer.convert_tokens_to_ids(name) for field, name in names.items()},
    )
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112}, patch_size=14)
    return transformers.Qwen2_5_VLForConditionalGeneration(config), (images, tokenizer)


if __name__ == "__main__":
    print(make_checkpoint(Path(sys.argv[1])))
