"""The moving average of the weights that train (EMA), which OUT/final then holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from configs.training import EmaConfig
from train.sharding import sharded_as


class Average:
    """The average, updated by diffusers' EMAModel, whose decay rises with the steps up to the one
    of the settings: at most (1 + n) / (10 + n) at step n.

    parameters: that train, by name, on their device. On the CPU, the average takes none of the
    GPU's memory, and each step waits for it to be copied there and back.
    """

    def __init__(self, config: EmaConfig, parameters: Mapping[str, nn.Parameter]) -> None:
        from diffusers.training_utils import EMAModel

        self._decay = config.decay
        self._names, self._parameters = [*parameters], [*parameters.values()]
        self._device = self._parameters[0].device
        self._home = torch.device("cpu") if config.on_cpu else self._device
        self._model = EMAModel(self._parameters, config.decay, foreach=True)
        self._model.to(self._home)

    def step(self) -> None:
        """Adds the present weights, after an optimizer step."""
        self._model.to(self._device)
        self._model.step(self._parameters)
        self._model.to(self._home)

    def weights(self) -> dict[str, Tensor]:
        """Returns the averaged weights by name."""
        return dict(zip(self._names, self._model.shadow_params, strict=True))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """A context in which the parameters have the averaged weights."""
        self._model.store(self._parameters)
        self._model.copy_to(self._parameters)
        try:
            yield
        finally:
            self._model.restore(self._parameters)

    def state_dict(self) -> dict[str, Any]:
        """Returns what `load_state_dict` reads, as tensors and plain values."""
        return {"names": self._names, **self._model.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the average, except for the decay, which may have been changed on purpose.

        Parameters that didn't train before begin with their present weights. state: empty if the
        run had no average; then all do.
        """
        present = {
            name: parameter.detach().clone()
            for name, parameter in zip(self._names, self._parameters, strict=True)
        }
        before = dict(zip(state.get("names", ()), state.get("shadow_params", ()), strict=True))
        shadow = [sharded_as(value, before.get(name, value)) for name, value in present.items()]
        self._model.load_state_dict({**state, "decay": self._decay, "shadow_params": shadow})
        self._model.to(self._home)
