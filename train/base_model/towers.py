"""The text tower and the image tower: CLIP at small size (Radford et al. 2021).

Three contrastive losses: between a photograph and its caption; the regions of a face and the
face's caption; a photograph and the regions of another photograph of the same person (of the same
photograph if there is no other). The third teaches the image tower whose face it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.base_model import TowersConfig
from model.pixels import clip_normalised
from model.spec import TOKEN_LIMIT, ModelSpec
from train import draws
from train.base_model.part import Part
from train.base_model.samples import TEXTS, Samples

if TYPE_CHECKING:
    from accelerate import Accelerator

    from train.mixture import Mixture

_PROJECTION: Final = 64  # width of the space in which texts and images are compared
_PATCH: Final = 8  # pixels
_VOCABULARY: Final = 49_408  # of CLIP's tokenizer
_BOS: Final = 49_406
_EOS: Final = 49_407
_WEIGHT_DECAY: Final = 0.05
_CHECKED: Final = 256  # samples of the metric


class Towers(Part):
    """Trains transformers' CLIPModel. See Part. mixture: tells who has several photographs."""

    name: ClassVar[str] = "towers"
    losses: ClassVar[tuple[str, ...]] = ("caption", "face_caption", "person")
    settings: TowersConfig

    def __init__(
        self,
        settings: TowersConfig,
        spec: ModelSpec,
        seed: int,
        accelerator: Accelerator,
        samples: Samples,
        mixture: Mixture,
    ) -> None:
        super().__init__(settings, settings.steps, seed, accelerator)
        self._samples, self._mixture = samples, mixture
        torch.manual_seed(seed)
        self._clip = make_towers(settings, spec)
        model = _Contrast(self._clip)
        optimizer = torch.optim.AdamW(
            model.parameters(), betas=(0.9, 0.98), weight_decay=_WEIGHT_DECAY, fused=True
        )
        self._model, self._optimizer = accelerator.prepare(model, optimizer)

    @property
    def stateful(self) -> Mapping[str, Any]:
        return {"clip": self._clip, "optimizer": self._optimizer}

    def update(self, step: int, positions: Sequence[int], numbers: Sequence[int]) -> Tensor:
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        others = [self._other(*each) for each in zip(positions, numbers, strict=True)]
        with self.autocast():
            losses: Tensor = self._model(*self._inputs(list(numbers), others))
        self.optimize(self._optimizer, losses.sum(), [*self._clip.parameters()])
        return losses.detach()

    def _other(self, position: int, number: int) -> int:
        """Returns another sample of the same person, drawn at random; the sample if it is alone."""
        others = self._mixture.others(number)
        if not others:
            return number
        return others[draws.integer(len(others), self.seed, "towers_other", position)]

    def _inputs(self, numbers: list[int], others: list[int]) -> tuple[Tensor, ...]:
        samples, device = self._samples, self.accelerator.device
        texts = samples.ids[numbers]
        return tuple(
            each.to(device)
            for each in (
                clip_normalised(samples.photos[numbers]),
                *_shown_regions(samples, numbers),
                *_shown_regions(samples, others),
                texts[:, TEXTS.index("image")],
                texts[:, TEXTS.index("face")],
            )
        )

    def preview(self) -> Tensor:
        """The matrix of cosines of photographs (rows) and captions, of the first samples, from
        black (-1) to white (1).
        """
        photos, texts = self._embedded(48)
        cosines = (photos @ texts.T)[None, None]
        return F.interpolate(cosines, scale_factor=4.0, mode="nearest")[0].expand(3, -1, -1)

    def save(self, folder: Path) -> dict[str, float]:
        """Writes text_encoder/ and image_encoder/."""
        import transformers

        clip = self._clip
        text = transformers.CLIPTextModel(clip.config.text_config)
        text.load_state_dict(clip.text_model.state_dict())
        vision = transformers.CLIPVisionModelWithProjection(clip.config.vision_config)
        vision.vision_model.load_state_dict(clip.vision_model.state_dict())
        vision.visual_projection.load_state_dict(clip.visual_projection.state_dict())
        text.save_pretrained(folder / "text_encoder")
        vision.save_pretrained(folder / "image_encoder")
        photos, texts = self._embedded(_CHECKED)
        best = (photos @ texts.T).argmax(1).cpu()
        captions = self._samples.ids[: len(best), TEXTS.index("image")]
        right = (captions[best] == captions).all(1)  # several samples may have one caption
        return {"caption_rank_1": float(right.float().mean())}

    @torch.no_grad()
    def _embedded(self, count: int) -> tuple[Tensor, Tensor]:
        numbers = [*range(min(count, len(self._samples)))]
        photos, *_, captions, _ = self._inputs(numbers, numbers)
        return embed_images(self._clip, photos), embed_texts(self._clip, captions)


