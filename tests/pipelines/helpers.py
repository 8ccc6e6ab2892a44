"""What the pipeline's tests share: a small configuration, and a data set's files by digest."""

from __future__ import annotations

import hashlib
import signal
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

from configs.load import load
from configs.schema import DatasetConfig
from stages.quality_filter import RULES
from stages.storage.commit import read_manifests, read_sidecar
from stages.storage.exclusions import DUPLICATES, IDENTITIES
from stages.storage.store import Store
from tests import models

DEMO = "configs/dataset/demo.yaml"
NO_RULES = tuple(f"rules.{rule.setting}=0" for rule in RULES)
NO_COPIES = ("neighbours.max_hash_distance=-1", "neighbours.max_similarity=0")


def config(source: Path | str, output: Path | str, *overrides: str) -> DatasetConfig:
    """The demo's configuration on one thread, four pictures a shard, inline unless said otherwise."""
    given = [
        f"source.path={source}",
        f"output={output}",
        "shard_size=4",
        "threads=1",
        "executor=inline",
    ]
    return load(DatasetConfig, DEMO, [*given, *overrides])


def digests(output: Path) -> dict[str, str]:
    """name → sha256 of every tar and sidecar, of copies and identities: all that must not differ
    between two runs.
    """
    files = [path for path in (output / "shards").iterdir() if path.suffix in (".tar", ".parquet")]
    files += [output / name for name in (DUPLICATES, IDENTITIES)]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def stamps(output: Path) -> dict[str, tuple[int, int]]:
    """name → (inode, mtime) of every file in the shards folder."""
    found = {path.name: path.stat() for path in sorted((output / "shards").iterdir())}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}


def rows_of(output: Path) -> list[dict[str, Any]]:
    """Every sidecar's rows, in order."""
    store = Store(str(output))
    return [
        row for index in read_manifests(store) for row in read_sidecar(store, index).to_pylist()
    ]


def count_models(patch: pytest.MonkeyPatch) -> list[str]:
    """Gets an entry whenever a network runs, whoever calls it: detector and embedder on ONNX, the
    parser on torch. Stages that are set up from now on remember no answers.
    """
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


def hears_ctrl_c() -> None:
    """For Popen's preexec_fn: shells start what runs in the background, this test perhaps, deaf to
    SIGINT.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
