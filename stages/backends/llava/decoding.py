"""Greedy decoding with a vision-language model.

The two prompts of an image share a prefix (template, image, first words): the model processes it
once and uses its key-value cache for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from configs.errors import WeightsError
from stages.backends.protocols import Answer
from stages.codec import Image

# LLaVA-1.5's, for processors without a chat template
PLAIN_TEMPLATE = "USER: {images}{prompt} ASSISTANT:"


class Decoder:
    """Answers prompts about images with a loaded model. model: its name, for errors."""

    def __init__(self, processor: Any, model: Any, name: str) -> None:
        self.processor, self.model, self.name = processor, model, name
        self.tokenizer: Any = processor.tokenizer
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.padding_side = "left"
        # The state of linear attention (Qwen3.5) would also take in the padding between the prefix
        # and shorter tails.
        self.shares_prefix: bool = not model._is_stateful

    def templated(self, prompt: str, images: int = 1) -> str:
        """Returns the prompt in the chat template, behind this number of images."""
        if not self.processor.chat_template:
            return PLAIN_TEMPLATE.format(images="<image>\n" * images, prompt=prompt)
        content = [*[{"type": "image"}] * images, {"type": "text", "text": prompt}]
        text: str = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=False,
            enable_thinking=False,  # without it, Qwen3.5 thinks up to the limit of tokens
        )
        return text

    def inputs(self, shown: Sequence[Sequence[Image]], texts: Sequence[str]) -> Any:
        """Returns the processor's model inputs: a row for each text and the images before it."""
        from PIL.Image import fromarray

        return self.processor(
            images=[[fromarray(image) for image in images] for images in shown],
            text=list(texts),
            padding=True,
            return_tensors="pt",
            **self._special(texts[0]),
        )

    def _special(self, text: str) -> dict[str, bool]:
        """Returns the argument by which a text that begins with BOS doesn't get a second one."""
        return {"add_special_tokens": not text.startswith(self.tokenizer.bos_token or "\0")}

    def moved(self, inputs: Any) -> dict[str, Any]:
        """Returns the inputs on the model's device, numbers with a point in its dtype."""
        dtype = self.model.dtype
        return {
            name: value.to(self.model.device, dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }

    def answer(self, inputs: Any, most: Sequence[int]) -> list[Answer]:
        """Returns the answer of each row of the model inputs. most: the most tokens of each."""
        return self._continued(self.moved(inputs), most)

    def prefix(
        self, shown: Sequence[Sequence[Image]], prompts: Sequence[str]
    ) -> tuple[Any, list[list[int]]]:
        """Returns the model inputs of the prefix that both prompts share (B rows), and the token
        ids that follow it (2·B lists: first and second prompt of each image). shown: an image each.
        `generate` takes both; this may run in another thread.

        Raises WeightsError if the template puts the image behind the prompt: then the prompts share
        no prefix with the image in it.
        """
        first, second = prompts
        inputs = self.inputs(shown, [first] * len(shown))
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
                    f"caption.llava.model={self.name!r}: its chat template must put the "
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
        return inputs, tails

    def generate(self, inputs: Any, tails: list[list[int]], most: Sequence[int]) -> list[Answer]:
        """Processes the prefixes once, then continues each with its two tails. Returns 2·B answers:
        to the first and the second prompt of each image. most: the most tokens of each.
        """
        import torch

        inputs = self.moved(inputs)
        # `generate` processes the prefix, so that each model sets the positions in its own way
        greedy = self.greedy(max_new_tokens=1)
        cache = self.model.generate(**inputs, generation_config=greedy).past_key_values
        cache.batch_repeat_interleave(2)
        rows = torch.arange(len(tails) // 2, device=self.model.device)
        self._select_positions(rows.repeat_interleave(2))
        padded = self.tokenizer.pad({"input_ids": tails}, return_tensors="pt").to(self.model.device)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        ids = torch.cat([ids.repeat_interleave(2, dim=0), padded["input_ids"]], dim=1)
        mask = torch.cat([mask.repeat_interleave(2, dim=0), padded["attention_mask"]], dim=1)
        return self._continued(
            {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}, most
        )

    def _continued(self, inputs: dict[str, Any], most: Sequence[int]) -> list[Answer]:
        """Returns the answer of each row of the model inputs. most: the most tokens of each.

        When the rows with the lowest limit have reached it, all that have ended are left out, since
        a row costs time and memory as long as it is in the batch.
        """
        ends = {*self._end_tokens()}
        tokens: list[list[int]] = [[] for _ in most]
        rows, done = [*range(len(most))], 0
        for limit in sorted({*most}):
            greedy = self.greedy(max_new_tokens=limit - done)
            result = self.model.generate(**inputs, generation_config=greedy)
            new = result.sequences[:, inputs["input_ids"].shape[1] :].tolist()
            for row, added in zip(rows, new, strict=True):
                tokens[row] += added
            left = [
                index
                for index, row in enumerate(rows)
                if most[row] > limit and ends.isdisjoint(tokens[row])
            ]
            if not left:
                break
            inputs = self._left(result, inputs["attention_mask"], left)
            rows, done = [rows[index] for index in left], limit
        return self.answers(tokens)

    def _left(self, result: Any, mask: Any, left: Sequence[int]) -> dict[str, Any]:
        """Returns the model inputs with which `generate` continues those rows of its result, none
        of which has ended. mask: the attention mask of the inputs before.
        """
        import torch

        ids, cache = result.sequences, result.past_key_values
        mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
        if len(left) < len(ids):
            index = torch.tensor(left, device=ids.device)
            ids, mask = ids[index], mask[index]
            cache.reorder_cache(index)
            self._select_positions(index)
        return {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}

    def _select_positions(self, index: Any) -> None:
        """Selects, of the position offsets that Qwen-VL has for each row, those of `index`."""
        language_model = getattr(self.model, "model", self.model)
        if getattr(language_model, "rope_deltas", None) is not None:
            language_model.rope_deltas = language_model.rope_deltas[index]

    def answers(self, rows: Sequence[list[int]]) -> list[Answer]:
        """Returns the answers of generated tokens. What follows an end-of-text token fills the row;
        a row without one was ended by its limit.
        """
        ends = {*self._end_tokens()}
        counts = [next((n for n, token in enumerate(row) if token in ends), None) for row in rows]
        whole = [row if n is None else row[: n + 1] for row, n in zip(rows, counts, strict=True)]
        texts = self.tokenizer.batch_decode(whole, skip_special_tokens=True)
        return [
            Answer(text.strip(), "length" if n is None else "stop")
            for text, n in zip(texts, counts, strict=True)
        ]

    def _end_tokens(self) -> list[int]:
        """Returns the ids that end an answer: the checkpoint may state one, several or none."""
        ends = self.model.generation_config.eos_token_id
        if ends is None:
            ends = self.tokenizer.eos_token_id
        return ends if isinstance(ends, list) else [ends]

    def greedy(self, max_new_tokens: int) -> Any:
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


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Returns the length of the longest common prefix after which each has at least one token."""
    length = 0
    for a, b in zip(one[:-1], other[:-1], strict=False):
        if a != b:
            break
        length += 1
    return length
