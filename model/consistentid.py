"""ConsistentID: the adapter as one module, and the base model that it adapts.

`encode_frozen` runs the parts that never train (text encoder, image encoder) and
`ConsistentID.prepare` those that do. Training and inference both call the two; they differ in
what they do with the UNet.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from configs.errors import WeightsError
from configs.training import Part
from model.attention import IdentityCrossAttention, RegionScores, install_processors
from model.base import base_path
from model.conditions import ConditionBatch
from model.facial_encoder import facial_encoder
from model.projector import identity_projector
from model.prompt import add_marks
from model.spec import ModelSpec
from stages.regions import Mode


class HasTextEncoders(Protocol):
    """`BaseModels`, or a pipeline of diffusers. SDXL has a `text_encoder_2` too."""

    text_encoder: Any


@dataclass(slots=True, kw_only=True)
class BaseModels:
    """The base model's parts, as transformers and diffusers classes.

    Only SDXL has a second tokenizer and text encoder.
    """

    tokenizer: Any
    text_encoder: Any
    vae: Any
    unet: Any
    image_encoder: Any
    scheduler: Any
    tokenizer_2: Any = None
    text_encoder_2: Any = None

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The parts that have weights, by attribute name."""
        names = ("text_encoder", "text_encoder_2", "vae", "unet", "image_encoder")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def vae_factor(self) -> int:
        """Side of the square of pixels that one latent encodes."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def to(self, device: torch.device | str) -> BaseModels:
        """Moves all parts to `device`, in place; returns self."""
        for module in self.modules.values():
            module.to(device)
        return self


def load_base(
    spec: ModelSpec,
    base: str | Path | None = None,
    *,
    image_encoder: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> BaseModels:
    """Loads the base model, frozen and in eval mode.

    base: a folder in diffusers' layout, a hub id or "small"; None: spec.base. image_encoder: a
    folder or hub id; None: `image_encoder/` in the base's folder if there is one, else
    spec.image_encoder. Raises WeightsError if a part or one of its weights is missing, or can't be
    downloaded.
    """
    import diffusers
    import transformers

    root = base_path(str(base or spec.base))
    if not root:
        raise WeightsError(
            f"model {spec.name!r} has no public base model; make one with "
            "model.tiny.make_tiny_base and pass its folder"
        )
    encoder, encoder_folder = image_encoder_place(spec, root, image_encoder)

    def model(kind: Any, folder: str) -> Any:
        return load_model(kind, root, subfolder=folder, dtype=dtype)

    def other(kind: Any, folder: str) -> Any:
        with _named(kind, root, folder):
            return kind.from_pretrained(root, subfolder=folder)

    models = BaseModels(
        tokenizer=add_marks(other(transformers.CLIPTokenizer, "tokenizer")),
        text_encoder=model(transformers.CLIPTextModel, "text_encoder"),
        vae=model(diffusers.AutoencoderKL, "vae"),
        unet=model(diffusers.UNet2DConditionModel, "unet"),
        image_encoder=load_model(
            transformers.CLIPVisionModelWithProjection,
            encoder,
            subfolder=encoder_folder,
            dtype=dtype,
        ),
        scheduler=other(diffusers.EulerDiscreteScheduler, "scheduler"),
    )
    if spec.two_text_encoders:
        models.tokenizer_2 = other(transformers.CLIPTokenizer, "tokenizer_2")
        models.text_encoder_2 = model(transformers.CLIPTextModelWithProjection, "text_encoder_2")
    for module in models.modules.values():
        module.eval().requires_grad_(False)
    return models.to(device)


def image_encoder_place(
    spec: ModelSpec, root: str, image_encoder: str | Path | None
) -> tuple[str, str]:
    """Returns where the image encoder of a base is: a folder or hub id, and the folder in it. The
    arguments are those of `load_base`.
    """
    if Path(root, "image_encoder").is_dir() and image_encoder is None:
        return root, "image_encoder"
    return str(image_encoder or spec.image_encoder), ""


def load_model(kind: Any, root: str, *, subfolder: str = "", **options: Any) -> Any:
    """Loads a model of diffusers or transformers, and checks that all of its weights were there.

    The libraries only log a warning for missing weights, and go on with random ones. kind: the
    class. root, subfolder: a folder or hub id, and the folder in it. options: of `from_pretrained`;
    those that are None are left out. Raises WeightsError if the model can't be loaded, or names the
    first missing weight.
    """
    passed = {name: value for name, value in options.items() if value is not None}
    with _named(kind, root, subfolder):
        model, report = kind.from_pretrained(
            root, subfolder=subfolder, output_loading_info=True, **passed
        )
    # In one library a list of keys, in the other a set; mismatched keys are (key, shape, shape).
    missing = sorted(map(str, (*report["missing_keys"], *report["mismatched_keys"])))
    if missing:
        raise WeightsError(
            f"{'/'.join(filter(None, (root, subfolder)))} lacks {len(missing)} weights of a "
            f"{kind.__name__}, the first is {missing[0]}. The files are incomplete or of another "
            "model: download them again, or name another base model."
        )
    return model


def copy_weights(module: nn.Module) -> None:
    """Copies all weights into memory of their own.

    Those of a file that is mapped into memory begin at any address, and on CPUs the last bit of a
    product depends on that.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()


