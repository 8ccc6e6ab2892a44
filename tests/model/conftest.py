import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint import save_adapter
from model.consistentid import BaseModels, ConsistentID, load_base
from model.prompt import add_marks
from model.spec import SPECS
from model.vocabulary import clip_tokenizer
from stages.backends.weights import Weights


@pytest.fixture(scope="session")
def vocab() -> Path:
    return Weights().fetch("clip_bpe")


@pytest.fixture(scope="session")
def tokenizer(vocab: Path) -> Any:
    return add_marks(clip_tokenizer(vocab))


@pytest.fixture(scope="session")
def loaded_base(tiny_base: Path) -> BaseModels:
    return load_base(SPECS["tiny"], tiny_base)


@pytest.fixture
def base(loaded_base: BaseModels) -> BaseModels:
    """The tiny base, which the test may train. Its tokenizer is shared."""
    tokenizer = loaded_base.tokenizer
    return deepcopy(loaded_base, {id(tokenizer): tokenizer})


@pytest.fixture(scope="session")
def saved_adapter(loaded_base: BaseModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corrected adapter of initial weights, which no test changes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = ConsistentID(SPECS["tiny"], deepcopy(loaded_base.unet), "corrected")
    embedder = {"name": "w600k_mbf", "sha256": "9c" * 32}
    return save_adapter(model, tmp_path_factory.mktemp("adapter"), {"embedder": embedder})


@pytest.fixture
def folder(saved_adapter: Path, tmp_path: Path) -> Path:
    """A copy of that adapter, which the test may damage."""
    return Path(shutil.copytree(saved_adapter, tmp_path / "mine"))
