"""How the global batch of a step is divided among processes and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from configs.errors import ConfigError


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """size: samples of a step, over all processes. micro: samples that a process takes through the
    model together. accumulation: micro-batches of each process in a step. world: processes.
    """

    size: int
    micro: int
    accumulation: int
    world: int

    def __str__(self) -> str:
        parts = [f"{self.world} process{'es' if self.world > 1 else ''}"]
        if self.accumulation > 1:
            parts.append(f"{self.accumulation} micro-batches")
        return f"{self.size} samples a step = {' × '.join(parts)} × {self.micro}"


def plan_batches(size: int, most: int, world: int) -> BatchPlan:
    """Divides `size` samples equally among `world` processes, and each one's share into the fewest
    equal micro-batches of at most `most` samples. Raises ConfigError if that is impossible.
    """
    share, rest = divmod(size, world)
    if rest:
        fitting = [n for n in range(1, size + 1) if size % n == 0]
        raise ConfigError(
            f"global_batch_size={size} can't be divided equally among {world} processes. Start "
            f"{_listed(fitting)} processes, or set global_batch_size to a multiple of {world}: the "
            "next are "
            f"{max(1, size // world) * world} and {(size // world + 1) * world}."
        )
    micro = max(n for n in range(1, min(most, share) + 1) if share % n == 0)
    return BatchPlan(size, micro, share // micro, world)


def _listed(numbers: list[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last
