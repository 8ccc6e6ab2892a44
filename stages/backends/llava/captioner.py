"""Writes captions with a vision-language model of transformers: LLaVA-1.5, LLaVA-NeXT and others.

Images go through the model in batches of similar length, since every row is padded to the longest.
The captions are those of two greedy `generate` calls for each image. In half precision the last
bits depend on the batch's shape, so that a word may differ now and then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from configs.captions import LlavaConfig
from configs.errors import ConfigError
from stages.backends import views
from stages.backends.llava import checkpoint
from stages.backends.llava.batches import MOST_TIMES, Batches, is_out_of_memory
from stages.backends.llava.decoding import Decoder
from stages.backends.llava.loading import load
from stages.backends.llava.tiles import use_one_tile
from stages.backends.protocols import Answer, Kind
from stages.backends.runtime import torch_device
from stages.codec import Image
from stages.record import Record

if TYPE_CHECKING:
    from stages.backends.weights import Weights

Prepared = TypeVar("Prepared")
Result = TypeVar("Result")

# Batches of one call: their images are sorted by length. On a GPU there are as many of the largest
# batches, so that the inputs of one are prepared while the model works on the other.
_BATCHES = 4
_LARGEST_BATCHES = 2


class Llava:
    """A captioner that runs in this process.

    Building it loads `config.model` (a folder, a hub id, or ID@REVISION). Raises WeightsError if
    that fails, ConfigError if the model doesn't fit into memory.
    """

    independent = False  # in half precision, the last bits depend on the batch

    def __init__(self, config: LlavaConfig, weights: Weights | None = None) -> None:
        self.config = config
        device = torch_device(config.device)
        try:
            processor, model = load(config, device)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise _no_memory(config, device, "the model doesn't fit", error) from error
        if config.tiles == "one":
            use_one_tile(processor, model)
        self.decoder = Decoder(processor, model, config.model)
        self.batches = Batches(device, config.memory_share)
        images = processor.image_processor
        self._padding = views.padding_colour(images) if config.pad_to_square else None
        template = self.decoder.templated
        self.prompts = (template(config.prompt), template(config.face_prompt))
        self.most = (config.max_new_tokens, config.face_max_new_tokens)

    @staticmethod
    def digests(config: LlavaConfig) -> Mapping[str, str]:
        """Returns what identifies the checkpoint, without loading it: its commit on the hub, or a
        sha256 over its files.
        """
        return {"checkpoint": checkpoint.digest(config.model)}

    @staticmethod
    def window(config: LlavaConfig, batch_size: int) -> int:
        """Returns the size of several batches, so that images can be sorted by length."""
        if config.memory_share > 0 and torch_device(config.device).startswith("cuda"):
            return batch_size * MOST_TIMES * _LARGEST_BATCHES
        return batch_size * _BATCHES if batch_size > 1 else 1

    def caption(
        self, records: Sequence[Record], batch_size: int = 1
    ) -> list[tuple[Answer, Answer]]:
        """Returns the answers to both prompts for each record. The model gets `batch_size` images
        at a time, longest first; less where that doesn't fit into memory, and up to eight times as
        many on a GPU that has room for them. Raises ConfigError if one image doesn't fit.
        """
        below = self.config.face_view_below
        apart = [not self.decoder.shares_prefix or views.has_small_face(r, below) for r in records]
        together = [record for record, each in zip(records, apart, strict=True) if not each]
        others = [record for record, each in zip(records, apart, strict=True) if each]
        pairs = iter(self._pairs(together, batch_size))
        prompts = (self.config.prompt, self.config.face_prompt)
        coarse = self._answers([(record, 0) for record in others], prompts, batch_size)
        fine = self._answers([(record, 1) for record in others], prompts, batch_size)
        other_pairs = zip(coarse, fine, strict=True)
        return [next(other_pairs if each else pairs) for each in apart]

    def retry(
        self, records: Sequence[Record], kinds: Sequence[Kind], batch_size: int = 1
    ) -> list[Answer]:
        """Returns the answer to the second try of that kind for each record, with batches as in
        `caption`.
        """
        prompts = (self.config.retry_prompt, self.config.face_retry_prompt)
        return self._answers(list(zip(records, kinds, strict=True)), prompts, batch_size)

    def shown(self, record: Record, kind: Kind) -> list[Image]:
        """Returns the images that the model gets for the caption of this kind: one or two."""
        return views.images(record, kind, self._padding, self.config.face_view_below)

    def _pairs(self, records: Sequence[Record], batch_size: int) -> list[tuple[Answer, Answer]]:
        """Returns the answers to both prompts about each picture, which the model sees once."""

        def prepare(batch: Sequence[int]) -> tuple[Any, list[list[int]]]:
            shown = [self.shown(records[index], 0) for index in batch]
            return self.decoder.prefix(shown, self.prompts)

        def answer(prepared: tuple[Any, list[list[int]]]) -> list[tuple[Answer, Answer]]:
            inputs, tails = prepared
            answers = self.decoder.generate(inputs, tails, self.most * (len(tails) // 2))
            return list(zip(answers[::2], answers[1::2], strict=True))

        return self._in_batches([(record, 0) for record in records], batch_size, prepare, answer)

    def _answers(
        self, asked: Sequence[tuple[Record, Kind]], prompts: tuple[str, str], batch_size: int
    ) -> list[Answer]:
        """Returns the answer to the prompt of that kind for each record."""

        def prepare(batch: Sequence[int]) -> tuple[Any, list[int]]:
            shown = [self.shown(*asked[index]) for index in batch]
            kinds = [asked[index][1] for index in batch]
            texts = [
                self.decoder.templated(prompts[kind], len(images))
                for kind, images in zip(kinds, shown, strict=True)
            ]
            return self.decoder.inputs(shown, texts), [self.most[kind] for kind in kinds]

        def answer(prepared: tuple[Any, list[int]]) -> list[Answer]:
            return self.decoder.answer(*prepared)

        return self._in_batches(asked, batch_size, prepare, answer)

    def _in_batches(
        self,
        asked: Sequence[tuple[Record, Kind]],
        batch_size: int,
        prepare: Callable[[Sequence[int]], Prepared],
        answer: Callable[[Prepared], list[Result]],
    ) -> list[Result]:
        """Returns what `answer` gives for each of `asked`. `prepare` gets the indices of those in a
        batch; batches are made of the longest first.
        """
        import torch

        def prepared(batch: Sequence[int]) -> Prepared:
            try:
                return prepare(batch)
            except Exception as error:
                error.add_note(f"inputs {', '.join(asked[index][0].source for index in batch)}")
                raise

        shapes = [
            views.shapes(*each, self._padding is not None, self.config.face_view_below)
            for each in asked
        ]
        lengths = self._image_tokens(shapes)
        order = sorted(range(len(asked)), key=lambda index: (-lengths[index], shapes[index], index))
        model = self.decoder.model
        try:
            with torch.inference_mode():
                results = self.batches.run(order, batch_size, prepared, answer)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            what = "not even one image (batch size 1) fits beside the model"
            raise _no_memory(self.config, str(model.device), what, error) from error
        return [results[index] for index in range(len(asked))]

    def _image_tokens(self, shapes: Sequence[Sequence[tuple[int, int]]]) -> list[int]:
        """Returns the number of tokens of the images of each prompt, of these shapes (height,
        width). The other parts of prompts of a kind have equal lengths.

        All processors of transformers have this method, which serving engines use.
        """
        sizes = [shape for images in shapes for shape in images]
        counts = self.decoder.processor._get_num_multimodal_tokens(image_sizes=sizes)
        each = iter(counts.num_image_tokens)
        return [sum(next(each) for _ in images) for images in shapes]


def _no_memory(config: LlavaConfig, device: str, what: str, error: Exception) -> ConfigError:
    """Returns an error that says `what` doesn't fit into the memory of the device."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return ConfigError(
        f"caption.llava.model={config.model!r}: {what} into the memory of {device}: {reason} "
        f"Choose a smaller model, caption.llava.dtype={config.dtype} → bfloat16 or float16, "
        "caption.llava.quantize=4bit or caption.llava.tiles=one, lower "
        f"caption.llava.face_max_new_tokens={config.face_max_new_tokens}, or give the stage more "
        "of the device (caption.placement.gpus)."
    )
