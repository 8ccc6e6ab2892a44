"""The Ray cluster of a run: an existing one, or a new local one."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import configs
from configs.schema import RayConfig
from stages.executors.placement import Resources

# This project's top-level packages; a job's classes and its chain may be in any of them.
PACKAGES: Final = ("configs", "stages", "model", "pipelines", "train", "infer")
# Ray's default ends idle worker processes after one second; the next task would import for seconds.
_IDLE_MS: Final = 60_000


@contextmanager
def ray_cluster(settings: RayConfig) -> Iterator[None]:
    """A context with a Ray cluster: the one that this process is connected to, else that at
    `settings.address` or $RAY_ADDRESS, else a new local one. Disconnects at the end, except from
    the first.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    _start_ray(settings)
    try:
        yield
    finally:
        ray.shutdown()


def existing_address(settings: RayConfig) -> str:
    """Returns the address of the cluster that a run uses; "" if it starts a local one."""
    address = settings.address or os.environ.get("RAY_ADDRESS", "")
    return "" if address == "local" else address


def cluster_address() -> str:
    """Returns the address of the cluster that this process is connected to."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


def _start_ray(settings: RayConfig) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # workers log to their own files
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Ray Data logs each error with its traceback, and raises it too
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "CRITICAL")
    logging.getLogger("ray").setLevel(logging.ERROR)
    import ray

    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address := existing_address(settings):
        ray.init(address=address, runtime_env=runtime_env(), **quiet)
        return
    ray.init(
        address="local",
        num_cpus=os.cpu_count(),
        object_store_memory=settings.object_store_mb * 1_000_000,
        include_dashboard=False,
        _system_config={"idle_worker_killing_time_threshold_ms": _IDLE_MS},
        **quiet,
    )


def runtime_env() -> dict[str, Any] | None:
    """Returns Ray's `runtime_env` that sends PACKAGES to remote workers, so that their image needs
    only the requirements. None inside `ray job submit`, which has sent its working directory.
    """
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return None
    root = Path(configs.__file__).parents[1]
    return {"py_modules": [str(root / name) for name in PACKAGES]}


def start_on_this_node(kind: type[Any]) -> Any:
    """Starts an object without arguments as a Ray actor on this process's node, so that the death
    of another node can't end it. The actor is a process, so its module should import little.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here, max_restarts=-1, max_task_retries=-1)(
        kind
    ).remote()


def list_nodes() -> list[Resources]:
    """Returns the resources of every living node, without those that placement groups reserve, such
    as the one of caption servers (stages/executors/fleet.py).
    """
    import ray

    nodes = {node["NodeID"]: Counter(node["Resources"]) for node in ray.nodes() if node["Alive"]}
    for group in ray.util.placement_group_table().values():
        for bundle, node in group["bundles_to_node_id"].items():
            if group["state"] != "REMOVED" and node in nodes:
                nodes[node].subtract(group["bundles"][bundle])
    return [Resources(max(0.0, node["CPU"]), max(0.0, node["GPU"])) for node in nodes.values()]
