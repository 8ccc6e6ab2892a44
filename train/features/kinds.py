"""The kinds of features: what they depend on, how large they are, and how they are computed."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from configs.errors import ConfigError, WeightsError
from configs.training import TrainConfig
from model.base import base_path
from model.conditions import photo_images
from model.consistentid import (
    copy_weights,
    encode_images,
    image_encoder_place,
    load_model,
)
from model.pixels import clip_normalised, training_image, vae_pixels
from model.spec import spec_named
from stages.record import Record
from stages.regions import MAX_REGIONS

MEMBER: Final = "npy"  # ending of a sample's file
_CONFIG: Final = "config.json"
# names of an encoder's weights, in the order in which the libraries look for them
_WEIGHTS: Final = (
    *("diffusion_pytorch_model*.safetensors", "model*.safetensors"),
    *("diffusion_pytorch_model*.bin", "pytorch_model*.bin"),
)


class Kind(ABC):
    """A kind of features, for the settings of a run.

    version: raised when the same sample and encoder give other features.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.spec = spec_named(config.model.spec)
        self.base = base_path(config.model.base or self.spec.base)
        if not self.base:
            raise ConfigError(
                f"model.spec={self.spec.name} has no base model of its own, so features can't be "
                "computed before a run has made one. Set model.base to its folder."
            )
        self.dtype = np.dtype(config.features.dtype)

    @property
    @abstractmethod
    def place(self) -> tuple[str, str]:
        """Folder or hub id of the encoder, and the folder in it."""

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What the features depend on besides the encoder, the type and the sample."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of a sample's features, at most."""

    @abstractmethod
    def load(self, device: str) -> Any:
        """Returns the encoder in float32."""

    @abstractmethod
    def encode(self, encoder: Any, records: Sequence[Record], device: str) -> list[Tensor]:
        """Returns the features of each record, float32 on the CPU."""

    def _loaded(self, kind: Any, device: str) -> Any:
        root, folder = self.place
        model = load_model(kind, root, subfolder=folder, dtype=torch.float32)
        model.requires_grad_(False).eval()
        copy_weights(model)
        return model.to(device)

    @cached_property
    def description(self) -> dict[str, Any]:
        """The contents of features.json: all that the features depend on."""
        return {
            "kind": self.name,
            "version": self.version,
            "dtype": str(self.dtype),
            "encoder": encoder_digest(*self.place),
            **self.settings,
        }

    @property
    def folder(self) -> str:
        """The name of the features' folder."""
        text = json.dumps(self.description, sort_keys=True)
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def stored(self, features: Tensor) -> npt.NDArray[Any]:
        """Returns a sample's features as they are stored."""
        return features.numpy().astype(self.dtype)

    def check(self, stored: npt.NDArray[Any]) -> None:
        """Raises ValueError for an array that can't be a sample's stored features."""
        expected = self.shape
        if stored.dtype != self.dtype or stored.shape != expected:
            raise ValueError(f"{stored.dtype} {stored.shape}, expected {self.dtype} {expected}")

    @property
    def bytes_per_sample(self) -> int:
        """How much space a sample takes, at most."""
        return int(np.prod(self.shape)) * self.dtype.itemsize + 2048  # headers and padding


class VaeKind(Kind):
    """Mean and log variance of the training image's latents, (8, h, w)."""

    name = "vae"

    def __init__(self, config: TrainConfig) -> None:
        if config.buckets:
            raise ConfigError(
                "features of the kind vae are those of square images, and buckets=true crops to "
                "other shapes. Leave vae out of features.kinds, or set buckets=false."
            )
        super().__init__(config)

    @property
    def place(self) -> tuple[str, str]:
        return self.base, "vae"

    @property
    def settings(self) -> dict[str, Any]:
        return {"resolution": self.config.resolution, "crop": "centre"}

    @cached_property
    def shape(self) -> tuple[int, ...]:
        config = read_config(*self.place)
        side = self.config.resolution // 2 ** (len(config["block_out_channels"]) - 1)
        return 2 * int(config["latent_channels"]), side, side

    def load(self, device: str) -> Any:
        import diffusers

        return self._loaded(diffusers.AutoencoderKL, device)

    @torch.no_grad()
    def encode(self, encoder: Any, records: Sequence[Record], device: str) -> list[Tensor]:
        images = torch.stack([training_image(each, self.config.resolution) for each in records])
        moments = encoder.encode(vae_pixels(images.to(device))).latent_dist.parameters
        return [*moments.float().cpu()]


