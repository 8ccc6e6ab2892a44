"""Golden vectors: a folder of the reference's answers, and the comparison with ours (README.md)."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from model.spec import SPECS, ModelSpec

# Tolerances (README.md).
MODULES = 1e-4  # absolute, for modules in float32 on a CPU
LATENTS = 1e-3  # for the final latents, relative to their mean magnitude
EXACT = 0.0


@dataclass(frozen=True, slots=True)
class Case:
    """A comparison of the model's output with the reference's. relative: tensors are compared
    relative to the mean magnitude of `expected`.
    """

    name: str
    output: object
    expected: object
    tolerance: float = EXACT
    relative: bool = False

    @property
    def error(self) -> float:
        """The largest absolute difference of tensors, else the number of differing entries."""
        if not isinstance(self.output, Tensor) or not isinstance(self.expected, Tensor):
            return float(_differing(self.output, self.expected))
        scale = float(self.expected.abs().mean()) if self.relative else 1.0
        return _largest_error(self.output, self.expected) / scale

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # False for nan


class Golden:
    """A model's golden vectors in a folder: those of SD1.5, with texts, masks and losses, or those
    of SDXL.

    prefix: of the weights' and inputs' names that belong to this model. answers: the reference's
    outputs by name, some inputs among them. compared: names of those that were compared or are
    inputs.
    """

    def __init__(self, folder: Path, model: Literal["sd15", "sdxl"] = "sd15") -> None:
        self.folder = folder
        self.prefix, stem = ("", "golden") if model == "sd15" else ("xl.", "golden_sdxl")
        self.config: dict[str, Any] = json.loads((folder / f"{stem}.json").read_text())
        self.answers = load_file(folder / f"{stem}.safetensors")
        self.compared = {name for name in self.answers if name.endswith(_INPUTS)}
        self.seed = int(self.config["seed"])
        self.generator = _import_file(folder / self.config.get("fill", "fill.py"))
        vision, unet = self.config["vision_config"], self.config["unet_config"]
        self.image_tokens = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
        self.spec: ModelSpec = replace(
            SPECS[model],
            cross_attention_dim=unet["cross_attention_dim"],
            vision_dim=vision["hidden_size"],
            vision_size=vision["image_size"],
            lora_rank=self.config["lora_rank"],
            template=self.config["e2e"]["caption"],
        )

    def tensor(self, key: str, *shape: int) -> Tensor:
        """Makes an input from its name."""
        tensor: Tensor = self.generator.tensor(key, shape, self.seed)
        return tensor

    @torch.no_grad()
    def fill(
        self, module: nn.Module, prefix: str, old_root: str = "", *, shared: bool = False
    ) -> Any:
        """Fills a module, which may be on the meta device, with the reference's weights, and
        returns it.

        old_root: prefix of the module's keys in the older releases that the golden keys are of.
        shared: whether both models have the module's weights.
        """
        prefix = prefix if shared else self.prefix + prefix
        weights = {}
        for key, value in module.state_dict().items():
            has_root = key.startswith((old_root, *PROJECTION_KEYS))
            if value.is_floating_point():
                weights[key] = self.generator.weight(
                    prefix + (key if has_root else old_root + key), tuple(value.shape), self.seed
                )
        module.load_state_dict(weights, strict=False, assign=True)
        return module.eval()

    def case(
        self, name: str, output: Tensor, tolerance: float = MODULES, relative: bool = False
    ) -> Case:
        """Compares an output with the answer of that name."""
        self.compared.add(name)
        return Case(name, output, self.answers[name], tolerance, relative)


_INPUTS = (
    ".labels",
    ".photo",
    "facial.token_mask",
    "facial.valid_mask",
    "loss.idx",
    "loss.idx_mask",
)
PROJECTION_KEYS = ("visual_projection.", "text_projection.")  # keys that never had the old root


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_fill", path)
    if spec is None or spec.loader is None:
        raise SystemExit(
            f"{path} is not a Python file; expected the golden folder's generator of weights, "
            "fill.py"
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _largest_error(output: Tensor, expected: Tensor) -> float:
    """Returns the largest absolute difference; infinity for different shapes."""
    if output.shape != expected.shape:
        return float("inf")
    return float((output.double() - expected.double()).abs().max()) if output.numel() else 0.0


def _differing(output: object, expected: object) -> int:
    """Returns the number of differing entries of two mappings or of two lists of equal length,
    else 0 or 1.
    """
    if isinstance(output, dict) and isinstance(expected, dict):
        return sum(output.get(k) != expected.get(k) for k in {*output, *expected})
    if isinstance(output, list) and isinstance(expected, list) and len(output) == len(expected):
        return sum(a != b for a, b in zip(output, expected, strict=True))
    return int(output != expected)


def shapes(module: nn.Module) -> dict[str, list[int]]:
    """Returns the shapes of a module's state dict, by key."""
    return {key: list(value.shape) for key, value in module.state_dict().items()}
