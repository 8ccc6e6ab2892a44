"""The errors that this project raises for its users.

    PipelineError
    ├── ConfigError    invalid configuration: unknown key, wrong type, impossible value
    ├── SourceError    a source that can't be listed or read at all
    ├── WeightsError   a weights file that is missing, unreachable, or has another sha256
    ├── ServerError    a model server that can't be reached or gives no usable response
    ├── LockedError    another run is writing to the same output
    ├── StoreError     an output that can't be read or written, after all attempts
    ├── ShardError     a shard or data set that doesn't match its manifest
    ├── QualityError   a data set that breaks the limits of its configuration
    ├── TrainingError  a training run that can't continue
    └── FaceError      a photograph without a usable face (inference)

Each message says what was given, what was expected, and what to do. Programming errors are not in
this tree: they propagate. A fault of one image is not an exception for the caller: it is recorded
as the record's `status` and `reason`. A lack of permission or of room is treated like a
PipelineError: `user_message`.
"""

from __future__ import annotations

import errno
from typing import Final

_CORRECTABLE: Final = frozenset(
    (
        *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR),
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    )
)


class PipelineError(Exception):
    """Base of all errors that a user can correct. The command line prints the message without a
    traceback and exits with 2.
    """


class ConfigError(PipelineError):
    """Invalid configuration: an unknown key, a value of the wrong type, an impossible value."""


class SourceError(PipelineError):
    """A source that can't be listed or read at all."""


class EmptySideError(SourceError):
    """A data set without samples on one side of its split."""


class WeightsError(PipelineError):
    """A weights file that is missing or unreachable, whose license is refused, or that has another
    sha256 than the table states.
    """


class ServerError(PipelineError):
    """A model server that can't be reached, refuses the key, doesn't have the model, or gives no
    usable response.
    """


class LockedError(PipelineError):
    """Another run is writing to the same output."""


class StoreError(PipelineError):
    """An output that can't be read or written, after all attempts."""


class ShardError(PipelineError):
    """A shard or data set that doesn't match its manifest."""


class QualityError(PipelineError):
    """A data set that breaks the limits of its configuration, so that it isn't fit for training."""


class TrainingError(PipelineError):
    """A training run that can't continue: too many samples can't be read, or the loss is not finite
    any more.
    """


class FaceError(PipelineError):
    """A reference photograph without a usable face."""


def user_message(error: PipelineError | OSError) -> str | None:
    """Returns what a command line prints of an error that the user can correct, without a
    traceback. None for an error of the file system that is neither a lack of permission nor of
    room.
    """
    if isinstance(error, PipelineError):
        return str(error)
    if error.errno not in _CORRECTABLE:
        return None
    return (
        f"{error.filename or 'a file'} can't be read or written: {error.strerror}. Correct its "
        "permissions, free disk space, or give another folder; then run the same command again."
    )
