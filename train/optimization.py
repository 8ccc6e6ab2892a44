"""How the weights of a run change: the optimizer, its learning rates, and the moving average."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import ConfigError, WeightsError
from configs.training import OptimConfig, TrainConfig
from model.consistentid import ConsistentID, part_of
from train.average import Average
from train.sharding import sharded_as, whole


class Optimization:
    """The optimizer of the parts that train, its schedule, and the average of the weights.

    parameters: that train, in the order of the adapter. optimizer: Trainer replaces it by
    accelerate's wrapper. average: None unless the settings ask for one.
    """

    def __init__(self, config: TrainConfig, adapter: ConsistentID) -> None:
        self._config = config
        parameters = {name: p for name, p in adapter.named_parameters() if p.requires_grad}
        self.parameters = [*parameters.values()]
        self.optimizer: Any
        self.optimizer, self.schedule = make_optimizer(config, parameters)
        self.average = Average(config.ema, parameters) if config.ema.decay else None

    def summary(self) -> str:
        """Returns a line for each part that trains: its number of parameters and learning rate."""
        rows = [
            (group["part"], sum(p.numel() for p in group["params"]), group["initial_lr"])
            for group in self.optimizer.param_groups
        ]
        lines = [f"  {part:<14}  {count:>13,}  at {rate:g}" for part, count, rate in rows]
        total = sum(count for _, count, _ in rows)
        return "\n".join([f"{total:,} parameters train, with these learning rates:", *lines])

    def rates(self) -> dict[str, float]:
        """Returns the learning rates of the next step: `lr`, and `lr_PART` of parts that have
        their own.
        """
        own = self._config.optim.learning_rates.by_part()
        return {
            f"lr_{group['part']}" if group["part"] in own else "lr": float(group["lr"])
            for group in self.optimizer.param_groups
        }

    def step(self, accelerator: Any) -> Tensor:
        """Changes the weights by their gradients, and removes these. Returns 1 if the update was
        skipped because a gradient isn't finite, else 0; a scalar on the device.
        """
        most = self._config.optim.max_grad_norm
        norm = whole(accelerator.clip_grad_norm_(self.parameters, most))
        skipped: Tensor = (~torch.isfinite(norm)).float()
        self.optimizer.optimizer.found_inf = skipped  # the fused AdamW does nothing where it is 1
        # Others don't read it, so the host has to wait for the norm. A scaler does that itself.
        reads = self._config.optim.optimizer == "adamw" and norm.device.type != "mps"
        if reads or accelerator.scaler is not None or not skipped:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        if self.average is not None:
            self.average.step()
        return skipped

    def averaged(self) -> dict[str, Tensor]:
        """Returns the averaged weights by their keys in the adapter's state, {} without average."""
        return self.average.weights() if self.average is not None else {}

    def state_dict(self) -> dict[str, Any]:
        """Returns what `load_state_dict` reads, as tensors and plain values."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "average": self.average.state_dict() if self.average is not None else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores optimizer, schedule and average, except for the settings that they were made
        with: a learning rate that was changed on purpose takes effect.
        """
        load_optimizer(self.optimizer, self.schedule, state)
        if self.average is not None:
            self.average.load_state_dict(state.get("average", {}))


def make_optimizer(
    config: TrainConfig, parameters: Mapping[str, nn.Parameter]
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Makes AdamW, with a group for each part that trains, and its learning rate schedule over all
    steps of the run.

    parameters: by their keys in the adapter's state. Raises ConfigError for an unknown schedule, or
    if bitsandbytes is needed and isn't installed.
    """
    from diffusers.optimization import SchedulerType, get_scheduler

    optim = config.optim
    # piecewise_constant needs further settings
    names = [kind.value for kind in SchedulerType if kind.value != "piecewise_constant"]
    if optim.lr_scheduler not in names:
        raise ConfigError(
            f"optim.lr_scheduler={optim.lr_scheduler}: expected one of {', '.join(names)}"
        )
    own = optim.learning_rates.by_part()
    groups = [
        {
            "params": [(name, p) for name, p in parameters.items() if part_of(name) == part],
            "part": part,
            "kind": optim.optimizer,
            "lr": own.get(part, optim.learning_rate),
        }
        for part in config.trained_parts
    ]
    optimizer = _optimizer_class(optim)(
        groups,
        lr=optim.learning_rate,  # the schedule "polynomial" reads it
        betas=(optim.adam_beta1, optim.adam_beta2),
        weight_decay=optim.adam_weight_decay,
        eps=optim.adam_epsilon,
    )
    schedule: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
        optim.lr_scheduler,
        optimizer,
        num_warmup_steps=optim.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )
    return optimizer, schedule


def _numbers(state: Mapping[str, Any]) -> dict[str, int]:
    """Returns the number of each parameter in an optimizer's state, by name."""
    return {
        name: number
        for group in state["param_groups"]
        for name, number in zip(group["param_names"], group["params"], strict=True)
    }


def _optimizer_class(config: OptimConfig) -> Callable[..., torch.optim.Optimizer]:
    if config.optimizer == "adamw":
        return partial(torch.optim.AdamW, fused=True)  # it can skip an update on the device
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            f"optim.optimizer=adamw8bit needs bitsandbytes, which can't be imported ({error}). "
            "Install it (pip install bitsandbytes), or set optim.optimizer=adamw."
        ) from error
    return AdamW8bit  # type: ignore[no-any-return]


def load_optimizer(optimizer: Any, schedule: Any, state: Mapping[str, Any]) -> None:
    """Restores an optimizer and a schedule of `make_optimizer`, except for their settings.

    A parameter keeps its moments whatever else trained then or trains now; one that didn't train
    before begins without, as all do if the optimizer was of another kind. state: of `state_dict`.
    Raises WeightsError if an earlier version wrote it, which didn't name the parameters.
    """
    before, now = state["optimizer"], optimizer.state_dict()
    if not all("param_names" in group for group in before["param_groups"]):
        raise WeightsError(
            "the checkpoint was written by an earlier version, whose optimizer states can't be "
            "read. Start a new run from its weights: adapter=CHECKPOINT, with another output."
        )
    number_before, moments = _numbers(before), {}
    if before["param_groups"][0]["kind"] == now["param_groups"][0]["kind"]:
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        moments = {
            number: {
                key: sharded_as(parameters[number], value) if isinstance(value, Tensor) else value
                for key, value in before["state"][number_before[name]].items()
            }
            for name, number in _numbers(now).items()
            if number_before.get(name) in before["state"]
        }
    optimizer.load_state_dict({**now, "state": moments})
    # these two have an entry for each group, and the groups may be others
    of_groups = {"base_lrs": schedule.base_lrs, "lr_lambdas": []}
    schedule.load_state_dict({**state["schedule"], **of_groups})
    factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
    rates = [base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates
