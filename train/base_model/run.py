"""Trains the parts of a base model in order, and puts them together in diffusers' layout.

    OUT/config.yaml  index/  samples/  autoencoder/  towers/  denoiser/  base/  index.html

base/ is what StableDiffusionPipeline.from_pretrained loads, with half-precision weights.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from configs.base_model import BaseConfig, PartConfig
from configs.errors import ConfigError
from configs.load import dump
from configs.training import DataSource
from model.prompt import add_marks
from model.spec import ModelSpec, spec_named
from model.tiny import PIPELINE
from model.tokens import empty_ids
from model.vocabulary import clip_tokenizer
from stages.backends.runtime import deterministic_algorithms, pin_threads
from stages.backends.weights import Weights
from stages.storage.lock import RunLock
from stages.storage.store import Store
from train.base_model.autoencoder import Autoencoder
from train.base_model.denoiser import Denoiser
from train.base_model.page import write_page
from train.base_model.part import FINAL, Part, PartWatcher, train_part
from train.base_model.samples import prepared_samples
from train.base_model.towers import Towers
from train.checkpoints import remove_partial_folders, write_folder_atomically
from train.mixture import Mixture
from train.shards import INDEX
from train.state import write_json
from train.stopping import Stop, Stopping, stop_on_signal

if TYPE_CHECKING:
    from accelerate import Accelerator

BASE: Final = "base"
METRICS: Final = "metrics.json"
_SETTINGS: Final = "settings.json"
_INDEX: Final = {**PIPELINE, "scheduler": ["diffusers", "DDIMScheduler"]}


def train_base(
    config: BaseConfig, watcher: PartWatcher, stopping: Stopping = stop_on_signal
) -> int:
    """Trains what isn't trained yet. Returns the number of the signal that stopped it, 0 if the
    base is complete.

    stopping: a context manager whose Stop tells when to stop. Raises ConfigError for settings that
    differ from those of an earlier run in the output, and what Mixture, Weights and `train_part`
    raise.
    """
    for name in ("data", "output"):
        if not getattr(config, name):
            raise ConfigError(f"{name} is empty. Set {name}=FOLDER.")
    output = Path(config.output)
    pin_threads(config.threads)
    with deterministic_algorithms(True), stopping() as stop:
        accelerator = _accelerator(config)
        if not accelerator.is_main_process:
            return _Run(config, accelerator, watcher, stop).train()
        output.mkdir(parents=True, exist_ok=True)
        with RunLock(Store(str(output))):
            return _Run(config, accelerator, watcher, stop).train()


def _accelerator(config: BaseConfig) -> Accelerator:
    from accelerate import Accelerator

    on_cpu = config.device == "cpu" or not torch.accelerator.is_available()
    return Accelerator(cpu=on_cpu)


class _Run:
    def __init__(
        self, config: BaseConfig, accelerator: Accelerator, watcher: PartWatcher, stop: Stop
    ) -> None:
        self.config, self.accelerator, self.watcher, self.stop = config, accelerator, watcher, stop
        self.output = Path(config.output)
        self.spec: ModelSpec = spec_named(config.spec)
        self.weights = Weights(config.weights)
        self.tokenizer: Any = add_marks(clip_tokenizer(self.weights.fetch("clip_bpe")))
        if accelerator.is_main_process:
            remove_partial_folders(self.output)
        with accelerator.main_process_first():
            self.mixture = Mixture(
                [DataSource(path=config.data)], "train", index_folder=self.output / INDEX
            )
            self.samples = prepared_samples(
                self.output / "samples",
                self.mixture,
                self.tokenizer,
                self.spec,
                config.resolution,
            )

    def train(self) -> int:
        """Trains the parts in order; see `train_base`."""
        config, accelerator = self.config, self.accelerator
        if accelerator.is_main_process:
            dump(config, self.output / "config.yaml")
        before = {"data": self.mixture.digest, "resolution": config.resolution, "seed": config.seed}
        autoencoder = self._part(
            Autoencoder,
            config.autoencoder,
            before,
            lambda: Autoencoder(
                config.autoencoder, config.seed, accelerator, self.samples, self.weights
            ),
        )
        if autoencoder is None:
            return self.stop.signal
        towers = self._part(
            Towers,
            config.towers,
            before,
            lambda: Towers(
                config.towers, self.spec, config.seed, accelerator, self.samples, self.mixture
            ),
        )
        if towers is None:
            return self.stop.signal
        denoiser = self._part(
            Denoiser,
            config.denoiser,
            {**before, "autoencoder": _digest(autoencoder), "towers": _digest(towers)},
            lambda: self._denoiser(autoencoder, towers),
        )
        if denoiser is None:
            return self.stop.signal
        if accelerator.is_main_process:
            self._assemble([autoencoder, towers, denoiser])
        return 0

    def _denoiser(self, autoencoder: Path, towers: Path) -> Denoiser:
        import diffusers
        import transformers

        vae = diffusers.AutoencoderKL.from_pretrained(autoencoder / "vae")
        text_encoder = transformers.CLIPTextModel.from_pretrained(towers / "text_encoder")
        for module in (vae, text_encoder):
            module.eval().requires_grad_(False)
        config = self.config
        return Denoiser(
            config.denoiser,
            self.spec,
            config.seed,
            self.accelerator,
            self.samples,
            vae,
            text_encoder,
            empty_ids(self.tokenizer),
            self.tokenizer(["left", "right"]).input_ids,
            config.rounds,
        )

    def _part(
        self,
        kind: type[Part],
        settings: PartConfig,
        before: dict[str, Any],
        make: Callable[[], Part],
    ) -> Path | None:
        """Trains a part, unless it is trained. Returns the folder of its models; None if a signal
        stopped the training.
        """
        folder = self.output / kind.name
        steps = settings.steps * (self.config.rounds if kind is Denoiser else 1)
        final = folder / FINAL
        self._check_settings(folder, settings, before)
        if _trained_steps(final) >= steps:
            return final
        part = make()
        finished = train_part(part, self.config, len(self.samples), self.watcher, self.stop)
        if finished and self.accelerator.is_main_process:
            write_folder_atomically(final, lambda partial: _save(part, partial, steps))
        if self.accelerator.is_main_process:
            write_page(self.output)
        self.accelerator.wait_for_everyone()
        return final if finished else None

    def _check_settings(self, folder: Path, settings: PartConfig, before: dict[str, Any]) -> None:
        """Raises ConfigError if the part in `folder` was trained with other settings."""
        current = json.loads(json.dumps({**before, **asdict(settings)}))
        del current["steps"]  # more of them continue the training
        path = folder / _SETTINGS
        if path.is_file():
            earlier = json.loads(path.read_text(encoding="utf-8"))
            changed = [name for name in current if current[name] != earlier.get(name)]
            if changed:
                raise ConfigError(
                    f"{folder} was trained with other settings: "
                    + "; ".join(
                        f"{name} was {earlier.get(name)} and is {current[name]}" for name in changed
                    )
                    + ". Give these again, or another output."
                )
        elif self.accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, current)

    def _assemble(self, parts: list[Path]) -> None:
        """Writes OUT/base, unless it is made of these parts already."""
        import transformers
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        target, side = self.output / BASE, self.spec.vision_size
        origin = {path.parent.name: _digest(path) for path in parts}
        record = target / "parts.json"
        if record.is_file() and json.loads(record.read_text(encoding="utf-8")) == origin:
            return

        def fill(partial: Path) -> None:
            import diffusers

            kinds = {
                "vae": diffusers.AutoencoderKL,
                "unet": diffusers.UNet2DConditionModel,
                "text_encoder": transformers.CLIPTextModel,
                "image_encoder": transformers.CLIPVisionModelWithProjection,
            }
            for path in parts:
                for child in path.iterdir():
                    if child.name in kinds:
                        model = kinds[child.name].from_pretrained(child)
                        model.half().save_pretrained(partial / child.name)
                        _settle_config(partial / child.name / "config.json")
                    elif child.is_dir():
                        shutil.copytree(child, partial / child.name)
            clip_tokenizer(self.weights.fetch("clip_bpe")).save_pretrained(partial / "tokenizer")
            CLIPImageProcessorPil(
                size={"shortest_edge": side}, crop_size={"height": side, "width": side}
            ).save_pretrained(partial / "feature_extractor")
            write_json(partial / "model_index.json", _INDEX)
            write_json(partial / record.name, origin)

        write_folder_atomically(target, fill)


def _settle_config(config: Path) -> None:
    """Removes the name of the folder that a model was loaded from, so that equal models have equal
    files. Of the text and image tower, states that they compute in float32: transformers would load
    them in half precision, as they are stored, and diffusers the other models in float32.
    """
    values = json.loads(config.read_text(encoding="utf-8"))
    values.pop("_name_or_path", None)
    if "dtype" in values:
        values["dtype"] = "float32"
    write_json(config, values)


def _save(part: Part, folder: Path, steps: int) -> None:
    metrics = part.save(folder)
    write_json(folder / METRICS, {"steps": steps, **metrics})


def _trained_steps(final: Path) -> int:
    """Returns the steps after which the models in `final` were written, 0 if there are none."""
    path = final / METRICS
    return int(json.loads(path.read_text(encoding="utf-8"))["steps"]) if path.is_file() else 0


def _digest(final: Path) -> str:
    """Returns a digest of the weights in a folder."""
    digest = hashlib.sha256()
    for path in sorted(final.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
