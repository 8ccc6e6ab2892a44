"""An adapter beside a pipeline: its encoders, what it needs to read photographs, and its cache."""

from __future__ import annotations

import copy
import hashlib
import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from configs.errors import ConfigError
from configs.load import load
from configs.schema import DatasetConfig, DetectConfig, EmbedConfig
from infer.components import adapter_path
from infer.conditioning import Ids, PersonTokens, TextStates, person_tokens, text_states
from infer.identity import Identity
from infer.photo import PhotoReader
from model.attention import merge_lora, unmerge_lora
from model.checkpoint import CONFIG_FILE, WEIGHTS_FILE, AdapterFile, build_adapter, read_adapter
from model.consistentid import ConsistentID, HasTextEncoders
from model.prompt import add_marks
from stages.regions import REGION_WORDS

logger = logging.getLogger("consistentid")

DATASET_FILE: Final = "dataset.yaml"  # which the trainer writes beside the adapter
_CACHED_TEXTS: Final = 64
_REMEMBERED: Final = 16  # people
_ENCODERS: Final = ("image_proj_model", "FacialEncoder")


class Adapter:
    """An adapter in a UNet.

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
        self._processors = dict(unet.attn_processors)
        self.model: ConsistentID = build_adapter(file, unet, dtype=dtype, device=device)
        self.model.requires_grad_(False).eval()
        self.file = replace(file, state={})  # the model has copies; the file needs no memory
        self.unet, self.reader, self._digest = unet, reader, digest
        self.image_encoder = image_encoder or file.spec.image_encoder
        self.strength: dict[str, float] = {}
        self._people: weakref.WeakKeyDictionary[Identity, PersonTokens] = (
            weakref.WeakKeyDictionary()
        )
        self._texts = _Texts()
        self._notices: set[str] = set()
        # by the image encoder that read them
        self._read: weakref.WeakKeyDictionary[Any, dict[object, Identity]] = (
            weakref.WeakKeyDictionary()
        )
        self._tokenizer: tuple[int, Any] | None = None

    @property
    def digest(self) -> str:
        """sha256 of the weights file; "" if it wasn't asked for."""
        return self._digest.result() if self._digest else ""

    @property
    def embedder(self) -> str:
        """sha256 of the weights that made the embeddings it was trained with; "" if unknown."""
        return self.file.embedder.sha256 if self.file.embedder else ""

    def is_in(self, unet: Any) -> bool:
        """Whether the adapter is in `unet` now."""
        return next(iter(unet.attn_processors.values())) is self.model.adapter_modules[0]

    def remove(self) -> None:
        """Restores the UNet's weights and processors from before, bit for bit."""
        if self.is_in(self.unet):
            unmerge_lora(self.unet)
            self.unet.set_attn_processor(dict(self._processors))

    @contextmanager
    def removed(self) -> Iterator[None]:
        """Takes the adapter out of the UNet for a while; a merged one is merged again."""
        merged = self.merged
        installed = dict(self.unet.attn_processors)
        self.remove()
        try:
            yield
        finally:
            self.unet.set_attn_processor(installed)
            if merged:
                merge_lora(self.unet)

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

        Raises ConfigError for an unknown part or a negative weight.
        """
        parts = scale if isinstance(scale, Mapping) else {"identity": scale}
        for name, value in parts.items():
            if name != "identity" and name not in REGION_WORDS:
                raise ConfigError(
                    f"scale of {name!r}: expected one of identity, {', '.join(REGION_WORDS)}"
                )
            if not 0 <= value < float("inf"):
                raise ConfigError(f"scale of {name}: {value}; expected a number of at least 0")
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
        missing = [person for person in dict.fromkeys(people) if person not in self._people]
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
        before = next(modules[0].parameters()).device
        for module in modules:
            module.to(device)
        yield
        offloaded = next(self.unet.parameters()).device != device
        if before != device and offloaded:
            for module in modules:
                module.to(before)


class _Texts:
    """States of the last texts that an encoder read. They are forgotten when the encoder's weights
    change; an encoder with a LoRA of peft is not cached, because its scale may change unseen.
    """

    def __init__(self) -> None:
        self._version: object = None
        self._states: dict[object, TextStates] = {}

    def states(
        self,
        encoders: HasTextEncoders,
        texts: Sequence[Ids],
        device: torch.device,
        clip_skip: int | None,
    ) -> TextStates:
        version = _version(encoders)
        if version is None:
            return text_states(encoders, texts, device, clip_skip)
        keys = [_key(text, device, clip_skip) for text in texts]
        if version != self._version or len(self._states) + len(keys) > _CACHED_TEXTS:
            self._version, self._states = version, {}
        missing = {k: text for k, text in zip(keys, texts, strict=True) if k not in self._states}
        if missing:
            new = text_states(encoders, list(missing.values()), device, clip_skip)
            self._states |= {key: new.rows([row]) for row, key in enumerate(missing)}
        rows = [self._states[key] for key in keys]
        pooled = [row.pooled for row in rows if row.pooled is not None]
        return TextStates(
            hidden=torch.cat([row.hidden for row in rows]),
            pooled=torch.cat(pooled) if pooled else None,
        )


def _key(text: Ids, device: torch.device, clip_skip: int | None) -> object:
    return (*text[0].tolist(), *text[1].tolist(), str(device), clip_skip)


def _version(encoders: HasTextEncoders) -> object:
    """Returns a value that changes with the text encoders' weights; None if that can't be told."""
    names = ("text_encoder", "text_encoder_2")
    modules = [each for name in names if (each := getattr(encoders, name, None)) is not None]
    if any(getattr(module, "peft_config", None) for module in modules):
        return None
    # Weak references, because a new module may get the addresses of one that is gone.
    versions = [
        (id(tensor), tensor._version, tensor.dtype)
        for module in modules
        for tensor in module.parameters()
    ]
    return tuple(weakref.ref(module) for module in modules), versions


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
    """Puts an adapter into a UNet; the arguments are those of `load_consistentid_adapter`."""
    path = adapter_path(source, subfolder, weight_name, **hub)
    file = read_adapter(path)
    if (path / "unet").is_dir() and not _is_from(unet, path / "unet"):
        logger.warning(
            "%s has a unet/ beside the adapter, which was trained together with it; it is not "
            "loaded here. Pass it to from_pretrained: unet=UNet2DConditionModel.from_pretrained"
            '("%s")',
            path,
            path / "unet",
        )
    weight = unet.conv_in.weight
    return Adapter(
        file,
        unet,
        PhotoReader(reading_config(path, file, dataset), file.spec, file.mode),
        device=weight.device,
        dtype=weight.dtype,
        digest=file_digest(path),
        image_encoder=image_encoder,
    )


def _is_from(model: Any, folder: Path) -> bool:
    """Returns whether a model of diffusers was loaded from a folder."""
    return Path(model.config.get("_name_or_path") or "").resolve() == folder.resolve()


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


def file_digest(source: Path) -> Future[str]:
    """Returns the sha256 of the weights file of an adapter's folder or file, which is computed in
    the background: for SDXL's it takes seconds.
    """
    weights = source / WEIGHTS_FILE if source.is_dir() else source
    stream = weights.open("rb")  # now, in case that it is replaced

    def digest() -> str:
        with stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    executor = ThreadPoolExecutor(1)
    future = executor.submit(digest)
    executor.shutdown(wait=False)
    return future
