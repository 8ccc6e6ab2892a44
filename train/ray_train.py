"""Training on a Ray cluster: Ray Train starts the workers, and starts them again when one dies.

Each worker calls `train.trainer.train`, as the processes of other launchers do, and resumes by
itself from the last checkpoint in OUT. So Ray Train's own checkpoints and reports aren't used: a
report would make every worker wait for the controller, which looks for it every two seconds.

The driver passes signals on, and prints what the main worker tells it (train/relay.py).
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from configs.errors import ConfigError, PipelineError, StoreError, TrainingError, user_message
from configs.ray_train import RayTrainConfig
from configs.schema import RayConfig
from configs.training import TrainConfig
from stages.executors.cluster import list_nodes, ray_cluster, start_on_this_node
from stages.executors.placement import Resources
from stages.storage.remote import file_system
from stages.storage.store import Store
from train.batches import plan_batches
from train.checkpoints import checkpoint_name, find_checkpoint
from train.mirror import open_output
from train.outcome import Outcome, Watcher
from train.relay import News, Relay
from train.setup import check_config
from train.stopping import Stop, stop_on_signal

_INTERVAL: Final = 0.5  # seconds between two calls of the relay
_SILENT: Final = 60.0  # seconds without a worker after which the driver says so
# folder in OUT; holds nothing but Ray Train's marker of a storage that it can write
_FOLDER: Final = "ray"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """What each worker gets. relay: the actor. folder: the driver's working folder, which relative
    paths are relative to. marker: a file that the driver has written to OUT. host: the driver's.
    """

    config: TrainConfig
    relay: Any
    folder: str
    marker: str
    host: str


def train_on_ray(config: TrainConfig, watcher: Watcher) -> Outcome:
    """Trains as `train.trainer.train` does, on the cluster at `config.ray.address`.

    Raises PipelineError for wrong settings, data or weights, for a cluster that is too small, and
    if workers have died more than `ray.max_failures` times.
    """
    config = _for_workers(config)
    with ray_cluster(RayConfig(address=config.ray.address)), stop_on_signal() as stop:
        import ray

        workers = count_workers(config.ray, list_nodes())
        plan_batches(config.global_batch_size, config.micro_batch_size, workers)
        watcher.message(f"ray: {workers} × {_worker(config.ray)}")
        relay = start_on_this_node(Relay)
        with _marker(config.output) as marker:
            task = _Task(
                config=config,
                relay=relay,
                folder=str(Path.cwd()),
                marker=marker,
                host=platform.node(),
            )
            fit = _Fit(_trainer(task, workers))
            heard = time.monotonic()
            while fit.is_alive():
                fit.join(_INTERVAL)
                now = time.monotonic()
                if _exchange(relay, watcher, stop):
                    heard = now
                elif now - heard > _SILENT and fit.is_alive():
                    heard = now
                    free = ray.available_resources()
                    watcher.message(
                        f"no worker has run for {_SILENT:.0f} s: they are starting, or wait for "
                        f"room. Free are {free.get('CPU', 0):g} CPUs, {free.get('GPU', 0):g} GPUs."
                    )
            _exchange(relay, watcher, stop)
            return fit.outcome()


def count_workers(settings: RayTrainConfig, nodes: Sequence[Resources]) -> int:
    """Returns the number of workers: `settings.workers`, or as many as fit if that is 0. Raises
    ConfigError if so many don't fit.
    """
    fit = 0
    for node in nodes:
        room = int(node.cpus / settings.cpus)
        fit += min(room, int(node.gpus)) if settings.gpus else room
    wanted = settings.workers or 1
    if fit < wanted:
        has = "; ".join(f"{node.cpus:g} CPUs, {node.gpus:g} GPUs" for node in nodes)
        raise ConfigError(
            f"the cluster has room for {fit} of {wanted} × {_worker(settings)}. Its nodes have "
            f"{has or 'no CPUs'}. Start more nodes, or lower ray.workers or ray.cpus; ray.gpus=0 "
            "trains on CPUs."
        )
    return settings.workers or fit


def _worker(settings: RayTrainConfig) -> str:
    return f"training worker, each {settings.cpus:g} CPU, {settings.gpus} GPU"


def _for_workers(config: TrainConfig) -> TrainConfig:
    """Returns the configuration that workers get. Raises ConfigError for what is wrong in it."""
    # The driver needs no GPU: each worker checks its own.
    check_config(replace(config, model=replace(config.model, device="auto")))
    if "WORLD_SIZE" in os.environ:
        raise ConfigError(
            f"ray.address={config.ray.address}, but another launcher has started this process "
            f"(WORLD_SIZE={os.environ['WORLD_SIZE']}). Ray starts the processes of a run: give "
            "the command without torchrun or accelerate launch."
        )
    if config.ray.gpus and config.model.device == "cpu":
        raise ConfigError("model.device=cpu, but ray.gpus=1. Set ray.gpus=0.")
    if not config.ray.gpus and config.model.device == "cuda":
        raise ConfigError("model.device=cuda, but ray.gpus=0. Set ray.gpus=1.")
    if not config.resume_from_checkpoint:
        _refuse_checkpoints(config)
    return replace(
        config,
        model=replace(config.model, device="cuda" if config.ray.gpus else "cpu"),
        # workers that are started again resume from what this run has written
        resume_from_checkpoint=config.resume_from_checkpoint or "latest",
    )


def _refuse_checkpoints(config: TrainConfig) -> None:
    """Raises ConfigError if the output has checkpoints."""
    folder, mirror = open_output(config)
    find_checkpoint(folder, "")
    if mirror is not None and (steps := mirror.complete_steps()):
        raise ConfigError(
            f"{config.output} has checkpoints up to {checkpoint_name(max(steps))}, but "
            "resume_from_checkpoint is empty. Name another output, or set "
            "resume_from_checkpoint=latest."
        )


@contextmanager
def _marker(output: str) -> Iterator[str]:
    """Writes a file to OUT by which workers see that it is the driver's; yields its name."""
    store, name = Store(output), f"{_FOLDER}/driver-{uuid4().hex[:8]}"
    store.write(name, platform.node())
    try:
        yield name
    finally:
        with suppress(StoreError):
            store.remove(name)


