"""Validation: at some steps, what the model makes of people whom it isn't trained on.

OUT/validation.jsonl          a line for each validation
OUT/validation/STEP.jpg       a row for each person: a photograph, and a portrait for each prompt
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from configs.errors import ConfigError, EmptySideError, ShardError
from configs.training import TrainConfig
from model.conditions import DropRates
from model.consistentid import Features, predict_noise
from model.losses import noise_errors
from model.pixels import fixed_size_condition, training_image
from stages.record import Record
from train import draws
from train.average import Average
from train.batch_maker import BatchMaker
from train.data import Preparation, TrainBatch, unpacked
from train.features.reading import FeatureSet, open_features
from train.history import SHEETS, VALIDATIONS, Lines
from train.mixture import Mixture, open_mixture
from train.records import start_trackers
from train.shards import INDEX
from train.step import Frozen, TrainedModel, frozen_features, noised_latents, without_memory
from train.stopping import Stop
from train.texts import split_states

_TIMESTEPS: Final = (0.1, 0.3, 0.5, 0.7, 0.9)  # shares of the noise schedule
_BATCH: Final = 8  # samples at a time


@dataclass(frozen=True, slots=True)
class _Fixed:
    """The samples of the validation: a train.batch_maker.Order, and its References.

    numbers: of the samples. references: whose identity each is shown with.
    """

    numbers: tuple[int, ...]
    references: tuple[int, ...]

    def sample(self, position: int) -> int:
        return self.numbers[position]

    def reference(self, position: int) -> int:
        return self.references[position]


class InterruptedValidationError(Exception):
    """A signal to stop, while a validation ran."""


class Validation:
    """Measures and draws for the present weights, without changing anything of the run.

    mixture: of the validation side, which shows two people or more. features: that are read of it.
    The methods raise InterruptedValidationError when `stop` has a signal.
    """

    def __init__(
        self,
        config: TrainConfig,
        mixture: Mixture,
        frozen: Frozen,
        preparation: Preparation,
        features: Mapping[str, FeatureSet],
    ) -> None:
        settings = config.validation
        self._config, self._mixture, self._frozen = config, mixture, without_memory(frozen)
        self._features = features
        self._preparation = replace(
            preparation,
            drop=DropRates(text=0, identity=0, both=0),
            noise_offset=0.0,
            input_perturbation=0.0,
            cache_size=0,
            buckets=None,  # the images of a batch have one shape
        )
        self._people = _people(mixture, max(settings.samples, settings.portraits, 2))

    @torch.no_grad()
    def losses(self, trained: TrainedModel, stop: Stop) -> dict[str, float]:
        """Returns the noise loss at fixed timesteps, the mean over samples and timesteps, with the
        right identity (`right`) and with that of another person (`swapped`), and their difference
        (`gap`).
        """
        numbers = self._people[: max(2, self._config.validation.samples)]
        shifted = (*numbers[1:], numbers[0])
        means = {
            "right": self._mean_loss(trained, numbers, numbers, stop),
            "swapped": self._mean_loss(trained, numbers, shifted, stop),
        }
        return {**means, "gap": means["swapped"] - means["right"]}

    def _mean_loss(
        self,
        trained: TrainedModel,
        numbers: Sequence[int],
        references: Sequence[int],
        stop: Stop,
    ) -> float:
        count = self._preparation.timesteps
        errors = []
        for batch in self._batches(self._preparation, numbers, references):
            features = frozen_features(self._frozen, batch)
            for share in _TIMESTEPS:
                _check_signal(stop)
                timesteps = torch.full_like(batch.timesteps, round(share * (count - 1)))
                at = replace(batch, timesteps=timesteps)
                noisy, target = noised_latents(self._frozen, at)
                sizes = at.sizes.float() if features.pooled is not None else None
                predicted, _ = trained(noisy, timesteps, features, time_ids=sizes)
                errors.append(noise_errors(predicted, target)[at.valid])
        return float(torch.cat(errors).mean())

    @torch.no_grad()
    def sheet(self, trained: TrainedModel, stop: Stop) -> Image.Image | None:
        """Returns a row for each person: a photograph, and a portrait for each prompt. None if no
        portraits are asked for.
        """
        settings = self._config.validation
        if not settings.portraits:
            return None
        numbers = self._people[: settings.portraits]
        side = self._preparation.resolution
        columns = [_photographs(self._mixture.records(numbers), side)]
        for prompt in settings.prompts:
            preparation = replace(self._preparation, prompt=prompt)
            batches = self._batches(preparation, numbers, numbers)
            columns.append(torch.cat([self._draw(trained, batch, stop) for batch in batches]))
        rows = torch.cat(columns, dim=2)  # (people, side, columns · side, 3)
        return Image.fromarray(rows.flatten(0, 1).numpy())

    def _draw(self, trained: TrainedModel, batch: TrainBatch, stop: Stop) -> Tensor:
        """Returns portraits of a batch's conditions, (B, R, R, 3) uint8."""
        settings, base = self._config.validation, self._frozen.base
        scheduler = type(base.scheduler).from_config(base.scheduler.config)
        scheduler.set_timesteps(settings.num_inference_steps, device=batch.noise.device)
        shown = frozen_features(self._frozen, batch)
        none = _without_conditions(self._frozen, shown)
        states = torch.cat([trained.adapter.prepare(each) for each in (none, shown)])
        added: dict[str, Any] = {}
        if shown.pooled is not None and none.pooled is not None:
            sizes = fixed_size_condition(self._preparation.resolution).to(states.device)
            added = {
                "pooled": torch.cat((none.pooled, shown.pooled)),
                "time_ids": sizes.float().expand(2 * len(batch.noise), -1),
            }
        latents = batch.noise * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            _check_signal(stop)
            both = scheduler.scale_model_input(torch.cat((latents, latents)), timestep)
            predicted, _ = predict_noise(trained.unet, both, timestep, states, **added)
            without, with_conditions = predicted.float().chunk(2)
            guided = without + settings.guidance_scale * (with_conditions - without)
            latents = scheduler.step(guided, timestep, latents, return_dict=False)[0]
        vae = base.vae
        images = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample
        pixels: Tensor = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).cpu()

    def _batches(
        self, preparation: Preparation, numbers: Sequence[int], references: Sequence[int]
    ) -> Iterator[TrainBatch]:
        """Yields batches whose random numbers depend on the place among the samples alone."""
        fixed = _Fixed(tuple(numbers), tuple(references))
        maker = BatchMaker(self._mixture, fixed, preparation, self._features, fixed)
        size = min(_BATCH, self._config.micro_batch_size)
        for start in range(0, len(numbers), size):
            positions = range(start, min(start + size, len(numbers)))
            yield unpacked(maker(positions), preparation, self._frozen.device)


