"""Writes captions with a vision-language model of transformers: LLaVA-1.5, LLaVA-NeXT and others.

Images go through the model in batches of similar length, since every row is padded to the longest.
The captions are those of two greedy `generate` calls for each image. In half precision the last
bits depend on the batch's shape, so that a word may differ now and then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from configs.captions import LlavaConfig
from stages.backends.llava import checkpoint
from stages.backends.llava.decoding import Decoder
from stages.backends.llava.loading import load
from stages.backends.protocols import Answer, Kind
from stages.backends.runtime import torch_device
from stages.codec import decode_jpeg
from stages.record import Record

if TYPE_CHECKING:
    from stages.backends.weights import Weights

Result = TypeVar("Result")

_BATCHES = 4  # batches of one call: their images are sorted by length


class Llava:
    """A captioner that runs in this process.

    Building it loads `config.model` (a folder, a hub id, or ID@REVISION). Raises WeightsError if
    that fails.
    """

    independent = False  # in half precision, the last bits depend on the batch

    def __init__(self, config: LlavaConfig, weights: Weights | None = None) -> None:
        self.config = config
        self.decoder = Decoder(*load(config, torch_device(config.device)), config.model)
        template = self.decoder.templated
        self.prompts = (template(config.prompt), template(config.face_prompt))
        self.retry_prompts = (template(config.retry_prompt), template(config.face_retry_prompt))

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

        def answer(_: Sequence[int], images: Sequence[Any]) -> list[tuple[Answer, Answer]]:
            inputs, tails = self.decoder.prefix(images, self.prompts)
            answers = self.decoder.generate(inputs, tails, self.config.max_new_tokens)
            return list(zip(answers[::2], answers[1::2], strict=True))

        return self._in_batches(records, batch_size, answer)

    def retry(
        self, records: Sequence[Record], kinds: Sequence[Kind], batch_size: int = 1
    ) -> list[Answer]:
        """Returns the answer to the second try of that kind for each record, with batches as in
        `caption`.
        """

        def answer(batch: Sequence[int], images: Sequence[Any]) -> list[Answer]:
            texts = [self.retry_prompts[kinds[index]] for index in batch]
            return self.decoder.answer(images, texts, self.config.max_new_tokens)

        return self._in_batches(records, batch_size, answer)

    def _in_batches(
        self,
        records: Sequence[Record],
        batch_size: int,
        answer: Callable[[Sequence[int], Sequence[Any]], list[Result]],
    ) -> list[Result]:
        """Returns what `answer` gives for each record. It gets the indices and the images of
        `batch_size` records at a time, longest first.
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
                answers = answer(batch, [images[index] for index in batch])
                results |= zip(batch, answers, strict=True)
        return [results[index] for index in range(len(images))]

    def _image_tokens(self, images: Sequence[Any]) -> list[int]:
        """Returns the number of tokens of each image. The other parts of a prompt have equal
        lengths.

        It depends on the image's size only. All processors of transformers have this method, which
        serving engines use.
        """
        sizes = [image.shape[:2] for image in images]
        counts: list[int] = self.decoder.processor._get_num_multimodal_tokens(
            image_sizes=sizes
        ).num_image_tokens
        return counts
