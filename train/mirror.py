"""The copy of a run on an object store.

A run whose `output` is a URL works in a local folder and copies it: first all other files, in the
order in which they were written, then each checkpoint, its files.json last. A checkpoint without
files.json doesn't exist, so a reader sees whole ones only. A run on another machine, whose folder
is empty, fetches the newest intact checkpoint, and what it needs besides. Replay and seen, which
only read, fetch into a temporary folder (`reading`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Final

from configs.errors import PipelineError
from configs.training import TrainConfig
from model.checkpoint import CONFIG_FILE
from stages.backends.weights import default_cache
from stages.storage.layout import LOCK
from stages.storage.store import Store
from train.checkpoints import (
    FILES,
    REPLACED,
    checkpoint_name,
    checkpoints,
    damage,
    expired,
    file_list,
    remove_checkpoint,
    remove_partial_folders,
    step_of,
    write_folder_atomically,
)
from train.history import SHEETS
from train.shards import INDEX

_FINAL: Final = "final"
_LINES: Final = ".jsonl"
_LISTS: Final = (FILES, CONFIG_FILE)
# in a local checkpoint: the store has it. Not in its files.json.
_SENT: Final = ".sent"


class _Damaged(Exception):  # noqa: N818 - it is caught here
    """A copy on the store is incomplete or not as it was written; the text says how."""


class Mirror:
    """The copy of `folder` at a URL. Methods raise StoreError if the store fails after all
    attempts, or if the folder can't be written.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.store, self.folder = Store(url), folder
        self._sent: dict[str, tuple[int, int]] = {}  # file → size and time of change

    def send(self) -> None:
        """Uploads what has changed since the last call, checkpoints last; not OUT/final."""
        present = self.store.tree(INDEX) if not self._sent else {}
        for path in sorted(self._files(), key=lambda path: (path.stat().st_mtime_ns, path)):
            name, status = path.relative_to(self.folder).as_posix(), path.stat()
            version = (status.st_size, status.st_mtime_ns)
            # a file of the index is named by its digest
            if present.get(name.removeprefix(f"{INDEX}/")) == status.st_size:
                self._sent[name] = version
            if self._sent.get(name) != version:
                self.store.upload(path, name)
                self._sent[name] = version
        for folder in checkpoints(self.folder):
            if not (folder / _SENT).exists():
                self._send_folder(folder, FILES)
                (folder / _SENT).touch()

    def send_final(self) -> None:
        """Uploads OUT/final, its adapter.json last."""
        self._send_folder(self.folder / _FINAL, CONFIG_FILE)

    def set_aside(self, step: int) -> None:
        """Makes the store's checkpoints of later steps incomplete, since the files of lines that
        are sent next don't have these steps.
        """
        for later in self.complete_steps():
            if later > step:
                self.store.remove(f"{checkpoint_name(later)}/{FILES}")

    def prune(self, newest: int, limit: int) -> None:
        """Removes checkpoints as `train.checkpoints.expired` says, and parts of uploads."""
        complete = self.complete_steps()
        unfinished = self._steps() - complete
        for step in (*expired(complete, newest, limit), *sorted(unfinished)):
            name = checkpoint_name(step)
            self.store.remove(f"{name}/{FILES}")
            for file in self.store.tree(name):
                self.store.remove(f"{name}/{file}")

    def fetch_newest(self, message: Callable[[str], None]) -> None:
        """Makes the newest intact checkpoint of the store a local one, unless the folder has a
        later one that wasn't uploaded. Uploaded ones of later steps, which the store doesn't have
        any more, are removed from the folder: the run was continued elsewhere from an earlier one.

        Calls `fetch_folders` too. message: called with a line for each damaged checkpoint.
        """
        unsent = [path for path in checkpoints(self.folder) if not (path / _SENT).exists()]
        later = max((_step(path) for path in unsent if not damage(path)), default=0)
        for step in sorted(self._steps(), reverse=True):
            if step <= later:
                break
            if not (how := self.fetch(step)):
                for path in checkpoints(self.folder):
                    if _step(path) > step and (path / _SENT).exists():
                        remove_checkpoint(path)
                break
            message(f"{self.store.url}/{checkpoint_name(step)} is passed over: {how}")
        self.fetch_folders()

    def remove_others(self, chosen: Path | None) -> None:
        """Removes the local checkpoints that the store has, except for the chosen one, and what is
        left of downloads that were killed.
        """
        for path in checkpoints(self.folder):
            if path != chosen and (path / _SENT).exists():
                remove_checkpoint(path)
        remove_partial_folders(self.folder)

    def fetch(self, step: int) -> str:
        """Makes the local copy of a checkpoint equal to the store's. Before one is downloaded, the
        files of lines are, so that it never lacks them. Returns how the store's copy is damaged, ""
        if it is intact.
        """
        name = checkpoint_name(step)
        target = self.folder / name
        try:
            listing = self.store.read(f"{name}/{FILES}")
        except FileNotFoundError:
            return f"it has no {FILES}, so it isn't complete"
        if (files := file_list(listing, f"{self.store.url}/{name}")) is None:
            return f"{FILES} can't be read"
        if not damage(target) and (target / FILES).read_bytes() == listing:
            (target / _SENT).touch()
            return ""
        self.fetch_lines()

        def fill(copy: Path) -> None:
            self._download(name, files, copy)
            (copy / FILES).write_bytes(listing)
            (copy / _SENT).touch()
            if how := damage(copy):
                raise _Damaged(how)

        try:
            write_folder_atomically(target, fill)
        except _Damaged as fault:
            return str(fault)
        return ""

    def fetch_lines(self) -> None:
        """Makes the local files of lines equal to the store's."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in self.store.names(""):
            if file.endswith(_LINES):
                self.store.download(file, self.folder / file)

    def fetch_lists(self) -> None:
        """Fetches what tells which checkpoints the store has, and of which data. Here they count as
        damaged, without the rest of their files.
        """
        steps = sorted(self.complete_steps())
        names = [f"{checkpoint_name(step)}/{file}" for step in steps for file in _LISTS]
        for name, content in self.store.read_all(names).items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(content)

    def damage(self, step: int) -> str:
        """Returns how the store's copy of a checkpoint is damaged, as far as the sizes of its files
        tell; "" if it seems intact. Raises WeightsError for another format.
        """
        name = checkpoint_name(step)
        listing = self.store.read_all([f"{name}/{FILES}"]).get(f"{name}/{FILES}", b"")
        if (files := file_list(listing, f"{self.store.url}/{name}")) is None:
            return f"{FILES} is missing or can't be read"
        sizes = self.store.tree(name)
        wrong = [file for file, (size, _) in files.items() if sizes.get(file) != size]
        return f"{wrong[0]} is missing or is not as it was written" if wrong else ""

    def fetch_folders(self) -> None:
        """Fetches the tiny base model, the indexes of the data and the pictures of validations that
        the folder lacks.
        """
        base = self.folder / "base"
        if not base.exists() and (files := self.store.tree(base.name)):
            write_folder_atomically(base, partial(self._download, base.name, list(files)))
        self.fetch_indexes()
        self._fetch_missing(SHEETS)

    def fetch_indexes(self) -> None:
        """Fetches the indexes of the data that the folder lacks."""
        self._fetch_missing(INDEX)

    def _fetch_missing(self, top: str) -> None:
        """Fetches the files of the store's folder `top` that the local one lacks."""
        for name in self.store.names(top):
            if not (target := self.folder / top / name).exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                self.store.download(f"{top}/{name}", target)

    def _files(self) -> Iterator[Path]:
        """Yields the local files outside checkpoints and OUT/final, without temporary ones."""
        for path in self.folder.rglob("*"):
            parts = path.relative_to(self.folder).parts
            hidden = any(part.startswith(".") for part in parts) or parts[0].startswith(REPLACED)
            if hidden or parts[0] in (_FINAL, LOCK) or step_of(parts[0]) is not None:
                continue
            if path.is_file():
                yield path

    def _steps(self) -> set[int]:
        """Returns the steps of the store's checkpoints, complete or not."""
        steps = (step_of(name.partition("/")[0]) for name in self.store.tree())
        return {step for step in steps if step is not None}

    def complete_steps(self) -> set[int]:
        """Returns the steps of the store's complete checkpoints."""
        names = self.store.tree()
        return {step for step in self._steps() if f"{checkpoint_name(step)}/{FILES}" in names}

    def _send_folder(self, folder: Path, last: str) -> None:
        """Uploads a folder, the file `last` at the end. One that the store has is replaced."""
        name = folder.name
        files = {
            path.relative_to(folder).as_posix(): path
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != _SENT
        }
        present = self.store.tree(name)
        if last in present:
            self.store.remove(f"{name}/{last}")
        for file in present:
            if file not in files:
                self.store.remove(f"{name}/{file}")
        for file, path in files.items():
            if file != last:
                self.store.upload(path, f"{name}/{file}")
        self.store.upload(files[last], f"{name}/{last}")

    def _download(self, top: str, names: Iterable[str], target: Path) -> None:
        """Downloads files from the store's folder `top` into `target`. Raises _Damaged if one is
        missing, or would lie outside.
        """
        for name in names:
            try:
                self.store.path(f"{top}/{name}")
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                self.store.download(f"{top}/{name}", target / name)
            except FileNotFoundError:
                raise _Damaged(f"{name} is missing") from None
            except ValueError as error:  # the name leads out of the folder
                raise _Damaged(str(error)) from None


