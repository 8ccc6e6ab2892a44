"""build_stages: the readable list. The data set pipeline and inference both run exactly this."""

from __future__ import annotations

from configs.errors import ConfigError
from configs.schema import DatasetConfig
from stages.backends.weights import Weights
from stages.base import Stage, check_chain
from stages.caption import CaptionStage
from stages.detect import DetectStage
from stages.embed import EmbedStage
from stages.parse import ParseStage
from stages.resize import ResizeStage


def build_stages(config: DatasetConfig) -> list[Stage]:
    """The stages named by `config.stages`, in that order; nothing is loaded yet.

    Raises ConfigError for an unknown stage, or one whose `requires` nothing before it provides.
    """
    weights = Weights(config.weights)
    known: dict[str, Stage] = {
        "resize": ResizeStage(config.resize),
        "detect": DetectStage(config.detect, weights),
        "parse": ParseStage(config.parse, weights),
        "embed": EmbedStage(config.embed, weights),
        "caption": CaptionStage(config.caption, weights),
    }
    unknown = [name for name in config.stages if name not in known]
    if unknown:
        raise ConfigError(f"stages: {', '.join(unknown)} unknown. Known: {', '.join(known)}.")
    chain = [known[name] for name in config.stages]
    check_chain(chain)
    return chain
