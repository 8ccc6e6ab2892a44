"""The kinds of features: what they depend on, how large they are, and how they are computed."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from types import SimpleNamespace
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from configs.errors import ConfigError
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
from model.prompt import add_marks, training_text
from model.spec import TOKEN_LIMIT, spec_named
from model.tokens import text_tokens
from stages.codec import decode_labels
from stages.record import Record
from stages.regions import MAX_REGIONS, region_masks
from train.features.encoders import encoder_digest, encoder_folder, read_config, tokenizer_digest
from train.texts import TextStates, text_ids, text_states

MEMBER: Final = "npy"  # ending of a sample's file


def needed_encoders(config: TrainConfig) -> dict[str, str]:
    """Returns the kinds of features whose encoders run although features are read, and what for."""
    needed = {}
    if config.pair_prob:
        needed["text"] = "pairs with another text, as of fewer regions"
    if config.validation_steps:  # which also shows a person with another one's regions
        needed["text"] = " and ".join([*needed.values(), "validations"])
        if config.validation.portraits:
            needed["vae"] = "validations"
    return needed


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

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """The type of the array that is stored of a sample."""
        return np.dtype(self.config.features.dtype)

    @property
    def use(self) -> str:
        """Whether training runs the encoder, for people."""
        reason = needed_encoders(self.config).get(self.name)
        return f"is encoded only for {reason}" if reason else "its encoder doesn't run"

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
    def encode(self, encoder: Any, records: Sequence[Record], device: str) -> list[Any]:
        """Returns the features of each record, with float32 states on the CPU."""

    def _loaded(self, kind: Any, place: tuple[str, str], device: str) -> Any:
        root, folder = place
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
            "dtype": self.config.features.dtype,
            "encoder": encoder_digest(*self.place),
            **self.settings,
        }

    @property
    def folder(self) -> str:
        """The name of the features' folder."""
        text = json.dumps(self.description, sort_keys=True)
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def stored(self, features: Any) -> npt.NDArray[Any]:
        """Returns a sample's features, as `encode` returns them, as they are stored."""
        values: npt.NDArray[Any] = features.numpy().astype(self.dtype)
        return values

    def restored(self, stored: npt.NDArray[Any]) -> Any:
        """Returns stored features as training reads them."""
        return torch.from_numpy(stored)

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

        return self._loaded(diffusers.AutoencoderKL, self.place, device)

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

        return self._loaded(transformers.CLIPVisionModelWithProjection, self.place, device)

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


class TextKind(Kind):
    """A text's row (train/texts.py), and the ids that it was computed of: those of the sample's own
    captions and regions.

    With pairs, a region that the reference lacks may change the text, and so may a prompt. Training
    compares the ids, and encodes such a text.
    """

    name = "text"

    @property
    def place(self) -> tuple[str, str]:
        return self.base, "text_encoder"

    @property
    def _second(self) -> tuple[str, str]:
        return self.base, "text_encoder_2"

    @property
    def settings(self) -> dict[str, Any]:
        settings = {
            "spec": self.spec.name,
            "mode": self.config.model.mode,
            "tokenizer": tokenizer_digest(self.base, "tokenizer"),
        }
        if self.spec.two_text_encoders:
            settings["encoder_2"] = encoder_digest(*self._second)
            settings["tokenizer_2"] = tokenizer_digest(self.base, "tokenizer_2")
        return settings

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        import transformers

        width, pooled = 0, 0
        for place in (self.place, self._second) if self.spec.two_text_encoders else (self.place,):
            config = transformers.CLIPTextConfig.from_pretrained(encoder_folder(*place))
            width += config.hidden_size
            pooled = config.projection_dim if place == self._second else 0
        states = (TOKEN_LIMIT * width + pooled,)
        ids = ("ids", "<i4", (2, TOKEN_LIMIT))
        return np.dtype([ids, ("states", self.config.features.dtype, states)])

    @property
    def shape(self) -> tuple[int, ...]:
        return ()

    def load(self, device: str) -> Any:
        import transformers

        tokenizer = transformers.CLIPTokenizer.from_pretrained(self.base, subfolder="tokenizer")
        encoders = SimpleNamespace(
            tokenizer=add_marks(tokenizer),
            tokenizer_2=None,
            text_encoder=self._loaded(transformers.CLIPTextModel, self.place, device),
            text_encoder_2=None,
        )
        if self.spec.two_text_encoders:
            kind = transformers.CLIPTextModelWithProjection
            encoders.text_encoder_2 = self._loaded(kind, self._second, device)
            encoders.tokenizer_2 = transformers.CLIPTokenizer.from_pretrained(
                self.base, subfolder="tokenizer_2"
            )
        return encoders

    def encode(self, encoder: Any, records: Sequence[Record], device: str) -> list[TextStates]:
        ids = torch.stack(
            [self._ids(record, encoder.tokenizer, encoder.tokenizer_2) for record in records]
        )
        states = text_states(encoder, ids.to(device)).float().cpu()
        return [TextStates(*each) for each in zip(ids, states, strict=True)]

    def _ids(self, record: Record, tokenizer: Any, tokenizer_2: Any) -> Tensor:
        """Returns the ids that training reads of a sample without a pair, (2, 77)."""
        mode = self.config.model.mode
        text = training_text(
            record.caption,
            record.face_caption,
            tuple(region_masks(decode_labels(record.parsing), mode)),
            tokenizer,
            self.spec,
            mode,
        )
        tokens = text_tokens(text, tokenizer, mode, tokenizer_2)
        return text_ids(tokens.input_ids, tokens.input_ids_2)

    def stored(self, features: TextStates) -> npt.NDArray[Any]:
        return np.array((features.ids.numpy(), features.states.numpy()), self.dtype)

    def restored(self, stored: npt.NDArray[Any]) -> TextStates:
        ids, states = (np.ascontiguousarray(stored[name]) for name in ("ids", "states"))
        return TextStates(torch.from_numpy(ids).long(), torch.from_numpy(states))


KINDS: Final[dict[str, type[Kind]]] = {kind.name: kind for kind in (VaeKind, ImageKind, TextKind)}
