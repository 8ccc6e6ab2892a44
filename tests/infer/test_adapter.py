"""What an adapter keeps beside a pipeline."""

from __future__ import annotations

import hashlib
from pathlib import Path

from infer.components import file_digest
from infer.pipelines import ConsistentIDPipeline
from model.prompt import FACIAL_MARK


def test_the_digest_is_that_of_the_file_that_was_loaded(tmp_path: Path) -> None:
    (tmp_path / "adapter.safetensors").write_bytes(b"loaded" * 1_000_000)
    digest = file_digest(tmp_path)
    (tmp_path / "new").write_bytes(b"later")
    (tmp_path / "new").replace(tmp_path / "adapter.safetensors")
    assert digest.result() == hashlib.sha256(b"loaded" * 1_000_000).hexdigest()


def test_marks_are_added_to_a_copy_of_the_tokenizer(pipe: ConsistentIDPipeline) -> None:
    marked = pipe.adapter.marked(pipe.tokenizer)
    assert len(marked.encode(FACIAL_MARK)) == 3
    assert FACIAL_MARK not in pipe.tokenizer.get_vocab()
    assert marked._merges is pipe.tokenizer._merges, "copying it takes half a second"


def test_the_weights_of_the_file_are_not_held(pipe: ConsistentIDPipeline) -> None:
    assert pipe.adapter.file.spec.name == "tiny" and not pipe.adapter.file.state
