from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from model.consistentid import BaseModels, load_base
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
