"""CheckpointWriter: writes checkpoints in a background thread during training."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from configs.errors import StoreError
from stages.storage.lock import RunLock
from stages.storage.store import Store
from train.checkpoints import (
    checkpoint_name,
    checkpoints,
    expired,
    remove_checkpoint,
    remove_partial_folders,
    remove_replaced,
    step_of,
    sync,
    write_folder_atomically,
)
from train.mirror import Mirror
from train.shards import INDEX
from train.state import Snapshot

_SLOW: Final = 10.0  # seconds of waiting after which the user is told


class CheckpointWriter:
    """Writes one checkpoint at a time, then removes those that expired, then uploads. It is a
    context, which holds the lock of the output.

    output: the run's folder. limit: number of checkpoints that remain; 0: all. message: for the
    user, also called in the thread. mirror: where the run is copied to, if anywhere.

    What fails in the thread is raised by the next call of `save`, `check` or `wait`. A checkpoint
    that can't be uploaded is an error only at the end of the run; before, it is announced, and
    tried again with the next one.
    """

    def __init__(
        self,
        output: Path,
        limit: int,
        message: Callable[[str], None],
        mirror: Mirror | None = None,
    ) -> None:
        self._output, self._limit, self._message, self._mirror = output, limit, message, mirror
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._locks = ExitStack()

    def __enter__(self) -> CheckpointWriter:
        """Makes the folder, locks it and the URL, and removes what a killed run left there."""
        self._output.mkdir(parents=True, exist_ok=True)
        with ExitStack() as locks:
            locks.enter_context(RunLock(Store(str(self._output))))
            if self._mirror is not None:
                locks.enter_context(RunLock(self._mirror.store))
            remove_partial_folders(self._output)
            Store(str(self._output)).sweep(INDEX)
            self._locks = locks.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        """Waits for the thread. An error of it is announced: another one has ended the run."""
        self._join()
        if self._error is not None:
            self._message(f"the last checkpoint: {self._error}")
        remove_partial_folders(self._output)  # the copy of a checkpoint at a URL
        self._locks.close()

    def save(self, step: int, take_snapshot: Callable[[], Snapshot]) -> None:
        """Begins to write the checkpoint of `step`. Waits first for the one before, so that there
        is one snapshot at a time.
        """
        if self._thread is not None:
            self._thread.join(_SLOW)
            if self._thread.is_alive():
                self._message(
                    f"step {step:,} waits until the checkpoint before is written. To avoid that, "
                    "raise checkpointing_steps, or give an output on a faster disk."
                )
        self.wait()
        self._thread = threading.Thread(
            target=self._run, args=(take_snapshot(),), daemon=True, name="checkpoint"
        )
        self._thread.start()

    def check(self) -> None:
        """Raises the error of the thread, if there was one."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Waits until the checkpoint is written and uploaded."""
        self._join()
        self.check()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def write(self, snapshot: Snapshot) -> None:
        """Writes a checkpoint at once. Raises StoreError if it can't be written, TrainingError if
        its weights aren't finite.
        """

        def fill(folder: Path) -> None:
            # first, so that no checkpoint is on the disk without the lines up to its step
            for lines in self._output.glob("*.jsonl"):
                sync(lines)
            snapshot.write(folder)

        snapshot.check_finite()
        write_folder_atomically(self._output / checkpoint_name(snapshot.step), fill)
        steps = [step_of(path.name) or 0 for path in checkpoints(self._output)]
        for step in expired(steps, snapshot.step, self._limit):
            remove_checkpoint(self._output / checkpoint_name(step))
        if removed := remove_replaced(self._output):
            self._message(f"removed: {', '.join(removed)}")

    def finish(self, step: int, *, with_final: bool) -> None:
        """Uploads what isn't uploaded yet, at the end of a run at `step`; with_final: OUT/final
        too. Raises StoreError.
        """
        if self._mirror is None:
            return
        try:
            self._send(self._mirror, step)
            if with_final:
                self._mirror.send_final()
        except StoreError as error:
            raise StoreError(
                f"{self._output} has the checkpoint of step {step:,}, but it can't be uploaded: "
                f"{error} On this machine, that uploads what is missing."
            ) from error

    def _run(self, snapshot: Snapshot) -> None:
        try:
            self.write(snapshot)
            self.upload(snapshot.step)
        except Exception as error:  # noqa: BLE001 - raised in the main thread
            self._error = error

    def upload(self, step: int | None = None) -> None:
        """Uploads what isn't uploaded yet, and announces it if that fails. step: of the checkpoint
        that was just written; those that expired are removed.
        """
        if self._mirror is None:
            return
        try:
            self._send(self._mirror, step)
        except StoreError as error:
            self._message(
                f"{self._output} can't be uploaded now; the next checkpoint tries it again. {error}"
            )

    def _send(self, mirror: Mirror, step: int | None) -> None:
        if step is None:
            mirror.send()
            return
        mirror.set_aside(step)
        mirror.send()
        mirror.prune(step, self._limit)
