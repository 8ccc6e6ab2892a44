"""Two orders of work from a photograph to portraits, for `bench.inference`.

`ReferenceOrder` is that of the reference implementation, written from a description of it, not
copied; `Ours` is `infer.pipelines`. Both run the same networks of this project, in legacy mode, on
the same weights, so they make the same images, and the difference is in what is computed when.
What could be taken for a handicap was left out: the reference's files are unpickled (here they are
mapped), its image encoder is read in float32, and its attention may be an explicit one.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor, nn

from infer.adapter import reading_config
from infer.components import load_image_encoder
from infer.conditioning import Ids, early_ids, plain_ids
from infer.identity import Identity
from infer.photo import PhotoReader
from infer.pipelines import ConsistentIDPipeline, ConsistentIDXLPipeline
from model.checkpoint import load_adapter, read_adapter
from model.conditions import photo_images
from model.consistentid import ConsistentID, encode_images, encode_text, predict_noise
from model.pixels import clip_normalised
from model.prompt import add_marks, inference_text
from model.spec import SPECS
from model.tokens import TextTokens, text_tokens
from stages.record import Record
from stages.regions import MAX_REGIONS

SECTIONS: Final = (
    *("photograph", "image encoder", "text", "projector and facial encoder", "UNet", "VAE"),
)
NEGATIVE: Final = "monochrome, lowres, bad anatomy, worst quality, low quality, blurry"
GUIDANCE: Final = 5.0
Images = npt.NDArray[np.float32]  # (B, H, W, 3), 0 to 1
States = tuple[Tensor, Tensor | None]  # the UNet's states (1, 81, C), and SDXL's pooled ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is measured. folder: with base/ and adapter/. photo: a file, or a record that has been
    through the stages. size: (width, height).
    """

    model: str
    folder: Path
    photo: Path | Record
    size: tuple[int, int]
    device: str
    dtype: torch.dtype

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"


