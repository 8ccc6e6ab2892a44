"""What the pipeline's tests share: a small configuration, and a data set's files by digest."""

from __future__ import annotations

import hashlib
import signal
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
NO_COPIES = ("global_pass.max_hash_distance=-1", "global_pass.max_similarity=0")


def config(source: Path | str, output: Path | str, *overrides: str) -> DatasetConfig:
    """The demo's configuration on one thread, four inputs a shard, inline by default."""
    given = [
        f"source.path={source}",
        f"output={output}",
        "shard_size=4",
        "threads=1",
        "executor=inline",
    ]
    return load(DatasetConfig, DEMO, [*given, *overrides])


def new_captions(patch: pytest.MonkeyPatch) -> None:
    """Gives the caption stage another version: its captions are stale, whatever the backend."""
    patch.setattr(CaptionStage, "version", CaptionStage.version + 1)


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


def hears_ctrl_c() -> None:
    """For Popen's preexec_fn: shells start what runs in the background, this test perhaps, deaf to
    SIGINT.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def count_model_calls(patch: pytest.MonkeyPatch) -> list[str]:
    """Gets an entry whenever a network runs, whoever calls it: detector and embedder on ONNX, the
    parser on torch. Stages that are set up from now on remember no answers.
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


def rows_of(output: Path) -> list[dict[str, Any]]:
    """Every row of the sidecars of a data set, in the order of its shards."""
    reader = DatasetReader(str(output))
    return [row for index in reader.manifests() for row in reader.rows(index).to_pylist()]
