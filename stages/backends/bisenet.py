"""BiSeNet face parsing (facexlib's network, torch): 19 CelebAMask-HQ classes.

facexlib's `__init__` imports its detectors, which need torchvision; this project doesn't depend on
it (docs/adr/0002). So `bisenet` imports the module with the network without running `__init__`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import torch

from configs.schema import ParseConfig
from stages.backends.runtime import torch_device
from stages.backends.weights import Weights
from stages.codec import Image, LabelMap

CLASSES = 19
_MEAN = torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1)
_STD = torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1)


class BiSeNetParser:
    def __init__(self, config: ParseConfig, weights: Weights) -> None:
        state = torch.load(weights.fetch(config.weights), map_location="cpu", weights_only=True)
        self._net: Any = bisenet(CLASSES)
        self._net.load_state_dict(state)
        self._device = torch.device(torch_device(config.device))
        self._net.eval().requires_grad_(False).to(self._device, memory_format=torch.channels_last)
        self._size = config.size
        self._dtype = getattr(torch, config.dtype)

    @torch.inference_mode()
    def parse(self, images: Sequence[Image]) -> list[LabelMap]:
        """See protocols.FaceParser. An image is resized to size × size, regardless of its aspect
        ratio, as in training; its labels are resized back.
        """
        side = (self._size, self._size)
        resized = [
            image
            if image.shape[:2] == side
            else cv2.resize(image, side, interpolation=cv2.INTER_LINEAR)
            for image in images
        ]
        x = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).to(self._device)
        x = x.float().div_(255).sub_(_MEAN.to(self._device)).div_(_STD.to(self._device))
        x = x.contiguous(memory_format=torch.channels_last)
        is_low_precision = self._dtype is not torch.float32
        with torch.autocast(self._device.type, self._dtype, enabled=is_low_precision):
            logits = self._logits(x)
        labels = logits.argmax(1).to(torch.uint8).cpu().numpy()
        return [_to_size(labels[i], images[i].shape[:2]) for i in range(len(images))]

    @property
    def backbone(self) -> Any:
        """The network's ResNet-18, in eval mode."""
        return self._net.cp.resnet

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        """Returns (N, 19, size, size) of the main head alone. The network's own `forward` also
        computes two heads that only training needs.
        """
        features, context, _ = self._net.cp(x)
        logits, _ = self._net.conv_out(self._net.ffm(features, context))
        return torch.nn.functional.interpolate(
            logits, x.shape[2:], mode="bilinear", align_corners=True
        )


def _to_size(labels: LabelMap, size: tuple[int, ...]) -> LabelMap:
    height, width = size
    if labels.shape == (height, width):
        return labels
    resized = cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST)
    return np.asarray(resized, np.uint8)


def bisenet(classes: int) -> Any:
    """Returns an instance of facexlib.parsing.bisenet.BiSeNet.

    While the module is imported, empty modules replace its two parent packages, so that their
    `__init__` files don't run.
    """
    spec = importlib.util.find_spec("facexlib")
    assert spec is not None and spec.submodule_search_locations is not None, (
        "facexlib is a dependency"
    )
    root = spec.submodule_search_locations[0]
    parents = {"facexlib": root, "facexlib.parsing": f"{root}/parsing"}
    for name, folder in parents.items():
        if name not in sys.modules:
            module = ModuleType(name)
            module.__path__ = [folder]
            sys.modules[name] = module
    try:
        return importlib.import_module("facexlib.parsing.bisenet").BiSeNet(num_class=classes)
    finally:
        for name in parents:
            if getattr(sys.modules[name], "__file__", None) is None:  # an empty one from above
                del sys.modules[name]
