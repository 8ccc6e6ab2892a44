"""Fixtures: adapters over the tiny base, a pipeline with one of them, and two people."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps

from infer.identity import Identity
from infer.load import load_pipeline
from infer.pipelines import ConsistentIDPipeline
from tests.infer.helpers import TINY_XL, make_tiny_xl, small, write_adapter
from tests.sharing import shared_folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """OUT of a training run, with the base that it made."""
    output = tmp_path_factory.mktemp("trained")
    (output / "base").symlink_to(tiny_base)
    return output


@pytest.fixture(scope="session")
def adapter(trained: Path) -> Path:
    return write_adapter(trained / "base", trained / "final", "corrected")


@pytest.fixture(scope="session")
def legacy_adapter(trained: Path) -> Path:
    return write_adapter(trained / "base", trained / "legacy", "legacy")


@pytest.fixture(scope="session")
def tiny_xl(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A tiny SDXL base in diffusers' layout."""
    return shared_folder(tmp_path_factory, "xl", lambda folder: make_tiny_xl(folder, tiny_base))


@pytest.fixture(scope="session")
def xl_adapter(tmp_path_factory: pytest.TempPathFactory, tiny_xl: Path) -> Path:
    return write_adapter(tiny_xl, tmp_path_factory.mktemp("xl") / "final", "corrected", TINY_XL)


@pytest.fixture(scope="session")
def xl_legacy_adapter(tmp_path_factory: pytest.TempPathFactory, tiny_xl: Path) -> Path:
    return write_adapter(tiny_xl, tmp_path_factory.mktemp("xl") / "legacy", "legacy", TINY_XL)


@pytest.fixture(scope="session")
def pipe(adapter: Path) -> ConsistentIDPipeline:
    """A pipeline that tests share. They may set its scheduler and scales, which `generate` sets
    anew, and must leave its models as they are.
    """
    return load_pipeline(small(adapter))


@pytest.fixture(scope="session")
def photo(portraits: Path) -> Path:
    return sorted(portraits.glob("*.jpg"))[0]


@pytest.fixture(scope="session")
def distant(photo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photograph with a wide border, without which legacy mode's detector misses the face."""
    path = tmp_path_factory.mktemp("distant") / "distant.png"
    with Image.open(photo) as image:
        ImageOps.expand(image.convert("RGB"), image.width // 2, "gray").save(path)
    return path


@pytest.fixture(scope="session")
def person(pipe: ConsistentIDPipeline, photo: Path) -> Identity:
    return pipe.encode_identity(photo)


@pytest.fixture(scope="session")
def stranger(pipe: ConsistentIDPipeline, portraits: Path) -> Identity:
    return pipe.encode_identity(sorted(portraits.glob("*.jpg"))[1])


@pytest.fixture(scope="session")
def loaded(trained: Path) -> ConsistentIDPipeline:
    return ConsistentIDPipeline.from_pretrained(trained / "base")


@pytest.fixture
def bare(loaded: ConsistentIDPipeline) -> ConsistentIDPipeline:
    """A pipeline without adapter that the test may change."""
    parts = {
        name: copy.deepcopy(part) if isinstance(part, torch.nn.Module) else part
        for name, part in loaded.components.items()
    }
    pipe = ConsistentIDPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def own(bare: ConsistentIDPipeline, adapter: Path) -> ConsistentIDPipeline:
    """A pipeline with an adapter that the test may change."""
    bare.load_consistentid_adapter(adapter)
    return bare
