"""Resuming: which checkpoint, and whether it belongs to the same run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from configs.errors import ConfigError, PipelineError, WeightsError
from configs.training import TrainConfig
from model.checkpoint import CONFIG_FILE
from model.spec import Embedder
from stages.storage.layout import LOCK
from train.checkpoints import checkpoints, damage, find_checkpoint, later_than, step_of
from train.features.reading import FeatureSet
from train.mirror import Mirror
from train.mixture import Mixture

# Settings that may differ when a run is resumed. Others would change the model that it makes. A
# name that ends in a dot stands for all settings below it. Not compared for another reason: data,
# whose samples are compared instead of its path.
_MAY_CHANGE: Final = (
    "data",
    "output",
    "work_folder",
    "accept_changes",
    "model.device",
    "ema.on_cpu",
    "max_train_steps",
    "micro_batch_size",
    "max_bad_share",
    "max_nonfinite_steps",
    "verify_samples",
    "gradient_checkpointing",
    "channels_last",
    "compile",
    "mixed_precision",
    "deterministic",
    "threads",
    "num_workers",
    "read_ahead",
    "cache_gb",
    "cache_folder",
    "checkpointing_steps",
    "validation_steps",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "report_to",
    "log_every",
    "log_keys",
    "keep_samples",
    "ray.",
    "features.",
    "validation.",
    "weights.",
)
_DATA: Final = "data"  # in accept_changes: the samples
_FEATURES: Final = "features"  # in accept_changes: cached features, or their lack
_LATEST: Final = "latest"
_RESUMED: Final = ".resumed.partial"  # folder for a checkpoint from another URL, during the run


@dataclass(frozen=True, slots=True)
class Samples:
    """What a run trains on. digest: equal digests mean equal samples in equal order. count: of
    samples. embedder: of their identities, None if the data sets don't state it. features: names of
    those that are read in place of encoding the samples.
    """

    digest: str
    count: int
    embedder: Embedder | None = None
    features: tuple[str, ...] = ()

    @staticmethod
    def of(mixture: Mixture, features: Mapping[str, FeatureSet]) -> Samples:
        """Returns what identifies the samples of a mixture and the features that are read."""
        names = tuple(each.name for each in features.values())
        return Samples(mixture.digest, len(mixture), mixture.embedder(), names)

    def __str__(self) -> str:
        return f"{self.count:,} samples with digest {self.digest[:12]}"


def metadata(config: TrainConfig, samples: Samples, start: str) -> dict[str, Any]:
    """Returns the entries of a checkpoint's adapter.json that say what the run trains on; a resumed
    run is compared with them.

    start: the checkpoint that the run was resumed from by name, "" for none.
    """
    numbers = {
        "data": samples.digest,
        "samples": samples.count,
        "features": list(samples.features),
    }
    embedder = samples.embedder and asdict(samples.embedder)
    return {"train": asdict(config), **numbers, "embedder": embedder, "start": start}


def choose_checkpoint(
    config: TrainConfig,
    samples: Samples,
    output: Path,
    mirror: Mirror | None,
    message: Callable[[str], None],
) -> Path | None:
    """Returns the checkpoint to resume from, None for a new run.

    If `config` names one, and the output has a later checkpoint of a run that was resumed from it
    with the same settings, it is that one: the same command continues its run.

    mirror: fetches checkpoints that the output doesn't have. message: for the user. Raises
    ConfigError if the checkpoint doesn't exist, or if it belongs to another run; WeightsError if it
    is damaged.
    """
    requested = config.resume_from_checkpoint
    if mirror is not None:
        mirror.fetch_newest(message)
    if requested not in ("", _LATEST):
        if (own := _continuation(config, samples, output)) is not None:
            message(f"{own} continues {requested}, and is used")
            return own
        requested = _fetched(requested, output, mirror)
    checkpoint = find_checkpoint(output, requested, message)
    if checkpoint is None:
        return None
    check_same_run(config, samples, checkpoint, message)
    step = int(read_metadata(checkpoint)["step"])
    if later := [path.name for path in later_than(output, step)]:
        if step >= config.max_train_steps:
            raise ConfigError(
                f"{checkpoint} has all max_train_steps={config.max_train_steps} steps, and "
                f"{output} has later ones: {', '.join(later)}. To use it as an adapter, give its"
                " folder to make infer. To train from it, raise max_train_steps or give another "
                "output."
            )
        message(
            f"{', '.join(later)} in {output} are renamed to replaced-checkpoint-…, and removed "
            "when the next checkpoint is written. Move them now to keep them."
        )
    return checkpoint


def agreed_samples(samples: Samples) -> Samples:
    """Returns the samples. Raises ConfigError if they, or the features that are read, aren't the
    same in all processes, since the data set is changing.
    """
    from accelerate.utils import gather_object

    if len({str(each) for each in gather_object([(samples.digest, samples.features)])}) > 1:
        raise ConfigError(
            "the processes see other samples or other features: the data set is being changed. "
            "Wait until that is done, then run the same command again."
        )
    return samples


def agreed_checkpoint(choose: Callable[[], Path | None] | None) -> Path | None:
    """Returns what `choose` returns in the main process, in all processes, or raises its error.

    choose: None in the other processes.
    """
    from accelerate.utils import gather_object

    answer: Path | PipelineError | None = None
    if choose is not None:
        try:
            answer = choose()
        except PipelineError as error:
            answer = error
    answer = gather_object([answer])[0]
    if isinstance(answer, PipelineError):
        raise answer
    return answer


def start_of_run(config: TrainConfig, checkpoint: Path | None) -> str:
    """Returns what the checkpoints of a run that resumes from `checkpoint` state as its start."""
    if checkpoint is None:
        return ""
    if config.resume_from_checkpoint != _LATEST:
        return config.resume_from_checkpoint
    return str(read_metadata(checkpoint).get("start", ""))


def origin(config: TrainConfig, checkpoint: Path | None) -> str:
    """Returns where the checkpoint that a run resumes from is, a folder or URL; "" for None."""
    if checkpoint is not None and checkpoint.parent.name == _RESUMED:
        return config.resume_from_checkpoint.rstrip("/")
    return str(checkpoint or "")


def _continuation(config: TrainConfig, samples: Samples, output: Path) -> Path | None:
    """Returns the newest intact checkpoint of this very run, resumed from the requested one."""
    for path in reversed(checkpoints(output)):
        if not damage(path):
            same = read_metadata(path).get("start") == config.resume_from_checkpoint
            return path if same and not differences(config, samples, path) else None
    return None


def fetch_chosen(config: TrainConfig, checkpoint: Path | None, mirror: Mirror) -> None:
    """Fetches what the main process has chosen, in the first process of another machine."""
    mirror.fetch_folders()
    if checkpoint is not None:
        in_output = checkpoint.parent == mirror.folder
        requested = checkpoint.name if in_output else config.resume_from_checkpoint
        _fetched(requested, mirror.folder, mirror)
    if not (mirror.folder / LOCK).exists():  # else the main process has the same folder
        mirror.remove_others(checkpoint)


def _fetched(requested: str, output: Path, mirror: Mirror | None) -> str:
    """Fetches a checkpoint from an object store, and returns the name or folder of its copy."""
    store, name = mirror, requested.rstrip("/")
    if "://" in requested:
        url, _, name = name.rpartition("/")
        store = Mirror(url, output / _RESUMED)
    if store is None or (step := step_of(name)) is None:
        return requested
    if how := store.fetch(step):
        if (store.folder / name).exists():
            return requested  # it isn't uploaded yet
        raise WeightsError(
            f"resume_from_checkpoint={requested}: {store.store.url}/{name} can't be used: {how}. "
            "Name another checkpoint."
        )
    if store is not mirror:
        store.fetch_folders()
    return str(store.folder / name)


def check_same_run(
    config: TrainConfig, samples: Samples, checkpoint: Path, message: Callable[[str], None]
) -> None:
    """Raises ConfigError if `config` would make another model than the run that wrote the
    checkpoint, WeightsError if the checkpoint doesn't state that run's settings. Differences that
    `accept_changes` names go to `message` instead.
    """
    changes = differences(config, samples, checkpoint)
    refused = [name for name in changes if name not in config.accept_changes]
    if refused:
        raise ConfigError(
            f"{checkpoint} was made with other settings: "
            f"{'; '.join(changes[name] for name in refused)}. Use the same settings, or another "
            "output. To continue from it although the result differs, set "
            f"accept_changes=[{','.join(refused)}]."
        )
    for text in changes.values():
        message(f"accepted, since {checkpoint.name}: {text}")
    steps = read_metadata(checkpoint)["train"].get("max_train_steps", config.max_train_steps)
    if steps != config.max_train_steps and "constant" not in config.optim.lr_scheduler:
        message(
            f"optim.lr_scheduler={config.optim.lr_scheduler} depends on max_train_steps={steps}, "
            f"now {config.max_train_steps}: from here, learning rates are those of the new number"
        )


def check_accepted(config: TrainConfig) -> None:
    """Raises ConfigError if `accept_changes` names something that is not a setting."""
    names = {*flatten(asdict(config)), _FEATURES}
    if unknown := [name for name in config.accept_changes if name not in names]:
        raise ConfigError(
            f"accept_changes={','.join(unknown)}: expected names of settings that may differ from "
            "the checkpoint's, such as data or optim.learning_rate."
        )


def differences(config: TrainConfig, samples: Samples, checkpoint: Path) -> dict[str, str]:
    """Returns name → both values, of what would make another model than the checkpoint's run.

    A setting that the checkpoint doesn't know had its default. Raises WeightsError if the
    checkpoint doesn't state that run's settings.
    """
    values = read_metadata(checkpoint)
    before = {**flatten(asdict(TrainConfig())), **flatten(values["train"])}
    now = flatten(asdict(config))
    exact = {name for name in _MAY_CHANGE if not name.endswith(".")}
    sections = tuple(name for name in _MAY_CHANGE if name.endswith("."))
    changes = {
        name: f"{name}={before[name]!r}, now {now[name]!r}"
        for name in now
        if now[name] != before[name] and name not in exact and not name.startswith(sections)
    }
    trained = Samples(values["data"], values["samples"])
    if trained.digest != samples.digest:
        changes[_DATA] = f"data had {trained}, now {samples}"
    if (features := tuple(values.get("features", ()))) != samples.features:
        before_text, now_text = (", ".join(each) or "none" for each in (features, samples.features))
        changes[_FEATURES] = (
            f"features that were read: {before_text}, now {now_text}; features.use=false reads none"
        )
    return changes


def read_metadata(checkpoint: Path) -> dict[str, Any]:
    """Returns the contents of a checkpoint's adapter.json. Raises WeightsError if the settings of
    its run aren't there.
    """
    path = checkpoint / CONFIG_FILE
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        flatten(values["train"])
        int(values["step"]), str(values["data"]), int(values["samples"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{path} doesn't state the settings of its run ({type(error).__name__}: {error}). "
            "Resume from another checkpoint."
        ) from error
    return values


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Returns nested settings with dotted keys, and lists as text."""
    items: dict[str, str | int | float | bool] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            items.update(flatten(value, f"{prefix}{key}."))
        elif isinstance(value, list | tuple):  # JSON has no tuples
            items[f"{prefix}{key}"] = str(list(value))
        else:
            items[f"{prefix}{key}"] = (
                value if isinstance(value, str | int | float | bool) else str(value)
            )
    return items
