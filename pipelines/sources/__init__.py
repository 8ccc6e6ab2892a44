"""Sources: where the input images come from. `source.kind` selects one of the classes below."""

from __future__ import annotations

import importlib
from typing import Final

from configs.errors import SourceError
from configs.schema import DatasetConfig, SourceConfig
from pipelines.sources.base import STAGE, Input, Source, TransientFailure

__all__ = ["STAGE", "Input", "Source", "TransientFailure", "build_source"]

_CLASSES: Final = {
    "local": "pipelines.sources.files:LocalFiles",
    "remote": "pipelines.sources.files:RemoteFiles",
    "webdataset": "pipelines.sources.tars:WebDataset",
    "parquet": "pipelines.sources.tables:ParquetTable",
    "urls": "pipelines.sources.urls:UrlList",
    "fgid": "pipelines.sources.fgid:FgidLayout",
}
_KIND_BY_EXTENSION: Final = {
    ".tar": "webdataset",
    ".parquet": "parquet",
    ".csv": "urls",
    ".tsv": "urls",
    ".txt": "urls",
    ".json": "fgid",
}


def build_source(config: DatasetConfig) -> Source:
    """Returns the source that `config.source` names; lists and reads nothing yet.

    Raises SourceError if `source.path` is empty, or if `source.person_folder` is set for a source
    that isn't of files.
    """
    kind = _kind(config.source)
    if config.source.person_folder and kind not in ("local", "remote"):
        raise SourceError(
            f"source.person_folder=true, but source.path={config.source.path!r} is of kind {kind}: "
            "expected a folder or a pattern of image files. Elsewhere, `person` is a column or an "
            "entry of the JSON; leave source.person_folder out."
        )
    module, name = _CLASSES[kind].split(":")
    source: Source = getattr(importlib.import_module(module), name)(config)
    return source


def _kind(config: SourceConfig) -> str:
    """Returns the key of _CLASSES; `auto` decides by the extension of `source.path`."""
    if not config.path:
        raise SourceError("no source given. Say where the photographs are: source.path=FOLDER")
    is_url = "://" in config.path and not config.path.startswith(("file://", "local://"))
    files = "remote" if is_url else "local"
    if config.kind != "auto":
        return files if config.kind == "files" else config.kind
    path = config.path.lower()
    return next((kind for end, kind in _KIND_BY_EXTENSION.items() if path.endswith(end)), files)
