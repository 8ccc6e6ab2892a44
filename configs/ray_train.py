"""Settings of training on a Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass

from configs.common import check as _check


@dataclass(frozen=True, slots=True, kw_only=True)
class RayTrainConfig:
    """Training on a Ray cluster, with Ray Train."""

    # host:port, auto (the cluster that this node belongs to), local (a new one); "": without Ray
    address: str = ""
    workers: int = 0  # processes that train; 0: as many as fit into the cluster
    cpus: float = 1.0  # that each reserves, for itself and the processes that read samples
    gpus: int = 1  # 1: each trains on a GPU; 0: on CPUs
    storage_path: str = ""  # of Ray Train's own files, a folder or fsspec URL; "": OUTPUT/ray
    max_failures: int = 3  # how often all workers are started again after one of them died

    def __post_init__(self) -> None:
        _check(self.workers >= 0, f"ray.workers={self.workers}: expected at least 0")
        _check(self.cpus > 0, f"ray.cpus={self.cpus}: expected more than 0")
        _check(
            self.gpus in (0, 1), f"ray.gpus={self.gpus}: expected 0 or 1, since a process uses one"
        )
        _check(
            self.max_failures >= 0,
            f"ray.max_failures={self.max_failures}: expected at least 0",
        )
