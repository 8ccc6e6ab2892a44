"""Makes any of diffusers' schedulers by class name, with the base model's noise schedule.

Schedulers for other kinds of models (flow matching, EDM, video, inversion) are rejected: they
would run, but give noise.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any, Final

from configs.errors import ConfigError

_SUFFIX: Final = "Scheduler"
_ZERO_SNR: Final = "rescale_betas_zero_snr"  # an option of diffusers' schedulers
_OTHER_MODELS: Final = ("CogVideoX", "EDM", "Helios", "SCM", "UnCLIP")


def known_schedulers() -> tuple[str, ...]:
    """Returns the class names of diffusers' schedulers that can sample Stable Diffusion, sorted."""
    import diffusers

    return tuple(sorted(name for name in dir(diffusers) if name.endswith(_SUFFIX) and _suits(name)))


def check_scheduler(name: str) -> None:
    """Raises ConfigError for an unknown scheduler, or one that needs a missing package.

    The message names the closest known ones.
    """
    import diffusers

    if name.endswith(_SUFFIX) and name in dir(diffusers):
        if not _installed(name):
            raise ConfigError(
                f"scheduler={name} needs a package that isn't installed (the SDE schedulers need "
                "torchsde); install it, or choose another scheduler"
            )
        if _suits(name):
            return  # without importing all the others, which takes seconds
    names = known_schedulers()
    # Compared without the suffix, which would make all names similar.
    stems = {each.removesuffix(_SUFFIX): each for each in names}
    close = [
        stems[stem]
        for stem in difflib.get_close_matches(name.removesuffix(_SUFFIX), stems, 3, cutoff=0.5)
    ]
    hint = f"Did you mean {' or '.join(close)}?" if close else f"Known: {', '.join(names)}."
    raise ConfigError(
        f"scheduler={name}: not a scheduler for Stable Diffusion in diffusers. {hint}"
    )


def make_scheduler(name: str, base: Any, options: Mapping[str, Any] | None = None) -> Any:
    """Makes the scheduler with that class name and the noise schedule of `base`.

    base: the base model's own scheduler. options: settings that differ from it, for example
    use_karras_sigmas. Raises ConfigError as `check_scheduler` does, for an unknown option, and for
    a scheduler that can't have noise up to a signal-to-noise ratio of 0 if the base has.
    """
    import diffusers

    check_scheduler(name)
    kind = getattr(diffusers, name)
    parameters = inspect.signature(kind).parameters
    if base.config.get(_ZERO_SNR) and _ZERO_SNR not in parameters:
        able = [each for each in known_schedulers() if _has_option(each, _ZERO_SNR)]
        raise ConfigError(
            f"scheduler={name} has no noise with a signal-to-noise ratio of 0, which this base "
            f"model was trained with ({_ZERO_SNR}); choose one of {', '.join(able)}"
        )
    for option in options or {}:
        if option not in parameters:
            close = difflib.get_close_matches(option, parameters, 3, cutoff=0.4)
            raise ConfigError(
                f"scheduler_options: {name} has no option {option!r}. "
                f"{f'Did you mean {close[0]}?' if close else f'It has {chr(44).join(parameters)}.'}"
            )
    return unclipped(kind.from_config(base.config, **(options or {})))


def unclipped(scheduler: Any) -> Any:
    """Returns the scheduler, or one that doesn't clip samples if it does.

    Latents exceed the ±1 that images are clipped to. DDIM and DDPM clip unless the configuration
    that they are made from says otherwise, and that of other schedulers says nothing.
    """
    if not scheduler.config.get("clip_sample"):
        return scheduler
    return type(scheduler).from_config(scheduler.config, clip_sample=False)


def merge_position(start_merge_step: int, steps: int, evaluations: int) -> int:
    """Converts `start_merge_step` of `steps` into a number of the UNet's evaluations.

    The two differ only for schedulers that evaluate the UNet more than once in a step (Heun, KDPM2,
    PNDM's first steps).
    """
    return (
        start_merge_step if evaluations == steps else round(start_merge_step * evaluations / steps)
    )


def _installed(name: str) -> bool:
    """Returns False for the dummy class that diffusers has where a package is missing."""
    import diffusers
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    kind = getattr(diffusers, name)
    return isinstance(kind, type) and issubclass(kind, SchedulerMixin)


def _suits(name: str) -> bool:
    """Returns whether a scheduler of diffusers can sample Stable Diffusion."""
    if not _installed(name) or name.startswith(_OTHER_MODELS) or name.endswith(f"Inverse{_SUFFIX}"):
        return False
    return _has_option(name, "prediction_type")


def _has_option(name: str, option: str) -> bool:
    import diffusers

    return option in inspect.signature(getattr(diffusers, name)).parameters
