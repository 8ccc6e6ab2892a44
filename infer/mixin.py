"""ConsistentIDMixin: what a pipeline of diffusers needs to make images of a person.

It turns people and prompts into `prompt_embeds`, text and ID tokens, and leaves the rest to
diffusers' own call; a callback swaps the embeddings when the second phase begins.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final, Self, cast

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from configs.errors import ConfigError, WeightsError
from configs.load import to_yaml
from configs.schema import DatasetConfig
from infer.adapter import DATASET_FILE, Adapter, adapter_in, install_adapter
from infer.components import check_complete, check_precision, load_models, precision
from infer.conditioning import Guidance
from infer.identity import Identity
from infer.phases import DEFAULT_MERGE, FirstPhase, Phases, merge_step, schedule, steps_of
from infer.photo import Photo
from infer.request import (
    FaceText,
    embeddings,
    encode_people,
    guidance_of,
    people_of,
    prompt_text,
    texts_of,
)
from infer.schedulers import unclipped
from model.checkpoint import save_adapter
from model.tokens import TextTokens

ADAPTER_FOLDER: Final = "consistentid"  # in the folder of `save_pretrained`
_UNCHANGED: Final = object()  # in place of a type, for models that keep theirs
_HUB: Final = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


class ConsistentIDMixin:
    """Adds a person's identity to a Stable Diffusion or SDXL pipeline of diffusers.

    failed_images: numbers of the last call's images whose latents weren't finite.
    """

    failed_images: tuple[int, ...] = ()

    # attributes of diffusers' pipelines
    unet: Any
    vae: Any
    scheduler: Any
    image_encoder: Any
    register_modules: Any
    load_config: Any
    config_name: str
    vae_scale_factor: int
    tokenizer: Any
    _execution_device: torch.device
    _callback_tensor_inputs: list[str]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """Loads a base model; options are those of diffusers, and dtype may be "auto".

        Unlike diffusers, it raises WeightsError if a weight is missing. A folder that
        `save_pretrained` wrote brings its adapter along.
        """
        root = str(pretrained_model_name_or_path)
        options = _with_precision(options)
        hub = {name: options[name] for name in _HUB if name in options}
        index = cls.load_config(root, **hub)
        models = load_models(root, index, options)
        pipe: Self = cast(Any, super()).from_pretrained(root, **options, **models)
        if Path(root, ADAPTER_FOLDER).is_dir():
            pipe.load_consistentid_adapter(root, subfolder=ADAPTER_FOLDER)
        return pipe

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path: str | Path, **options: Any) -> Self:
        """Loads a base model from one checkpoint file, as diffusers does; dtype may be "auto".

        Unlike diffusers, it raises WeightsError if a weight is missing.
        """
        source = str(pretrained_model_link_or_path)
        try:
            pipe: Self = cast(Any, super()).from_single_file(source, **_with_precision(options))
        except NotImplementedError as error:  # raised by torch when it moves a missing weight
            raise WeightsError(
                f"{source} lacks weights of the base model ({error}). The file is incomplete or of "
                "another model: download it again, or name another."
            ) from error
        check_complete(pipe, source)
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: Any, **options: Any) -> Self:
        """Makes a pipeline of this class from another one's parts, its adapter included.

        The weights are shared, so an adapter that one of them loads or unloads is so for both.
        Unlike diffusers, their types stay as they are if no dtype is given.
        """
        options = {"dtype": _UNCHANGED} | _with_precision(options)
        pipe: Self = cast(Any, super()).from_pipe(pipeline, **options)
        return pipe

    def to(self, *arguments: Any, **options: Any) -> Self:
        """Does what diffusers' does; `from_pipe` calls it with a type in any case."""
        if options.get("dtype") is _UNCHANGED:
            return self
        return cast(Self, cast(Any, super()).to(*arguments, **options))

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Saves the base model as diffusers does, and the adapter in `consistentid/` beside it.

        The folder names diffusers' own class, so `DiffusionPipeline.from_pretrained` loads it too.
        """
        adapter = self.consistentid
        with nullcontext() if adapter is None else adapter.removed():
            cast(Any, super()).save_pretrained(save_directory, **options)
        own = (kind for kind in type(self).__mro__ if kind.__module__.startswith("diffusers."))
        index = Path(save_directory, self.config_name)
        values = json.loads(index.read_text()) | {"_class_name": next(own).__name__}
        index.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
        if adapter is None:
            return
        folder = Path(save_directory, ADAPTER_FOLDER)
        save_adapter(adapter.model, folder, adapter.file.config)
        (folder / DATASET_FILE).write_text(to_yaml(adapter.reader.config), encoding="utf-8")

    def load_consistentid_adapter(
        self,
        pretrained_model_name_or_path: str | Path,
        subfolder: str = "",
        weight_name: str = "",
        trigger_word: str = "",
        *,
        dataset: str | Path | DatasetConfig | None = None,
        image_encoder: str = "",
        **hub: Any,
    ) -> None:
        """Puts an adapter into the UNet; one that was loaded before is removed.

        pretrained_model_name_or_path: a folder of the trainer, a published file or a hub id.
        weight_name: of the file, for a hub id of published weights, e.g. ConsistentID-v1.bin.
        trigger_word: accepted for the sake of the reference's interface, where it has no effect
        either. dataset: the stages that read photographs; None: those of the adapter's training
        data. image_encoder: a folder or hub id, for a pipeline without one; it is loaded when the
        first photograph is encoded. hub: cache_dir, revision, token and the like. Raises
        WeightsError for an adapter that can't be loaded or doesn't fit the UNet.
        """
        install_adapter(
            self.unet,
            pretrained_model_name_or_path,
            subfolder,
            weight_name,
            dataset=dataset,
            image_encoder=image_encoder,
            **hub,
        )

    def unload_consistentid_adapter(self) -> None:
        """Removes the adapter; the UNet is bit for bit as it was before."""
        if self.consistentid is not None:
            self.consistentid.remove()

    def load_ip_adapter(self, *arguments: Any, **options: Any) -> None:
        """Loads an IP-Adapter as diffusers does. Raises ConfigError if a ConsistentID adapter is
        loaded: both replace the UNet's attention.
        """
        self._check_unloaded("an IP-Adapter")
        cast(Any, super()).load_ip_adapter(*arguments, **options)

    def fuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """Does what diffusers' does. Raises ConfigError for the UNet if a ConsistentID adapter is
        loaded, which has its own projections.
        """
        if unet:
            self._check_unloaded("fuse_qkv_projections of the UNet")
        cast(Any, super()).fuse_qkv_projections(unet=unet, vae=vae)

    def _check_unloaded(self, other: str) -> None:
        if self.consistentid is not None:
            raise ConfigError(
                f"{other} can't be used beside a ConsistentID adapter, since both replace the "
                "UNet's attention; call unload_consistentid_adapter first"
            )

    def set_consistentid_scale(self, scale: float | Mapping[str, float]) -> None:
        """Sets the weight of the person: 1 as in training, 0 for none.

        A number is the weight of the ID tokens' attention. A mapping sets single parts: `identity`
        that weight, and `face`, `eyes`, `ears`, `nose` or `mouth` the weight of the photograph in
        that region's token, where 0 leaves the word alone.
        """
        self.adapter.set_scale(scale)

    def fuse_consistentid(self) -> None:
        """Adds the adapter's LoRA to the UNet's weights, for faster steps."""
        self.adapter.merge()

    def unfuse_consistentid(self) -> None:
        """Restores the UNet's weights from before `fuse_consistentid`, bit for bit."""
        self.adapter.unmerge()

    def encode_identity(
        self, images: Photo | list[Photo], *, name: str = "", face: int = 0
    ) -> Identity:
        """Reads a person from a photograph, or from several of the same person.

        The embedding of several is their mean, the rest is the first's; legacy mode reads the first
        alone, as the reference does. The last people are remembered, so the same photograph isn't
        read again. face: see `PhotoReader.read`. Raises FaceError if a photograph shows no usable
        face, SourceError if it isn't a readable image.
        """
        return encode_people(self, self.adapter, images, name, face)

    def prompt_text(
        self,
        person: Identity,
        prompt: str,
        face_caption: str | None = None,
        describe_moment: bool = False,
    ) -> tuple[TextTokens, list[str]]:
        """Returns the text that the second phase reads for a prompt, and what a user should know of
        it: words that were cut, regions that aren't used. The arguments are those of a call.
        """
        face = FaceText(face_caption, describe_moment)
        [text] = texts_of(self, prompt, 1, "prompt")
        return prompt_text(self, self.adapter, person, text or "", face)

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *arguments: Any,
        input_id_images: Photo | list[Photo] | None = None,
        identity: Identity | Sequence[Identity] | None = None,
        start_merge_step: float = DEFAULT_MERGE,
        face_caption: str | None = None,
        describe_moment: bool = False,
        **options: Any,
    ) -> Any:
        """Makes images as diffusers' pipeline does, of a person.

        prompt, arguments, options: those of diffusers' class. input_id_images: a photograph or
        several of one person, see `encode_identity`. identity: in place of them, a person or one
        for each prompt. start_merge_step: the steps up to it see the plain text, later ones the
        text with fused regions; an int is a number of steps, a float a share of them. face_caption:
        describes the face in place of the photograph's own description, of which only what belongs
        to the person is used: with describe_moment also expression, pose, glasses and the like.

        Raises ConfigError without an adapter or a person, PipelineError if the latents of all
        images are not finite. If those of some are not, `failed_images` names them.
        """
        own = cast(Any, super()).__call__
        call = inspect.signature(own).bind_partial(prompt, *arguments, **options).arguments
        call |= call.pop("kwargs", {})
        if self.consistentid is None and input_id_images is None and identity is None:
            return own(**call)
        adapter = self.adapter
        people = people_of(self, adapter, input_id_images, identity)
        self.scheduler = unclipped(self.scheduler)
        check_precision(self.unet, self._execution_device)
        guidance = guidance_of(self, adapter, people, call, FaceText(face_caption, describe_moment))
        phases = self._phases(guidance, call, start_merge_step, adapter.model.mode == "legacy")
        call |= embeddings(guidance, late=phases.first_is_empty)
        call["callback_on_step_end"] = phases
        call["callback_on_step_end_tensor_inputs"] = phases.tensors(self._callback_tensor_inputs)
        with adapter.hidden_from(getattr(self, "controlnet", None)):
            output = own(**call)
        self.failed_images = phases.failed
        return output

    def _phases(
        self, guidance: Guidance, call: Mapping[str, Any], start_merge_step: float, legacy: bool
    ) -> Phases:
        """Makes the callback of a call. call: its arguments."""
        parameters = inspect.signature(cast(Any, super()).__call__).parameters
        call = {name: each.default for name, each in parameters.items()} | dict(call)
        steps = steps_of(call)
        first = FirstPhase(merge=merge_step(start_merge_step, steps), steps=steps, legacy=legacy)
        scheduler, skipped = schedule(self, call, steps)
        callback = call.get("callback_on_step_end")
        inputs = call.get("callback_on_step_end_tensor_inputs") or ["latents"]
        if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            inputs = callback.tensor_inputs
        return Phases(
            guidance,
            evaluations=first.evaluations(scheduler) - skipped,
            copies=call["num_images_per_prompt"] or 1,
            callback=callback,
            inputs=inputs,
        )

    @property
    def consistentid(self) -> Adapter | None:
        """The adapter in the pipeline's UNet, None if there is none: then the pipeline is
        diffusers' own. Pipelines that share the UNet share the adapter.
        """
        return adapter_in(self.unet)

    @property
    def adapter(self) -> Adapter:
        """The adapter. Raises ConfigError if there is none in the UNet, or if something else has
        replaced its attention processors.
        """
        adapter = self.consistentid
        if adapter is None:
            raise ConfigError(
                "no ConsistentID adapter is loaded in this pipeline's UNet; call "
                "load_consistentid_adapter first"
            )
        if not adapter.is_in(self.unet):
            raise ConfigError(
                "the adapter's attention processors were replaced by others, as attention slicing, "
                "xformers, fuse_qkv_projections and set_attn_processor do; do without them, and "
                "load the adapter again"
            )
        return adapter


def _with_precision(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns options with dtype in place of torch_dtype, as a type in place of a name."""
    named = {name: value for name, value in options.items() if name not in ("dtype", "torch_dtype")}
    dtype = options.get("dtype", options.get("torch_dtype"))
    return named if dtype is None else named | {"dtype": precision(dtype)}