class ImageKind(Kind):
    """The image encoder's states of the photograph and of each of its regions, in the order of
    `model.conditions.photo_images`: (1 + regions, tokens, V).
    """

    name = "image"

    @property
    def place(self) -> tuple[str, str]:
        return image_encoder_place(self.spec, self.base, self.config.model.image_encoder or None)

    @property
    def settings(self) -> dict[str, Any]:
        return {"mode": self.config.model.mode, "side": self.spec.vision_size}

    @cached_property
    def shape(self) -> tuple[int, ...]:
        import transformers

        # also reads the configuration of a whole CLIP model, which the published encoders have
        config = transformers.CLIPVisionConfig.from_pretrained(encoder_folder(*self.place))
        tokens = (config.image_size // config.patch_size) ** 2 + 1
        return 1 + MAX_REGIONS, tokens, config.hidden_size

    def check(self, stored: npt.NDArray[Any]) -> None:
        most, *expected = self.shape
        if (
            stored.dtype != self.dtype
            or [*stored.shape[1:]] != expected
            or not 1 <= len(stored) <= most
        ):
            raise ValueError(
                f"{stored.dtype} {stored.shape}, expected {self.dtype}, up to {most} × {expected}"
            )

    def load(self, device: str) -> Any:
        import transformers

        return self._loaded(transformers.CLIPVisionModelWithProjection, device)

    @torch.no_grad()
    def encode(self, encoder: Any, records: Sequence[Record], device: str) -> list[Tensor]:
        images = [
            torch.stack([photo, *regions.values()])
            for photo, regions in (
                photo_images(record, self.spec, self.config.model.mode) for record in records
            )
        ]
        counts = [len(each) for each in images]
        if self.config.features.placement.batch_size == 1:  # each image by itself, as in training
            rows = [one[None] for each in images for one in each]
        else:
            rows = [torch.cat(images)]
        hidden = torch.cat(
            [
                encode_images(encoder, clip_normalised(each.to(device))).float().cpu()
                for each in rows
            ]
        )
        return [*torch.split(hidden, counts)]


KINDS: Final[dict[str, type[Kind]]] = {kind.name: kind for kind in (VaeKind, ImageKind)}


def encoder_folder(root: str, folder: str) -> Path:
    """Returns the local folder of an encoder: that of a hub id is downloaded. Raises WeightsError
    if it can't be.
    """
    if Path(root).is_dir():
        return Path(root, folder)
    from huggingface_hub import snapshot_download

    inside = f"{folder}/" if folder else ""
    try:
        for weights in (_WEIGHTS[:2], _WEIGHTS[2:]):
            names = [f"{inside}{name}" for name in (_CONFIG, *weights)]
            path = Path(snapshot_download(root, allow_patterns=names), folder)
            if any(_weights_in(path)):
                return path
        raise OSError("it has no weights in safetensors or PyTorch's form")
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"the encoder {root}/{folder} can't be downloaded ({error}). Name a folder in "
            "diffusers' layout, or a hub id (which needs a network)."
        ) from error


def read_config(root: str, folder: str) -> dict[str, Any]:
    """Returns an encoder's config.json. Raises WeightsError if it can't be read."""
    path = encoder_folder(root, folder) / _CONFIG
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{path} can't be read ({error}). Name a base in diffusers' layout."
        ) from error
    return values


def encoder_digest(root: str, folder: str) -> str:
    """Returns a digest of an encoder's weights and configuration."""
    path, digest = encoder_folder(root, folder), hashlib.sha256()
    for file in (path / _CONFIG, *_weights_in(path)):
        with file.open("rb") as stream:
            line = f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n"
        digest.update(line.encode())
    return digest.hexdigest()


def _weights_in(path: Path) -> list[Path]:
    """Returns the files of weights that are loaded, without variants such as fp16."""
    for pattern in _WEIGHTS:
        files = [file for file in sorted(path.glob(pattern)) if ".fp16" not in file.name]
        if files:
            return files
    return []