def _check_signal(stop: Stop) -> None:
    if stop.signal:
        raise InterruptedValidationError


def _people(mixture: Mixture, count: int) -> tuple[int, ...]:
    """Returns the first samples, in an order that depends on nothing but their number, that show
    different people.
    """
    permuted = draws.Permutation(len(mixture), 0, "validation", 0)
    chosen, seen = list[int](), set[int]()
    for place in range(len(mixture)):
        if len(chosen) == count:
            break
        number = permuted[place]
        if number not in seen:
            chosen.append(number)
            seen.update(mixture.others(number))
    return tuple(chosen)


def _without_conditions(frozen: Frozen, like: Features) -> Features:
    """Returns features of no text and no person, for as many samples."""
    count, zero = len(like.identity), frozen.zero_hidden
    text_hidden, pooled = split_states(frozen.base, frozen.empty_text.expand(count, -1))
    return Features(
        text_hidden=text_hidden,
        pooled=pooled,
        clip_hidden=zero.expand(count, -1, -1),
        region_hidden=zero.expand(count, like.region_hidden.shape[1], -1, -1),
        identity=torch.zeros_like(like.identity),
        token_mask=torch.zeros_like(like.token_mask),
        token_valid=torch.zeros_like(like.token_valid),
    )


def _photographs(records: Sequence[Record | ShardError], side: int) -> Tensor:
    """Returns the photographs, (N, R, R, 3) uint8; a black one where it can't be read."""
    images = []
    for record in records:
        try:
            if isinstance(record, ShardError):
                raise record
            images.append(training_image(record, side).permute(1, 2, 0))
        except (ShardError, ValueError, OSError):  # Pillow's errors are OSErrors
            images.append(torch.zeros(side, side, 3, dtype=torch.uint8))
    return torch.stack(images)


def write_sheet(output: Path, step: int, sheet: Image.Image) -> Any:
    """Writes a sheet, and returns its pixels (H, W, 3) uint8."""
    target = output / SHEETS / f"{step:06d}.jpg"
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    sheet.save(partial, format="jpeg", quality=90)
    partial.replace(target)
    return np.asarray(sheet)