def _shown_regions(samples: Samples, numbers: list[int]) -> tuple[Tensor, Tensor]:
    """Returns the region images (B, 5, 3, S, S) as the tower reads them, and which are shown."""
    valid = samples.valid[numbers]
    images = clip_normalised(samples.regions[numbers])
    return torch.where(valid[:, :, None, None, None], images, 0.0), valid


def make_towers(settings: TowersConfig, spec: ModelSpec) -> Any:
    """Makes a CLIPModel of the spec's widths, with random weights."""
    import transformers

    text = transformers.CLIPTextConfig(
        vocab_size=_VOCABULARY,
        hidden_size=spec.cross_attention_dim,
        intermediate_size=4 * spec.cross_attention_dim,
        num_hidden_layers=settings.text_layers,
        num_attention_heads=4,
        max_position_embeddings=TOKEN_LIMIT,
        projection_dim=_PROJECTION,
        bos_token_id=_BOS,
        eos_token_id=_EOS,
        pad_token_id=_EOS,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=spec.vision_dim,
        intermediate_size=4 * spec.vision_dim,
        num_hidden_layers=settings.image_layers,
        num_attention_heads=4,
        image_size=spec.vision_size,
        patch_size=_PATCH,
        projection_dim=_PROJECTION,
    )
    config = transformers.CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=_PROJECTION
    )
    return transformers.CLIPModel(config)


def embed_images(clip: Any, pixels: Tensor) -> Tensor:
    """Returns images (N, 3, S, S) in the common space, (N, 64) of unit norm."""
    pooled = clip.vision_model(pixel_values=pixels).pooler_output
    return F.normalize(clip.visual_projection(pooled), dim=-1)


def embed_texts(clip: Any, ids: Tensor) -> Tensor:
    """Returns texts (N, 77) in the common space, (N, 64) of unit norm."""
    pooled = clip.text_model(input_ids=ids).pooler_output
    return F.normalize(clip.text_projection(pooled), dim=-1)


class _Contrast(nn.Module):
    """The three losses, in one call, as distributed training requires."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip

    def forward(
        self,
        photos: Tensor,
        regions: Tensor,
        valid: Tensor,
        other_regions: Tensor,
        other_valid: Tensor,
        captions: Tensor,
        face_captions: Tensor,
    ) -> Tensor:
        """Returns the losses of captions, face captions and persons, (3,)."""
        scale = self.clip.logit_scale.exp().clamp(max=100.0)
        photo = embed_images(self.clip, photos)
        face, other_face = (
            self._faces(*each) for each in ((regions, valid), (other_regions, other_valid))
        )
        texts = embed_texts(self.clip, torch.cat((captions, face_captions)))
        text, face_text = texts.chunk(2)
        return torch.stack(
            [
                _contrastive(photo @ text.T * scale, _equal_rows(captions)),
                _contrastive(face @ face_text.T * scale, _equal_rows(face_captions)),
                _contrastive(photo @ other_face.T * scale, torch.eye(len(photo)).to(photo.device)),
            ]
        )

    def _faces(self, regions: Tensor, valid: Tensor) -> Tensor:
        """Returns the mean of each sample's regions (B, 5, 3, S, S), (B, 64) of unit norm."""
        shown = valid.float()[..., None]
        each = embed_images(self.clip, regions.flatten(0, 1)).reshape(*valid.shape, -1)
        return F.normalize((each * shown).sum(1), dim=-1)


def _equal_rows(ids: Tensor) -> Tensor:
    """Returns which of the texts (B, 77) are equal, (B, B), 0 or 1."""
    return (ids[:, None] == ids[None]).all(-1).float()


def _contrastive(logits: Tensor, same: Tensor) -> Tensor:
    """Returns the symmetric cross entropy of logits (B, B), where `same` (B, B) tells which columns
    are right for a row: several samples may have equal texts.
    """
    target = same / same.sum(1, keepdim=True)
    rows = F.cross_entropy(logits.float(), target)
    return (rows + F.cross_entropy(logits.float().T, target)) / 2
