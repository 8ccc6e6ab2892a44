"""The errors this project raises for its users.

    PipelineError
    ├── ConfigError    a configuration that can't be: unknown key, wrong type, impossible value
    ├── SourceError    inputs that can't be listed or read at all
    ├── WeightsError   a weights file that is missing, unreachable or not the one it claims to be
    ├── ServerError    a model's server that can't be reached, refuses, or answers nothing of use
    ├── LockedError    another run is writing to the same output
    ├── StoreError     an output that can't be read or written, however often it was tried
    ├── ShardError     a shard or data set that contradicts its own manifest
    ├── QualityError   a data set that isn't fit for what it is made for
    └── FaceError      a reference photograph without a usable face (inference)

Each message says what was given, what was expected, and what to do. Programming errors are not in
this tree: they propagate. A fault of one picture is no exception to the caller either: it is a
record's `status` and `reason`.
"""


class PipelineError(Exception):
    """Base of every error a user can mend; the command line prints its message without a traceback
    and exits 2.
    """


class ConfigError(PipelineError):
    """A configuration that can't be."""


class SourceError(PipelineError):
    """Inputs that can't be listed or read at all."""


class WeightsError(PipelineError):
    """A weights file that is missing, unreachable, refused by licence, or not the one it claims to
    be.
    """


class ServerError(PipelineError):
    """A model's server that can't be reached, refuses the key, doesn't know the model, or answers
    nothing of use.
    """


class LockedError(PipelineError):
    """Another run is writing to the same output."""


class StoreError(PipelineError):
    """An output that can't be read or written, however often it was tried."""


class ShardError(PipelineError):
    """A shard or data set that contradicts its own manifest."""


class QualityError(PipelineError):
    """A data set that isn't fit for what it is made for, by the limits of its configuration."""


class FaceError(PipelineError):
    """A reference photograph without a usable face."""
