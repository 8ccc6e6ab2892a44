"""Writes captions with a vision-language model of transformers: LLaVA-1.5, LLaVA-NeXT and others.

Images go through the model in batches of similar length, since every row is padded to the longest.
The captions are those of two greedy `generate` calls for each image. In half precision the last
bits depend on the batch's shape, so that a word may differ now and then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from configs.captions import LlavaConfig
from stages.backends import views
from stages.backends.llava import checkpoint
from stages.backends.llava.decoding import Decoder
from stages.backends.llava.loading import load
from stages.backends.protocols import Answer, Kind
from stages.backends.runtime import torch_device
from stages.codec import Image
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
        images = self.decoder.processor.image_processor
        self._padding = views.padding_colour(images) if config.pad_to_square else None
        template = self.decoder.templated
        self.prompts = (template(config.prompt), template(config.face_prompt))

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
        below = self.config.face_view_below
        apart = [not self.decoder.shares_prefix or views.has_small_face(r, below) for r in records]
        together = [record for record, each in zip(records, apart, strict=True) if not each]
        others = [record for record, each in zip(records, apart, strict=True) if each]
        pairs = iter(self._pairs(together, batch_size))
        prompts = (self.config.prompt, self.config.face_prompt)
        coarse = self._answers(others, [0] * len(others), prompts, batch_size)
        fine = self._answers(others, [1] * len(others), prompts, batch_size)
        other_pairs = zip(coarse, fine, strict=True)
        return [next(other_pairs if each else pairs) for each in apart]

    def retry(
        self, records: Sequence[Record], kinds: Sequence[Kind], batch_size: int = 1
    ) -> list[Answer]:
        """Returns the answer to the second try of that kind for each record, with batches as in
        `caption`.
        """
        prompts = (self.config.retry_prompt, self.config.face_retry_prompt)
        return self._answers(records, kinds, prompts, batch_size)

    def _pairs(self, records: Sequence[Record], batch_size: int) -> list[tuple[Answer, Answer]]:
        """Returns the answers to both prompts about each picture, which the model sees once."""

        def answer(_: Sequence[int], shown: Sequence[list[Image]]) -> list[tuple[Answer, Answer]]:
            inputs, tails = self.decoder.prefix(shown, self.prompts)
            answers = self.decoder.generate(inputs, tails, self.config.max_new_tokens)
            return list(zip(answers[::2], answers[1::2], strict=True))

        return self._in_batches([self.shown(record, 0) for record in records], batch_size, answer)

    def _answers(
        self,
        records: Sequence[Record],
        kinds: Sequence[Kind],
        prompts: tuple[str, str],
        batch_size: int,
    ) -> list[Answer]:
        """Returns the answer to the prompt of that kind for each record."""

        def answer(batch: Sequence[int], shown: Sequence[list[Image]]) -> list[Answer]:
            texts = [
                self.decoder.templated(prompts[kinds[index]], len(images))
                for index, images in zip(batch, shown, strict=True)
            ]
            return self.decoder.answer(shown, texts, self.config.max_new_tokens)

        shown = [self.shown(record, kind) for record, kind in zip(records, kinds, strict=True)]
        return self._in_batches(shown, batch_size, answer)

    def shown(self, record: Record, kind: Kind) -> list[Image]:
        """Returns the images that the model gets for the caption of this kind: one or two."""
        return views.images(record, kind, self._padding, self.config.face_view_below)

    def _in_batches(
        self,
        shown: Sequence[list[Image]],
        batch_size: int,
        answer: Callable[[Sequence[int], Sequence[list[Image]]], list[Result]],
    ) -> list[Result]:
        """Returns what `answer` gives for the images of each prompt. It gets the indices and the
        images of `batch_size` prompts at a time, longest first.
        """
        import torch

        lengths = self._image_tokens(shown)
        order = sorted(
            range(len(shown)), key=lambda index: (-lengths[index], shown[index][0].shape[:2], index)
        )
        results: dict[int, Result] = {}
        with torch.inference_mode():
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                answers = answer(batch, [shown[index] for index in batch])
                results |= zip(batch, answers, strict=True)
        return [results[index] for index in range(len(shown))]

    def _image_tokens(self, shown: Sequence[list[Image]]) -> list[int]:
        """Returns the number of tokens of the images of each prompt. The other parts of prompts of
        a kind have equal lengths.

        It depends on the images' sizes only. All processors of transformers have this method, which
        serving engines use.
        """
        sizes = [image.shape[:2] for images in shown for image in images]
        counts = self.decoder.processor._get_num_multimodal_tokens(image_sizes=sizes)
        each = iter(counts.num_image_tokens)
        return [sum(next(each) for _ in images) for images in shown]
