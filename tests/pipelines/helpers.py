"""Helpers for tests of the pipeline: a small configuration, and digests of a data set's files."""

from __future__ import annotations

import hashlib
import signal
import tarfile
from pathlib import Path
from typing import Any

import pytest

from configs.load import load
from configs.schema import DatasetConfig
from stages.caption import CaptionStage
from stages.quality_filter import RULES
from stages.storage.layout import DUPLICATES, IDENTITIES
from stages.storage.reader import DatasetReader

DEMO = "configs/dataset/demo.yaml"
NO_RULES = tuple(f"rules.{rule.setting}=0" for rule in RULES)
NO_DEDUPLICATION = ("global_pass.max_hash_distance=-1", "global_pass.max_similarity=0")


def config(source: Path | str, output: Path | str, *overrides: str) -> DatasetConfig:
    """Returns the demo's configuration, by default with one thread, four inputs a shard, inline."""
    defaults = [
        f"source.path={source}",
        f"output={output}",
        "shard_size=4",
        "threads=1",
        "executor=inline",
    ]
    return load(DatasetConfig, DEMO, [*defaults, *overrides])


def new_captions(patch: pytest.MonkeyPatch) -> None:
    """Gives the caption stage another version, so that all captions are stale."""
    patch.setattr(CaptionStage, "version", CaptionStage.version + 1)


def digests(output: Path) -> dict[str, str]:
    """Returns file name → sha256 of all that must not differ between equal runs: tars, sidecars,
    duplicates and identities.
    """
    files = [path for path in (output / "shards").iterdir() if path.suffix in (".tar", ".parquet")]
    files += [output / name for name in (DUPLICATES, IDENTITIES)]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def stamps(output: Path) -> dict[str, tuple[int, int]]:
    """Returns file name → (inode, mtime) of all files in the shards folder."""
    stats = {path.name: path.stat() for path in sorted((output / "shards").iterdir())}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def restore_sigint() -> None:
    """Restores the default action of SIGINT, for Popen's preexec_fn: shells ignore SIGINT in
    processes that they start in the background, such as this test.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def count_model_calls(patch: pytest.MonkeyPatch) -> list[str]:
    """Returns a list that gets an entry for each call of a network: "onnx" for detector and
    embedder, "torch" for the parser. Stages that are set up from now on don't cache results.
    """
    import onnxruntime
    import torch

    from tests import models

    models.forget(patch)
    ran: list[str] = []
    session, module = onnxruntime.InferenceSession.run, torch.nn.Module.__call__
    patch.setattr(
        onnxruntime.InferenceSession,
        "run",
        lambda *a, **k: (ran.append("onnx"), session(*a, **k))[1],
    )
    patch.setattr(
        torch.nn.Module, "__call__", lambda *a, **k: (ran.append("torch"), module(*a, **k))[1]
    )
    return ran


def zero_images(tar: Path) -> None:
    """Replaces the bytes of each image in a tar by zeros."""
    with tarfile.open(tar) as archive:
        images = [member for member in archive if member.name.endswith(".jpg")]
    with tar.open("r+b") as stream:
        for member in images:
            stream.seek(member.offset_data)
            stream.write(bytes(member.size))


def rows_of(output: Path) -> list[dict[str, Any]]:
    """Returns all sidecar rows of a data set, in the order of its shards."""
    reader = DatasetReader(str(output))
    return [row for index in reader.manifests() for row in reader.rows(index).to_pylist()]