@contextmanager
def _named(kind: Any, root: str, subfolder: str) -> Iterator[None]:
    """Adds to an error while loading which part of which model it concerns."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        place = f"the {subfolder} of {root!r}" if subfolder else repr(root)
        raise WeightsError(
            f"{place} could not be loaded as a {kind.__name__}: {error}; name a base model in "
            "diffusers' layout, a folder or a hub id (which needs a network)"
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """The frozen parts' outputs for a batch, with the rest of what the adapter reads.

    text_hidden: (B, 77, C). pooled: (B, P), of SDXL only. clip_hidden: (B, N, V), the image
    encoder's states of the photograph; region_hidden: (B, 5, N, V), of the region images.
    identity: (B, 512). token_mask: (B, 77). token_valid: (B, 5).
    """

    text_hidden: Tensor
    pooled: Tensor | None
    clip_hidden: Tensor
    region_hidden: Tensor
    identity: Tensor
    token_mask: Tensor
    token_valid: Tensor


@torch.no_grad()
def encode_frozen(base: BaseModels, batch: ConditionBatch) -> Features:
    """Encodes the texts and images of a batch that is on the models' device.

    All images go through the image encoder in one call.
    """
    size, slots = batch.region_pixels.shape[:2]
    hidden = encode_images(
        base.image_encoder, torch.cat((batch.clip_pixels, batch.region_pixels.flatten(0, 1)))
    )
    text_hidden, pooled = encode_text(base, batch.input_ids, batch.input_ids_2)
    return Features(
        text_hidden=text_hidden,
        pooled=pooled,
        clip_hidden=hidden[:size],
        region_hidden=hidden[size:].reshape(size, slots, *hidden.shape[1:]),
        identity=batch.identity,
        token_mask=batch.token_mask,
        token_valid=batch.token_valid,
    )


@torch.no_grad()
def encode_images(image_encoder: Any, pixels: Tensor) -> Tensor:
    """CLIP-normalised images (N, 3, S, S) → the second-to-last hidden states (N, tokens, V)."""
    hidden: Tensor = image_encoder(
        pixels.to(image_encoder.dtype), output_hidden_states=True
    ).hidden_states[-2]
    return hidden


@torch.no_grad()
def encode_text(
    base: HasTextEncoders,
    input_ids: Tensor,
    input_ids_2: Tensor | None = None,
    clip_skip: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Ids (B, 77) → text states (B, 77, C), and the pooled states (B, P) or None.

    Only a base with two text encoders has pooled states and needs input_ids_2; ValueError if it
    gets none. clip_skip: number of last layers to leave out, as in diffusers' pipelines.
    """
    skipped = clip_skip or 0
    second_encoder = getattr(base, "text_encoder_2", None)
    if second_encoder is None:
        if not skipped:
            return base.text_encoder(input_ids)[0], None
        layers = base.text_encoder(input_ids, output_hidden_states=True).hidden_states
        return base.text_encoder.final_layer_norm(layers[-1 - skipped]), None
    if input_ids_2 is None:
        raise ValueError("this base has two text encoders, but input_ids_2 is None; pass both ids")
    first = base.text_encoder(input_ids, output_hidden_states=True).hidden_states[-2 - skipped]
    second = second_encoder(input_ids_2, output_hidden_states=True)
    return torch.cat((first, second.hidden_states[-2 - skipped]), dim=-1), second.text_embeds


def part_of(key: str) -> Part:
    """Returns the part of the adapter that a weight belongs to.

    key: of the weight, as in `ConsistentID.state_dict`.
    """
    head = key.partition(".")[0]
    if head == "adapter_modules":
        return "identity_kv" if "_ip." in key else "lora"
    return "projector" if head == "image_proj_model" else "facial_encoder"


