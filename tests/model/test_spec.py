"""The variants, and the settings that name them."""

from typing import Any, get_args, get_type_hints

import pytest

from configs.errors import ConfigError
from configs.load import load
from configs.portraits import AdaptedModelConfig
from configs.quality import ReviewConfig
from configs.training import ModelConfig, TrainConfig
from model.spec import PARTS, SPECS, spec_named


@pytest.mark.parametrize("kind", [ModelConfig, AdaptedModelConfig, ReviewConfig])
def test_the_settings_name_all_variants(kind: type[Any]) -> None:
    assert [n for n in get_args(get_type_hints(kind)["spec"]) if n != "auto"] == [*SPECS]


def test_a_run_leaves_out_the_parts_that_its_settings_name() -> None:
    [part] = {each for each in get_args(get_type_hints(ModelConfig)["without"]) if each is not ...}
    assert get_args(part) == PARTS
    for setting in ("model.without=[lora,projector]", "model.without=[projector, lora, projector]"):
        config = load(TrainConfig, overrides=["model.spec=small", setting])
        spec = spec_named(config.model.spec, config.model.without)
        assert spec.without == ("projector", "lora") and spec.has("facial_encoder")
    assert spec_named("small", load(TrainConfig).model.without) == SPECS["small"]
    for names, fault in (
        ("lorra", "expected one of projector, facial_encoder, lora"),
        ("[projector,facial_encoder,lora]", "expected at most two"),
    ):
        with pytest.raises(ConfigError, match=rf"model\.without.*{fault}"):
            load(TrainConfig, overrides=[f"model.without={names}"])