class Order(Protocol):
    """An order of work."""

    def load_base(self) -> None: ...

    def load_adapter(self) -> None:
        """Loads the adapter and the image encoder, and puts the adapter into the UNet."""

    def read_person(self) -> None:
        """Reads the person, if that is done once."""

    def images(self, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> Images:
        """Makes an image of the person for each prompt."""


class Clock:
    """Seconds by section, measured by hooks on the networks. On a GPU, the hooks wait for it."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._began = self.now()
        self.seconds: dict[str, float] = defaultdict(float)
        self.first_step = 0.0

    def now(self) -> float:
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def start(self) -> None:
        self.seconds.clear()
        self.first_step, self._began = 0.0, self.now()

    @property
    def elapsed(self) -> float:
        return self.now() - self._began

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        began = self.now()
        yield
        self.seconds[name] += self.now() - began

    def watch(self, name: str, module: nn.Module) -> None:
        """Counts the time of a network's calls. The beginning of the first UNet's is stored too."""
        began = [0.0]

        def begin(*_: object) -> None:
            began[0] = self.now()
            if name == "UNet" and not self.first_step:
                self.first_step = began[0] - self._began

        def end(*_: object) -> None:
            self.seconds[name] += self.now() - began[0]

        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)

    def watch_base(self, pipe: Any) -> None:
        for name in ("text_encoder", "text_encoder_2"):
            if getattr(pipe, name, None) is not None:
                self.watch("text", getattr(pipe, name))
        self.watch("UNet", pipe.unet)
        self.watch("VAE", pipe.vae.decoder)

    def watch_adapter(self, model: ConsistentID) -> None:
        encoder = model.FacialEncoder
        for module in (model.image_proj_model, encoder.visual_projection, encoder.fuse_module):
            self.watch("projector and facial encoder", module)


class Ours:
    """`ConsistentIDPipeline` with merged LoRA; a person is read once, or from a file."""

    def __init__(self, setup: Setup, clock: Clock, identity: Path | None = None) -> None:
        self._setup, self._clock, self._file = setup, clock, identity
        self._pipe: Any = None
        self.person: Identity | None = None

    def load_base(self) -> None:
        setup = self._setup
        kind = ConsistentIDXLPipeline if setup.model == "sdxl" else ConsistentIDPipeline
        self._pipe = kind.from_pretrained(setup.base, dtype=setup.dtype, image_encoder=None)
        self._pipe.to(setup.device)
        self._pipe.set_progress_bar_config(disable=True)
        self._clock.watch_base(self._pipe)

    def load_adapter(self) -> None:
        setup = self._setup
        self._pipe.load_consistentid_adapter(setup.adapter)
        self._pipe.fuse_consistentid()
        self._clock.watch_adapter(self._pipe.adapter.model)
        if self._file is None:
            encoder = load_image_encoder(str(setup.base), setup.dtype).to(setup.device)
            self._clock.watch("image encoder", encoder)
            self._pipe.register_modules(image_encoder=encoder)

    def read_person(self) -> None:
        if self._file is not None:
            self.person = Identity.load(self._file)
            return
        with self._clock.section("photograph"):
            record = self._pipe.adapter.reader.read(self._setup.photo)
        self.person = self._pipe.encode_identity(record)

    def images(self, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> Images:
        width, height = self._setup.size
        images: Images = self._pipe(
            prompt=list(prompts),
            negative_prompt=[NEGATIVE] * len(prompts),
            identity=self.person,
            num_inference_steps=steps,
            start_merge_step=_merge(steps),
            guidance_scale=GUIDANCE,
            width=width,
            height=height,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
        ).images
        return images


class ReferenceOrder:
    """Everything for each image anew, one image at a time, LoRA beside the weights."""

    def __init__(self, setup: Setup, clock: Clock) -> None:
        self._setup, self._clock = setup, clock
        self._spec = SPECS[setup.model]
        self._pipe: Any = None
        self._model: Any = None
        self._encoder: Any = None
        self._reader: Any = None
        self._tokenizer: Any = None

    def load_base(self) -> None:
        setup = self._setup
        kind = StableDiffusionXLPipeline if setup.model == "sdxl" else StableDiffusionPipeline
        options = {"dtype": setup.dtype, "image_encoder": None}
        self._pipe = kind.from_pretrained(setup.base, **options).to(setup.device)
        self._clock.watch_base(self._pipe)

    def load_adapter(self) -> None:
        setup, spec = self._setup, self._spec
        self._encoder = load_image_encoder(str(setup.base), setup.dtype).to(setup.device)
        file = read_adapter(setup.adapter)
        self._reader = PhotoReader(reading_config(setup.adapter, file), spec, file.mode)
        model = ConsistentID(spec, self._pipe.unet, file.mode)  # float32, random, on the CPU
        load_adapter(file, model)
        self._model = model.to(setup.device, setup.dtype).requires_grad_(False).eval()
        self._tokenizer = add_marks(self._pipe.tokenizer)
        self._clock.watch("image encoder", self._encoder)
        self._clock.watch_adapter(model)

    def read_person(self) -> None: ...

    def images(self, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> Images:
        pairs = zip(prompts, seeds, strict=True)
        return np.concatenate([self._image(prompt, seed, steps) for prompt, seed in pairs])

    @torch.no_grad()
    def _image(self, prompt: str, seed: int, steps: int) -> Images:
        with self._clock.section("photograph"):
            record: Record = self._reader.read(self._setup.photo)
        photo, regions = photo_images(record, self._spec, "legacy")
        tokens = self._tokens(prompt, tuple(regions))
        pixels = clip_normalised(torch.stack((photo, *(regions[name] for name in tokens.regions))))
        unused = pixels.new_zeros((1 + MAX_REGIONS - len(pixels), *pixels.shape[1:]))
        shown = self._encoded(torch.cat((pixels, unused)))
        blank = self._encoded(torch.zeros_like(torch.cat((pixels, unused))))
        early, late, negative = (
            self._text(ids)
            for ids in (
                early_ids(self._model, tokens, prompt, None, self._tokenizer),
                (tokens.input_ids, tokens.input_ids_2),
                plain_ids(NEGATIVE, self._tokenizer),
            )
        )
        assert record.identity is not None
        embedding = torch.from_numpy(record.identity.copy())[None].to(self._setup.device)
        identity, no_identity = (
            self._model.encode_identity(each, hidden[:1])
            for each, hidden in ((embedding, shown), (torch.zeros_like(embedding), blank))
        )
        late_text, negative_text = (
            self._fused(text[0], hidden[1:], tokens)
            for text, hidden in ((late, shown), (negative, blank))
        )
        unconditional = (torch.cat((negative_text, no_identity), dim=1), negative[1])
        phases = [
            (torch.cat((text.to(identity.dtype), identity), dim=1), pooled)
            for text, pooled in ((early[0], early[1]), (late_text, late[1]))
        ]
        return self._decoded(self._denoised(phases, unconditional, seed, steps))

    def _encoded(self, pixels: Tensor) -> Tensor:
        """Runs the image encoder on images (N, 3, S, S), one after the other."""
        each = [encode_images(self._encoder, row[None].to(self._setup.device)) for row in pixels]
        return torch.cat(each)

    def _tokens(self, prompt: str, regions: tuple[str, ...]) -> TextTokens:
        marked = inference_text(prompt, "", regions, self._tokenizer, self._spec, "legacy")
        second = getattr(self._pipe, "tokenizer_2", None)
        return text_tokens(marked, self._tokenizer, "legacy", second)

    def _text(self, ids: Ids) -> tuple[Tensor, Tensor | None]:
        first, second = (each[None].to(self._setup.device) for each in ids)
        return encode_text(self._pipe, first, second)

    def _fused(self, text: Tensor, regions: Tensor, tokens: TextTokens) -> Tensor:
        mask, valid = (
            each[None].to(self._setup.device) for each in (tokens.token_mask, tokens.token_valid)
        )
        dtype = self._model.dtype
        fused: Tensor = self._model.FacialEncoder(
            text.to(dtype), regions[None].to(dtype), mask, valid
        )
        return fused

    def _denoised(
        self, phases: list[States], unconditional: States, seed: int, steps: int
    ) -> Tensor:
        """Returns latents. phases: states of both; unconditional: those of the negative text."""
        setup, scheduler = self._setup, self._pipe.scheduler
        scheduler.set_timesteps(steps, device=setup.device)
        width, height = (side // self._pipe.vae_scale_factor for side in setup.size)
        noise = torch.randn((1, 4, height, width), generator=torch.Generator().manual_seed(seed),
                            dtype=setup.dtype)  # fmt: skip
        latents = noise.to(setup.device) * scheduler.init_noise_sigma
        time_ids = None
        if self._spec.two_text_encoders:
            size = (setup.size[1], setup.size[0])
            time_ids = torch.tensor([[*size, 0, 0, *size]] * 2, device=setup.device)
            time_ids = time_ids.to(setup.dtype)
        negative, no_pooled = unconditional[0], cast(Tensor, unconditional[1])
        for step, timestep in enumerate(scheduler.timesteps):
            states, pooled = phases[step > _merge(steps)]
            both = torch.cat((negative, states))
            added = None if pooled is None else torch.cat((no_pooled, pooled))
            rows = scheduler.scale_model_input(torch.cat((latents, latents)), timestep)
            predicted, _ = predict_noise(
                self._pipe.unet, rows, timestep, both, pooled=added, time_ids=time_ids
            )
            without, with_person = predicted.chunk(2)
            guided = without + GUIDANCE * (with_person - without)
            latents = scheduler.step(guided, timestep, latents, return_dict=False)[0]
        return cast(Tensor, latents)

    def _decoded(self, latents: Tensor) -> Images:
        vae = self._pipe.vae
        upcast = vae.config.force_upcast and vae.dtype == torch.float16
        if upcast:
            vae.to(torch.float32)
        scaled = latents.to(vae.post_quant_conv.weight.dtype) / vae.config.scaling_factor
        decoded = vae.decode(scaled, return_dict=False)[0]
        if upcast:
            vae.to(torch.float16)
        images: Images = self._pipe.image_processor.postprocess(decoded, output_type="np")
        return images


def _merge(steps: int) -> int:
    """Returns the number of steps in the first phase, the share that the reference's demos use."""
    return round(0.6 * steps)