def open_held_out(config: TrainConfig, index_folder: Path) -> Mixture | None:
    """Opens the validation side of the data sets that have one; None if the run doesn't validate.

    Raises ConfigError if it shows fewer than two people.
    """
    if not config.validation_steps:
        return None
    held_out = replace(config, split="val", pair_prob=0.0)
    mixture = _open_side(held_out, index_folder)
    if mixture is None:
        parts = [replace(held_out, data=(source,)) for source in config.data]
        sources = [part.data[0] for part in parts if _open_side(part, index_folder) is not None]
        if sources:
            mixture = _open_side(replace(held_out, data=tuple(sources)), index_folder)
    if mixture is not None and len(_people(mixture, 2)) == 2:
        return mixture
    raise ConfigError(
        f"validation_steps={config.validation_steps} needs two people on the validation side, and "
        f"the data ({', '.join(source.path for source in config.data)}) has "
        f"{'none' if mixture is None else 'one'}. Set validation_steps=0, or make the data set "
        "with another global_pass.val_share."
    )


def _open_side(config: TrainConfig, index_folder: Path) -> Mixture | None:
    """Opens the data; None if a data set has no sample on the side `config.split`."""
    try:
        return open_mixture(config, index_folder)
    except EmptySideError:
        return None


class Validator:
    """Validates a run at the configured steps, in the main process; the others wait.

    validation: None on other processes. message: for the user.
    """

    def __init__(
        self,
        config: TrainConfig,
        output: Path,
        step: int,
        accelerator: Any,
        validation: Validation | None,
        message: Callable[[str], None],
    ) -> None:
        self._config, self._output, self._accelerator = config, output, accelerator
        self._validation, self._message = validation, message
        self._lines: Lines | None = None
        if accelerator.is_main_process:
            # also without validation: lines of later steps, which are trained again, are removed
            self._lines = Lines(output / VALIDATIONS, step=step)

    def is_due(self, step: int) -> bool:
        """Returns whether a validation follows this step."""
        every = self._config.validation_steps
        ends = step == self._config.max_train_steps
        return bool(every) and step > 0 and (step % every == 0 or ends)

    def validate(
        self, step: int, trained: TrainedModel, average: Average | None, stop: Stop
    ) -> None:
        """Measures and draws with the averaged weights, if there are any, and records both, unless
        that was done. A signal to the main process ends it without a record. Afterwards all
        processes agree to stop if one of them received a signal.
        """
        done = self._lines is not None and any(line["step"] == step for line in self._lines.read())
        if self._validation is not None and not done:
            start_trackers(self._config, self._accelerator)
            try:
                with average.applied() if average is not None else nullcontext():
                    values = self._validation.losses(trained, stop)
                    sheet = self._validation.sheet(trained, stop)
            except InterruptedValidationError:
                self._message(
                    f"validation after step {step:,}: interrupted; a resumed run validates first"
                )
            else:
                self._record(step, values, sheet)
        self._accelerator.wait_for_everyone()
        received = torch.tensor([float(bool(stop.signal))], device=self._accelerator.device)
        stop.agreed |= bool(self._accelerator.reduce(received, "sum") > 0)

    def _record(self, step: int, values: Mapping[str, float], sheet: Image.Image | None) -> None:
        pixels = None if sheet is None else write_sheet(self._output, step, sheet)
        finite = {n: value if math.isfinite(value) else None for n, value in values.items()}
        if self._lines is not None:
            self._lines.add([{"step": step, **finite}])
        self._message(
            f"validation after step {step:,}: noise loss {values['right']:.4f}, with another "
            f"person's identity {values['swapped']:.4f}"
        )
        self._log(step, values, pixels)

    def _log(self, step: int, values: Mapping[str, float], sheet: Any) -> None:
        if self._config.report_to == "none":
            return
        named = {f"validation/{name}": value for name, value in values.items()}
        self._accelerator.log(named, step=step)
        for tracker in self._accelerator.trackers if sheet is not None else ():
            if tracker.name == "tensorboard":
                tracker.log_images({"validation/portraits": sheet[None]}, step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({"validation/portraits": [sheet]}, step)


def open_validator(
    config: TrainConfig,
    mixture: Mixture | None,
    output: Path,
    step: int,
    accelerator: Any,
    frozen: Frozen,
    preparation: Preparation,
    message: Callable[[str], None],
) -> Validator:
    """Makes the validator of a run that has taken `step` steps. mixture: of `open_held_out`."""
    validation = None
    if mixture is not None and accelerator.is_main_process:
        paths = [part.data for part in mixture.parts]
        held_out = tuple(source for source in config.data if source.path in paths)
        own = replace(config, data=held_out)
        features = open_features(own, mixture, output / INDEX, lambda _: None)
        validation = Validation(config, mixture, frozen, preparation, features)
    return Validator(config, output, step, accelerator, validation, message)
