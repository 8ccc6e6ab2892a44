"""Sources: what goes in. `source.kind` names one of these; `auto` tells by the path's ending."""

from __future__ import annotations

import importlib
from typing import Final

from configs.errors import SourceError
from configs.schema import DatasetConfig, SourceConfig
from pipelines.sources.base import STAGE, Input, Source, Transient

__all__ = ["STAGE", "Input", "Source", "Transient", "build_source"]

_KINDS: Final = {
    "local": "pipelines.sources.files:LocalFiles",
    "remote": "pipelines.sources.files:RemoteFiles",
    "webdataset": "pipelines.sources.tars:WebDataset",
    "parquet": "pipelines.sources.tables:ParquetTable",
    "urls": "pipelines.sources.urls:UrlList",
    "fgid": "pipelines.sources.fgid:FgidLayout",
}
_ENDINGS: Final = {
    ".tar": "webdataset",
    ".parquet": "parquet",
    ".csv": "urls",
    ".tsv": "urls",
    ".txt": "urls",
    ".json": "fgid",
}


def build_source(config: DatasetConfig) -> Source:
    """The configured source; nothing is listed yet. Raises SourceError if none is given."""
    module, name = _KINDS[_kind(config.source)].split(":")
    source: Source = getattr(importlib.import_module(module), name)(config)
    return source


def _kind(config: SourceConfig) -> str:
    if not config.path:
        raise SourceError("no source given. Say where the photographs are: source.path=FOLDER")
    remote = "://" in config.path and not config.path.startswith(("file://", "local://"))
    files = "remote" if remote else "local"
    if config.kind != "auto":
        return files if config.kind == "files" else config.kind
    return next(
        (kind for ending, kind in _ENDINGS.items() if config.path.lower().endswith(ending)), files
    )
