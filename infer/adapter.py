"""An adapter beside a pipeline: its encoders, what it needs to read photographs, and its cache."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, cast

import torch

from configs.errors import ConfigError
from configs.load import load
from configs.schema import DatasetConfig, DetectConfig, EmbedConfig
from infer.components import adapter_path, file_digest
from infer.conditioning import Ids, PersonTokens, TextStates, person_tokens
from infer.identity import Identity
from infer.offload import resident, uncompiled
from infer.photo import PhotoReader
from infer.text_cache import TextCache
from model.attention import merge_lora
from model.checkpoint import CONFIG_FILE, AdapterFile, build_adapter, read_adapter
from model.consistentid import ConsistentID, HasTextEncoders
from model.prompt import add_marks
from stages.regions import REGION_WORDS

DATASET_FILE: Final = "dataset.yaml"  # which the trainer writes beside the adapter
_REMEMBERED: Final = 16  # people
_ENCODERS: Final = ("image_proj_model", "FacialEncoder")
_PART_OF: Final = {"identity": "projector", **dict.fromkeys(REGION_WORDS, "facial_encoder")}
_ATTRIBUTE: Final = "consistentid_adapter"  # of a UNet that has one
_CACHES: Final = ("_people", "_texts", "_notices", "_read", "_tokenizer", "zero_states")


class Adapter:
    """An adapter in a UNet, and in all pipelines that share it, see `adapter_in`.

    file: the adapter; the attribute has no weights. unet: gets its attention processors; `remove`
    restores the ones before. device, dtype: of its weights. reader: reads photographs as its
    training data was read. digest: see `file_digest`. image_encoder: a folder or hub id; "": the
    one of the spec. Raises WeightsError as `model.checkpoint.build_adapter`.
    """

    def __init__(
        self,
        file: AdapterFile,
        unet: Any,
        reader: PhotoReader,
        *,
        device: torch.device,
        dtype: torch.dtype,
        digest: Future[str] | None = None,
        image_encoder: str = "",
    ) -> None:
        if getattr(unet, "encoder_hid_proj", None) is not None:
            raise ConfigError(
                "an IP-Adapter is loaded in the UNet, and both replace its attention; call "
                "unload_ip_adapter first"
            )
        self._processors = dict(unet.attn_processors)
        self.model: ConsistentID = build_adapter(file, unet, dtype=dtype, device=device)
        self.model.requires_grad_(False).eval()
        self.file = replace(file, state={})  # the model has copies; the file needs no memory
        self.unet, self.reader, self._digest = unet, reader, digest
        self.image_encoder = image_encoder or file.spec.image_encoder
        self.strength: dict[str, float] = {}
        self._forget()
        setattr(uncompiled(unet), _ATTRIBUTE, self)

    def _forget(self) -> None:
        """Empties the caches."""
        self._people: weakref.WeakKeyDictionary[Identity, PersonTokens] = (
            weakref.WeakKeyDictionary()
        )
        self._texts = TextCache()
        self._notices: set[str] = set()
        # by image encoder: people, and the first state of zero pixels (V,)
        self._read: weakref.WeakKeyDictionary[Any, dict[object, Identity]] = (
            weakref.WeakKeyDictionary()
        )
        self.zero_states: weakref.WeakKeyDictionary[Any, torch.Tensor] = weakref.WeakKeyDictionary()
        self._tokenizer: tuple[int, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the caches out of copies and pickles: they hold weak references."""
        state = {name: value for name, value in vars(self).items() if name not in _CACHES}
        return state | {"_digest": self.digest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        digest: Future[str] = Future()
        digest.set_result(state["_digest"])
        vars(self).update(state, _digest=digest)
        self._forget()

    @property
    def digest(self) -> str:
        """sha256 of the weights file; "" if it wasn't asked for."""
        return self._digest.result() if self._digest else ""

    @property
    def embedder(self) -> str:
        """sha256 of the weights that made the embeddings it was trained with; "" if unknown."""
        return self.file.embedder.sha256 if self.file.embedder else ""

    def is_in(self, unet: Any) -> bool:
        """Whether all of the adapter is in `unet` now; a user may have set other processors."""
        current = unet.attn_processors.values()
        return all(a is b for a, b in zip(current, self.model.adapter_modules, strict=True))

    def remove(self) -> None:
        """Restores the UNet's weights and processors from before, bit for bit. Processors that have
        been put in place of the adapter's stay.
        """
        self._take_out()
        if adapter_in(self.unet) is self:
            delattr(uncompiled(self.unet), _ATTRIBUTE)

    @contextmanager
    def removed(self) -> Iterator[None]:
        """Takes it out of the UNet and its pipelines for a while; a merged one is merged again."""
        merged = self.merged
        installed = dict(self.unet.attn_processors)
        self._take_out()
        delattr(uncompiled(self.unet), _ATTRIBUTE)
        try:
            yield
        finally:
            setattr(uncompiled(self.unet), _ATTRIBUTE, self)
            with resident(self.unet):
                self.unet.set_attn_processor(installed)
            if merged:
                self.merge()

    def merge(self) -> None:
        """Adds the LoRA to the UNet's weights; see `model.attention.merge_lora`."""
        with resident(self.unet):
            merge_lora(self.unet)

    def unmerge(self) -> None:
        """Restores the UNet's weights from before `merge`, bit for bit; also where other processors
        have been put in place of the adapter's.
        """
        with resident(self.unet):
            for name, processor in zip(self._processors, self.model.adapter_modules, strict=True):
                cast(Any, processor).unmerge(
                    self.unet.get_submodule(name.removesuffix(".processor"))
                )

    def _take_out(self) -> None:
        self.unmerge()
        own = {id(processor) for processor in self.model.adapter_modules}
        with resident(self.unet):
            self.unet.set_attn_processor(
                {
                    name: self._processors[name] if id(processor) in own else processor
                    for name, processor in self.unet.attn_processors.items()
                }
            )

    @contextmanager
    def hidden_from(self, controlnet: Any) -> Iterator[None]:
        """Hides the ID tokens from a ControlNet, which has only seen texts. The reference doesn't,
        so neither does legacy mode. controlnet: None if the pipeline has none.
        """
        if controlnet is None or self.model.mode == "legacy":
            yield
            return
        count = self.model.spec.num_tokens

        def text_alone(_: Any, arguments: Any, options: dict[str, Any]) -> Any:
            states = options["encoder_hidden_states"]
            return arguments, options | {"encoder_hidden_states": states[:, :-count]}

        handle = controlnet.register_forward_pre_hook(text_alone, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @property
    def merged(self) -> bool:
        return any(getattr(each, "merged", False) for each in self.model.adapter_modules)

    def set_scale(self, scale: float | Mapping[str, float]) -> None:
        """Sets the weight of the ID tokens' attention, or of single parts: `identity` is that
        weight, a region's word the weight of its image in its token. Parts that aren't named stay.

        Raises ConfigError for an unknown part, and for a weight that is negative or, of what the
        adapter lacks, not 0 or 1.
        """
        parts = scale if isinstance(scale, Mapping) else {"identity": scale}
        for name, value in parts.items():
            if name not in _PART_OF:
                raise ConfigError(f"scale of {name!r}: expected one of {', '.join(_PART_OF)}")
            if not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ConfigError(f"scale of {name}: {value!r}; expected a number of at least 0")
            if not self.model.spec.has(part := _PART_OF[name]) and value not in (0, 1):
                raise ConfigError(f"scale of {name}: {value!r}; without {part}, expected 0 or 1")
        self.strength |= {name: float(v) for name, v in parts.items() if name != "identity"}
        if "identity" in parts:
            self.model.set_scale(parts["identity"])

    def marked(self, tokenizer: Any) -> Any:
        """Returns a copy of a pipeline's tokenizer that has the marks too."""
        if self._tokenizer is None or self._tokenizer[0] != len(tokenizer):
            # its table of 49,000 merges is never changed, so it is shared
            merges = getattr(tokenizer, "_merges", None)
            shared = {id(merges): merges}
            self._tokenizer = (len(tokenizer), add_marks(copy.deepcopy(tokenizer, shared)))
        return self._tokenizer[1]

    def tokens_of(self, people: Sequence[Identity], device: torch.device) -> list[PersonTokens]:
        """Returns the tokens of people, which are computed once for each.

        The projector and the facial encoder are moved to `device`, and back if the UNet is
        elsewhere, as on a pipeline with offloading.
        """
        missing = [
            person
            for person in dict.fromkeys(people)
            if person not in self._people or self._people[person].identity.device != device
        ]
        if missing:
            with self._encoders_on(device):
                for person in missing:
                    self._people[person] = person_tokens(self.model, person, device)
        return [self._people[person] for person in people]

    def remembered(self, encoder: Any, key: object) -> Identity | None:
        """Returns the person that `remember` was given for this image encoder and key."""
        return None if encoder is None else self._read.get(encoder, {}).get(key)

    def remember(self, encoder: Any, key: object, person: Identity) -> Identity:
        """Remembers a person, and forgets the one from longest ago if there are many."""
        people = self._read.setdefault(encoder, {})
        people[key] = person
        while len(people) > _REMEMBERED:
            del people[next(iter(people))]
        return person

    def is_new(self, notice: str) -> bool:
        """Whether a notice is given for the first time."""
        seen = notice in self._notices
        self._notices.add(notice)
        return not seen

    def check(self, person: Identity) -> None:
        """Raises ConfigError for an identity that was made for another kind of adapter."""
        name, again = person.record.source, "make it again from the photograph"
        spec = self.model.spec
        if person.mode != self.model.mode:
            raise ConfigError(
                f"the identity of {name} was made in {person.mode} mode, the adapter is of "
                f"{self.model.mode} mode; {again}"
            )
        if person.mode == "legacy" and person.spec != spec.name:
            raise ConfigError(
                f"the identity of {name} was made for {person.spec}, the adapter is of "
                f"{spec.name}, which reads photographs in another way; {again}"
            )
        if self.embedder and person.embedder and person.embedder != self.embedder:
            raise ConfigError(
                f"the identity of {name} was made by a face embedder with sha256 "
                f"{person.embedder[:12]}, but the adapter was trained with {self._embedder_name}; "
                f"{again}, with the adapter's embedder (embed.weights)"
            )
        if person.clip_hidden.shape[-1] != spec.vision_dim:
            raise ConfigError(
                f"the identity of {name} was made with another image encoder: its states are "
                f"{person.clip_hidden.shape[-1]} wide, expected {spec.vision_dim}; {again}"
            )

    @property
    def _embedder_name(self) -> str:
        own = self.file.embedder
        return f"{own.name} (sha256 {own.sha256[:12]})" if own else "an unknown one"

    def text_states(
        self,
        encoders: HasTextEncoders,
        texts: Sequence[Ids],
        device: torch.device,
        clip_skip: int | None = None,
    ) -> TextStates:
        """Does what `infer.conditioning.text_states` does, from the cache where it can."""
        return self._texts.states(encoders, texts, device, clip_skip)

    @contextmanager
    def _encoders_on(self, device: torch.device) -> Iterator[None]:
        modules = [getattr(self.model, name) for name in _ENCODERS]
        before = next((w.device for module in modules for w in module.parameters()), device)
        for module in modules:
            module.to(device)
        try:
            yield
        finally:
            offloaded = next(self.unet.parameters()).device != device
            if before != device and offloaded:
                for module in modules:
                    module.to(before)


def install_adapter(
    unet: Any,
    source: str | Path,
    subfolder: str = "",
    weight_name: str = "",
    *,
    dataset: str | Path | DatasetConfig | None = None,
    image_encoder: str = "",
    **hub: Any,
) -> Adapter:
    """Puts an adapter into a UNet; the arguments are those of `load_consistentid_adapter`.

    One that is there is removed, unless the new one can't be read.
    """
    path = adapter_path(source, subfolder, weight_name, **hub)
    file = read_adapter(path)
    reader = PhotoReader(reading_config(path, file, dataset), file.spec, file.mode)
    if (before := adapter_in(unet)) is not None:
        before.remove()
    with resident(unet):
        weight = unet.conv_in.weight
        return Adapter(
            file,
            unet,
            reader,
            device=weight.device,
            dtype=weight.dtype,
            digest=file_digest(path),
            image_encoder=image_encoder,
        )


def adapter_in(unet: Any) -> Adapter | None:
    """Returns the adapter that was put into a UNet, None if there is none."""
    adapter: Adapter | None = getattr(uncompiled(unet), _ATTRIBUTE, None)
    return adapter


def reading_config(
    source: Path, file: AdapterFile, dataset: str | Path | DatasetConfig | None = None
) -> DatasetConfig:
    """Returns the configuration of the stages that read photographs for an adapter.

    source: its folder or file. dataset: a configuration, or a file, to take in place of its own.
    That is the file beside the adapter, else the default with the adapter's own face embedder:
    identities of another one have no meaning to it. Published weights were trained with buffalo_l's
    detector and embedder.
    """
    if isinstance(dataset, DatasetConfig):
        return dataset
    if dataset:
        return load(DatasetConfig, dataset)
    folder = source if source.is_dir() else source.parent
    path = folder / DATASET_FILE
    if (folder / CONFIG_FILE).is_file() and path.is_file():
        return load(DatasetConfig, path)
    if file.embedder is None:
        return DatasetConfig()
    detector = {"w600k_r50": "det_10g"}.get(file.embedder.name, DetectConfig().weights)
    return DatasetConfig(
        detect=DetectConfig(weights=detector), embed=EmbedConfig(weights=file.embedder.name)
    )