def _step(folder: Path) -> int:
    return step_of(folder.name) or 0


def open_output(config: TrainConfig) -> tuple[Path, Mirror | None]:
    """Returns the folder that a run works in and, if its output is on an object store, the mirror.

    Raises ConfigError for a URL that can't be opened.
    """
    if "://" not in config.output:
        return Path(config.output), None
    store = Store(config.output)
    if store.local:
        return Path(store.root), None
    url = config.output.rstrip("/")
    name = f"{url.rsplit('/', 1)[-1]}-{sha256(url.encode()).hexdigest()[:12]}"
    folder = Path(config.work_folder or default_cache("train") / name)
    return folder, Mirror(url, folder)


class Runs:
    """Outputs of runs that are only read. A folder is used as it is. Of a URL, there is a copy in
    the folder `scratch`; neither the URL nor the work folder of its run is changed.

    Methods raise ConfigError for a URL that can't be opened.
    """

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._mirrors: dict[str, Mirror] = {}  # by URL

    def open(self, output: str) -> Path:
        """Returns the local folder of an output, without the weights of a URL's checkpoints."""
        folder = self.with_checkpoints(output)
        if (mirror := self._mirror_of(folder)) is not None:
            mirror.fetch_lines()
            mirror.fetch_folders()
        return folder

    def with_checkpoints(self, output: str) -> Path:
        """Returns the local folder of an output, which of a URL has the checkpoints' lists only."""
        if "://" not in output:
            return Path(output)
        url = output.rstrip("/")
        if url not in self._mirrors:
            mirror = Mirror(url, Path(tempfile.mkdtemp(dir=self._scratch)))
            self._mirrors[url] = mirror
            mirror.fetch_lists()
        return self._mirrors[url].folder

    def damage(self, checkpoint: Path) -> str:
        """Returns how a checkpoint is damaged, "" if it isn't. Of one at a URL, only the sizes of
        files are compared. Raises WeightsError for another format.
        """
        mirror = self._mirror_of(checkpoint.parent)
        return damage(checkpoint) if mirror is None else mirror.damage(_step(checkpoint))

    def fetch(self, checkpoint: Path) -> str:
        """Downloads a checkpoint if it is at a URL, and returns how it is damaged."""
        mirror = self._mirror_of(checkpoint.parent)
        return damage(checkpoint) if mirror is None else mirror.fetch(_step(checkpoint))

    def named(self, text: str) -> str:
        """Returns a text with the URLs instead of the local folders of their copies."""
        for url, mirror in self._mirrors.items():
            text = text.replace(str(mirror.folder), url)
        return text

    def _mirror_of(self, folder: Path) -> Mirror | None:
        return next((each for each in self._mirrors.values() if each.folder == folder), None)


@contextmanager
def reading() -> Iterator[Runs]:
    """Yields an object that opens outputs, and removes the copies at the end. Errors that are
    raised meanwhile name the URLs.
    """
    with tempfile.TemporaryDirectory(prefix="run-") as scratch:
        runs = Runs(Path(scratch))
        try:
            yield runs
        except PipelineError as error:
            error.args = (runs.named(str(error)),)
            raise