class _Fit(threading.Thread):
    """Runs `trainer.fit()` in a thread: in the main one, Ray Train would handle signals itself."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(daemon=True, name="ray train")
        self._trainer = trainer
        self._result: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._trainer.fit()
        except BaseException as error:  # noqa: BLE001 - `outcome` raises it
            self._error = error

    def outcome(self) -> Outcome:
        """Returns what the main worker returned. Raises PipelineError for what the user can
        correct, TrainingFailedError, with the worker's traceback, for an error of the program.
        """
        from ray.train import ControllerError, WorkerGroupError

        error = self._error
        if isinstance(error, ControllerError) and isinstance(
            error.controller_failure, PipelineError
        ):
            raise error.controller_failure from None
        if isinstance(error, WorkerGroupError) and any(map(_died, error.worker_failures.values())):
            limit = self._trainer.run_config.failure_config.max_failures
            raise TrainingError(
                f"{_describe(error.worker_failures)}, after {limit} restarts (ray.max_failures). "
                "The same command resumes from the last checkpoint."
            ) from None
        if error is not None:
            raise error
        outcome: Outcome = self._result.return_value
        return outcome


def _exchange(relay: Any, watcher: Watcher, stop: Stop) -> bool:
    """Passes a signal to the workers and their news to the watcher; returns whether there were."""
    import ray

    try:
        news: News | None = ray.get(relay.exchange.remote(stop.signal), timeout=5)
    except ray.exceptions.RayError:  # the next call gets the news
        return False
    for text in news.messages if news else ():
        watcher.message(text)
    if news and news.step:
        watcher.step(news.step, news.losses)
    return news is not None


def _trainer(task: _Task, workers: int) -> Any:
    """Returns Ray Train's trainer for `workers` workers."""
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # `_train_worker` changes to the driver's folder
    from pyarrow.fs import PyFileSystem
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    settings = task.config.ray
    url = settings.storage_path or f"{task.config.output.rstrip('/')}/{_FOLDER}"
    return TorchTrainer(
        _train_worker,
        train_loop_config={"task": task},
        torch_config=TorchConfig(backend="nccl" if settings.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=bool(settings.gpus),
            resources_per_worker={"CPU": settings.cpus, "GPU": settings.gpus},
        ),
        run_config=RunConfig(
            name="train",
            storage_path=file_system(url)[1],
            storage_filesystem=PyFileSystem(_storage_handler(url)),
            failure_config=FailureConfig(max_failures=settings.max_failures),
            callbacks=[_failures(task.relay, settings.max_failures)],
        ),
    )


