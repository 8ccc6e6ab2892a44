"""Outputs of a frozen encoder, kept in memory so that each sample goes through it once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor


class Encodings:
    """An encoder of images, with a memory.

    encode: inputs (N, …) → outputs (N, …), without gradients. limit: number of outputs to keep, the
    first ones computed; 0: none, and a batch goes through the encoder in one call. Otherwise each
    input is encoded alone: the last bits of an output depend on the size of the batch, and a run
    that is resumed computes them in other batches.
    """

    def __init__(self, encode: Callable[[Tensor], Tensor], limit: int = 0) -> None:
        self._encode, self._limit = encode, limit
        self._outputs: dict[Hashable, Tensor] = {}

    def __call__(self, names: Sequence[Hashable], inputs: Tensor) -> Tensor:
        """Returns the outputs of a batch.

        names: of the inputs, in order; equal names have equal inputs. None: one that isn't kept.
        """
        if not self._limit:
            return self._encode(inputs)
        return torch.stack([self._one(name, inputs[i]) for i, name in enumerate(names)])

    def _one(self, name: Hashable, value: Tensor) -> Tensor:
        output = self._outputs.get(name)
        if output is None:
            # in memory of its own, whose address doesn't depend on the place in the batch
            output = self._encode(value[None].clone())[0]
            if name is not None and len(self._outputs) < self._limit:
                self._outputs[name] = output
        return output
