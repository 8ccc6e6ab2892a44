"""Identity: a person read from a photograph, which can be saved and reused for any prompt.

The photograph goes through the stages of the data set pipeline, so its record equals that of a
sample in a shard. An identity also has the image encoder's states, which take longest to compute.
It has no ID tokens: the adapter computes them quickly, and without them an identity can be used
with every adapter that has the same image encoder and face embedder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from configs.errors import SourceError
from model.conditions import photo_images
from model.consistentid import encode_images
from model.pixels import clip_normalised
from model.spec import ModelSpec
from stages.record import Record
from stages.regions import Mode, word_of
from stages.storage.samples import from_members, to_members

_FORMAT: Final = "consistentid-identity-2"


@dataclass(frozen=True, slots=True, weakref_slot=True, kw_only=True, eq=False)
class Identity:
    """A person, from one photograph; tensors are on the CPU.

    record: the photograph's record after the stages. regions: names of the R regions in it, in
    `mode`. spec: the model that the photograph was read for, which makes a difference in legacy
    mode only. embedder: sha256 of the weights that made the embedding. clip_hidden: (N, V), the
    image encoder's states of the photograph; region_hidden: (R, N, V), those of the regions;
    zero_hidden: (N, V), those of zero pixels, for the unconditional branch.
    """

    record: Record
    mode: Mode
    spec: str
    embedder: str
    regions: tuple[str, ...]
    clip_hidden: Tensor
    region_hidden: Tensor
    zero_hidden: Tensor

    @property
    def embedding(self) -> Tensor:
        """The ArcFace embedding, (512,) float32, unit norm."""
        assert self.record.identity is not None, "an identity's record has been through all stages"
        return torch.from_numpy(self.record.identity.copy())

    def with_region_of(self, other: Identity, word: str) -> Identity:
        """Returns this person with another's image states of a region.

        word: face, ears, eyes, nose or mouth. All else, the ID tokens' embedding too, stays this
        person's. Raises ValueError if one of the two doesn't show the region.
        """
        own, foreign = (
            next((row for row, name in enumerate(each.regions) if word_of(name) == word), None)
            for each in (self, other)
        )
        if own is None or foreign is None:
            raise ValueError(
                f"{word!r} can't be taken from {other.record.source}, whose regions are "
                f"{', '.join(other.regions) or 'none'}, for {self.record.source}, whose are "
                f"{', '.join(self.regions) or 'none'}; choose a region that both show"
            )
        hidden = self.region_hidden.clone()
        hidden[own] = other.region_hidden[foreign]
        return replace(self, region_hidden=hidden)

    def save(self, path: str | Path) -> Path:
        """Writes a safetensors file and returns its path.

        It holds the members of the record's sample as bytes, and the states as tensors.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"member.{name}": _bytes_to_tensor(data)
            for name, data in to_members(self.record, ()).items()
        }
        tensors |= {name: getattr(self, name).contiguous() for name in _STATES}
        # A single entry, because safetensors writes several in no fixed order, and saving the same
        # identity again should give the same bytes.
        metadata = {
            "identity": json.dumps(
                {
                    "format": _FORMAT,
                    "mode": self.mode,
                    "spec": self.spec,
                    "embedder": self.embedder,
                    "regions": self.regions,
                }
            )
        }
        partial = target.with_name(f".{target.name}.partial")
        save_file(tensors, partial, metadata=metadata)
        partial.replace(target)
        return target

    @classmethod
    def load(cls, path: str | Path) -> Identity:
        """Reads a file that `save` wrote.

        Raises SourceError for a file that doesn't exist or holds no identity.
        """
        source = Path(path)
        if not source.is_file():
            raise SourceError(
                f"no identity at {source}; name the identity.safetensors of an infer.cli run"
            )
        try:
            with safe_open(source, framework="pt") as file:
                metadata = json.loads((file.metadata() or {}).get("identity", "{}"))
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}, expected {_FORMAT!r}")
            prefix = "member."
            members = {
                name.removeprefix(prefix): value.numpy().tobytes()
                for name, value in tensors.items()
                if name.startswith(prefix)
            }
            mode: Mode = "legacy" if metadata["mode"] == "legacy" else "corrected"
            return cls(
                record=from_members(members),
                mode=mode,
                spec=str(metadata["spec"]),
                embedder=str(metadata["embedder"]),
                regions=tuple(map(str, metadata["regions"])),
                **{name: tensors[name] for name in _STATES},
            )
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise SourceError(
                f"{source} holds no identity ({error}); make it again from the photograph"
            ) from error


_STATES: Final = ("clip_hidden", "region_hidden", "zero_hidden")


@torch.no_grad()
def encode_photo(
    record: Record,
    image_encoder: Any,
    spec: ModelSpec,
    mode: Mode,
    embedder: str,
    device: torch.device | str = "cpu",
) -> Identity:
    """Makes the identity of a record that has been through the stages, e.g. of a shard.

    The photograph, its regions and zero pixels go through the image encoder in one call. embedder:
    sha256 of the weights that made the record's embedding. device: of the image encoder.
    """
    photo, regions = photo_images(record, spec, mode)
    pixels = clip_normalised(torch.stack((photo, *regions.values())))
    zeros = torch.zeros_like(pixels[:1])  # zero after normalisation, which is not black
    batch = torch.cat((pixels, zeros)).to(device)
    hidden = encode_images(image_encoder, batch).cpu()
    return Identity(
        record=record,
        mode=mode,
        spec=spec.name,
        embedder=embedder,
        regions=tuple(regions),
        clip_hidden=hidden[0].clone(),
        region_hidden=hidden[1:-1].clone(),
        zero_hidden=hidden[-1].clone(),
    )


def joined(people: Sequence[Identity]) -> Identity:
    """Returns the first of several identities of one person, with the mean of their embeddings."""
    if len(people) == 1:
        return people[0]
    mean = torch.stack([person.embedding for person in people]).mean(0)
    record = replace(people[0].record, identity=(mean / mean.norm()).numpy())
    return replace(people[0], record=record)


def _bytes_to_tensor(data: bytes) -> Tensor:
    array: Any = np.frombuffer(data, np.uint8).copy()
    return torch.from_numpy(array)
