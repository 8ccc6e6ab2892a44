"""Any of diffusers' schedulers by class name, set up as the base model's own.

Schedulers of other kinds of models (flow matching, EDM's preconditioning, video, inversion) are
refused by name: they would run and give noise.
"""

from __future__ import annotations

import difflib
import inspect
from typing import Any, Final

from configs.errors import ConfigError

_SUFFIX: Final = "Scheduler"
_OTHER_MODELS: Final = ("CogVideoX", "EDM", "Helios", "SCM", "UnCLIP")


def known_schedulers() -> tuple[str, ...]:
    """Names of the installed diffusers' schedulers that suit Stable Diffusion."""
    import diffusers

    return tuple(sorted(name for name in dir(diffusers) if name.endswith(_SUFFIX) and _suits(name)))


def check_scheduler(name: str) -> None:
    """Raise ConfigError for a name that isn't known, naming the closest, or that needs a package
    which isn't there.
    """
    import diffusers

    if name.endswith(_SUFFIX) and name in dir(diffusers):
        if not _installed(name):
            raise ConfigError(
                f"scheduler={name}: it needs a package that isn't installed (torchsde, for the "
                "SDE ones)"
            )
        if _suits(name):
            return  # without importing all the others, which takes seconds
    known = known_schedulers()
    # the suffix alone would make anything close
    stems = {each.removesuffix(_SUFFIX): each for each in known}
    close = [
        stems[stem]
        for stem in difflib.get_close_matches(name.removesuffix(_SUFFIX), stems, 3, cutoff=0.5)
    ]
    hint = f"Did you mean {' or '.join(close)}?" if close else f"Known: {', '.join(known)}."
    raise ConfigError(
        f"scheduler={name}: not a scheduler for Stable Diffusion in diffusers. {hint}"
    )


def make_scheduler(name: str, base: Any) -> Any:
    """The scheduler of that class name with the noise schedule of `base`, the base model's own
    scheduler.

    Raises ConfigError as `check_scheduler` does.
    """
    import diffusers

    check_scheduler(name)
    return getattr(diffusers, name).from_config(base.config)


def merge_position(start_merge_step: int, steps: int, evaluations: int) -> int:
    """`start_merge_step` of `steps` as a number of the UNet's evaluations.

    They are the same except for schedulers that evaluate more than once per step (Heun, KDPM2,
    PNDM's start).
    """
    return (
        start_merge_step if evaluations == steps else round(start_merge_step * evaluations / steps)
    )


def _installed(name: str) -> bool:
    """False for diffusers' stand-in for a class whose package isn't there."""
    import diffusers
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    kind = getattr(diffusers, name)
    return isinstance(kind, type) and issubclass(kind, SchedulerMixin)


def _suits(name: str) -> bool:
    import diffusers

    if not _installed(name) or name.startswith(_OTHER_MODELS) or name.endswith(f"Inverse{_SUFFIX}"):
        return False
    return "prediction_type" in inspect.signature(getattr(diffusers, name)).parameters