class ConsistentID(nn.Module):
    """The adapter: ID projector, facial encoder, and the attention processors, put into `unet`.

    The attributes have the names of the published weights' prefixes. The processors are modules of
    the UNet as well, so `unet.parameters()` contains them. Parts that the spec is without have
    neither parameters nor an effect. Raises WeightsError if the UNet's text tokens have another
    width than the spec's.
    """

    def __init__(self, spec: ModelSpec, unet: Any, mode: Mode) -> None:
        super().__init__()
        width = unet.config.cross_attention_dim
        if width != spec.cross_attention_dim:
            raise WeightsError(
                f"model {spec.name!r} expects text tokens {spec.cross_attention_dim} wide, but "
                f"the UNet takes {width}; choose the model.spec that fits the base"
            )
        self.spec = spec
        self.mode: Mode = mode
        self.image_proj_model = identity_projector(spec)
        self.FacialEncoder = facial_encoder(spec)
        self.adapter_modules = install_processors(unet, spec, mode)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def train_only(self, parts: Collection[Part]) -> None:
        """Makes the weights of these parts require gradients, and no others."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(part_of(name) in parts)

    def set_scale(self, scale: float) -> None:
        """Sets the weight of the ID attention in every layer: 1 as in training, 0 for none."""
        for processor in self.adapter_modules:
            if isinstance(processor, IdentityCrossAttention):
                processor.scale = float(scale)

    def encode_identity(
        self,
        identity: Tensor,
        clip_hidden: Tensor,
        *,
        shortcut: bool | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        """Identity (B, 512) or (B, 1, 512), photograph's states (B, N, V) → ID tokens (B, 4, C).

        shortcut (None: the spec's) and scale: see `IdentityProjector.forward`.
        """
        return self.image_proj_model(  # type: ignore[no-any-return]
            identity.flatten(1).to(self.dtype),
            self._states(clip_hidden),
            shortcut=self.spec.shortcut if shortcut is None else shortcut,
            scale=scale,
        )

    def fuse(
        self,
        text_hidden: Tensor,
        regions: Tensor,
        token_mask: Tensor,
        token_valid: Tensor,
        strength: Tensor | None = None,
    ) -> Tensor:
        """Fuses regions' tokens (B, R, C) into the marked tokens of the text (B, 77, C); see
        `FacialEncoder.forward`.
        """
        return self.FacialEncoder.fuse(
            text_hidden.to(self.dtype),
            regions.to(self.dtype),
            token_mask,
            token_valid,
            strength,
        )

    def region_tokens(self, region_hidden: Tensor) -> Tensor:
        """Hidden states of region images (B, R, N, V) → one token each (B, R, C)."""
        return self.FacialEncoder.region_tokens(self._states(region_hidden))

    def _states(self, hidden: Tensor) -> Tensor:
        """Converts the image encoder's states to the adapter's type. Under autocast it returns them
        unchanged, since autocast converts them, and a copy would be large.
        """
        return hidden if torch.is_autocast_enabled(hidden.device.type) else hidden.to(self.dtype)

    def prepare(self, features: Features) -> Tensor:
        """Returns `encoder_hidden_states` (B, 81, C): the fused text, then the ID tokens."""
        regions = self.region_tokens(features.region_hidden)
        text = self.fuse(features.text_hidden, regions, features.token_mask, features.token_valid)
        return torch.cat(
            (text, self.encode_identity(features.identity, features.clip_hidden)), dim=1
        )


def predict_noise(
    unet: Any,
    latents: Tensor,
    timesteps: Tensor,
    states: Tensor,
    *,
    token_idx: Tensor | None = None,
    pooled: Tensor | None = None,
    time_ids: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Runs the UNet; returns its prediction (B, 4, h, w) and the hooked layers' region scores.

    latents: (B, 4, h, w); states: (B, 81, C). Both may have any floating type; the prediction has
    the UNet's. token_idx: (B, 5), the region tokens whose scores are returned (see
    `RegionScores`); without it the list is empty. pooled (B, P), time_ids (B, 6): of SDXL.
    """
    region_scores = None if token_idx is None else RegionScores(token_idx)
    dtype = unet.conv_in.weight.dtype  # unet.dtype may be that of the adapter's processors
    added = None if pooled is None else {"text_embeds": pooled.to(dtype), "time_ids": time_ids}
    prediction: Tensor = unet(
        latents.to(dtype),
        timesteps,
        encoder_hidden_states=states.to(dtype),
        cross_attention_kwargs=None if region_scores is None else {"region_scores": region_scores},
        added_cond_kwargs=added,
        return_dict=False,
    )[0]
    return prediction, [] if region_scores is None else region_scores.scores