def _storage_handler(url: str) -> Any:
    """Returns a handler of pyarrow for the URL's file system. Each process that it is sent to opens
    the URL with the keys in its own environment; an fsspec object would carry the driver's.
    """
    from pyarrow.fs import FSSpecHandler

    class UrlHandler(FSSpecHandler):  # type: ignore[misc]
        def __reduce__(self) -> tuple[Any, ...]:
            return _storage_handler, (url,)

    return UrlHandler(file_system(url)[0])


def _failures(relay: Any, limit: int) -> Any:
    """Returns Ray Train's callback for failed workers, which runs in its controller.

    An error that the user can correct is raised there, which ends the run. Of others, the driver
    gets a message, and the workers are started again up to `limit` times.
    """
    from ray.train import UserCallback

    class Failures(UserCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.restarts = 0

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Any]) -> None:
            for error in worker_exceptions.values():
                if isinstance(error, PipelineError):
                    raise error
            self.restarts += 1
            if self.restarts <= limit:
                text = (
                    f"{_describe(worker_exceptions)}; all workers start again from the last "
                    f"checkpoint (restart {self.restarts} of at most {limit})"
                )
                relay.tell.remote(News((text,)))

    return Failures()


def _describe(failures: Mapping[int, Exception]) -> str:
    """Describes the failure of a group of workers in one line, by rank. If one has died, the errors
    of the others follow from that.
    """
    dead = [str(rank) for rank, error in failures.items() if _died(error)]
    if dead:
        return f"worker {' and '.join(dead)} died"
    rank, error = next(iter(failures.items()))
    reason = str(error).strip().partition("\n")[0]
    return f"worker {rank} failed with {type(error).__name__}: {reason}"


def _died(failure: Exception) -> bool:
    from ray.exceptions import RayActorError

    return isinstance(getattr(failure, "health_check_failure", failure), RayActorError)


def _train_worker(arguments: dict[str, _Task]) -> Outcome:
    """Trains in a worker of Ray Train, which has set up the process group."""
    import ray.train

    task, rank = arguments["task"], ray.train.get_context().get_world_rank()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader workers are forked
    with suppress(OSError):  # with absolute paths and URLs it isn't needed
        os.chdir(task.folder)
    try:
        _check_output(task)
        from train.trainer import train

        if rank:
            return train(task.config, _Quiet(), _never)
        with _MainWorker(task.relay) as main:
            return train(task.config, main, main.stopping)
    except (PipelineError, OSError) as error:
        if (message := user_message(error)) is None:
            raise
        kind = type(error) if isinstance(error, PipelineError) else StoreError
        raise kind(f"{message} (worker {rank} on {platform.node()})") from None


def _check_output(task: _Task) -> None:
    if not Store(task.config.output).exists(task.marker):
        raise ConfigError(
            f"output={task.config.output} isn't the folder that the driver on {task.host} writes "
            "to. Give a folder that is mounted on all nodes, or an fsspec URL."
        )


@contextmanager
def _never() -> Iterator[Stop]:
    """Workers get no signals of their own: the main one gets the driver's, and all agree."""
    yield Stop()


class _Quiet:
    """A Watcher for workers other than the main one."""

    def message(self, text: str) -> None:
        pass

    def step(self, step: int, losses: dict[str, float] | None) -> None:
        pass


class _MainWorker:
    """A Watcher and a context manager: a thread sends what it receives to the relay, and brings the
    driver's signal.
    """

    def __init__(self, relay: Any) -> None:
        self._relay = relay
        self._stop = Stop()
        self._lock = threading.Lock()
        self._news = News()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True, name="relay")

    def __enter__(self) -> _MainWorker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(timeout=5)

    @contextmanager
    def stopping(self) -> Iterator[Stop]:
        yield self._stop

    def message(self, text: str) -> None:
        with self._lock:
            self._news = self._news._replace(messages=(*self._news.messages, text))

    def step(self, step: int, losses: dict[str, float] | None) -> None:
        with self._lock:
            self._news = self._news._replace(step=step, losses=losses or self._news.losses)

    def _loop(self) -> None:
        while not self._ended.wait(_INTERVAL):
            self._send()
        self._send()

    def _send(self) -> None:
        import ray

        with self._lock:
            news, self._news = self._news, News()
        with suppress(ray.exceptions.RayError):  # the driver is ending
            self._stop.signal = ray.get(self._relay.tell.remote(news), timeout=5)
