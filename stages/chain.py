"""build_stages: the five stages that data sets (pipelines/chain.py) and inference share."""

from __future__ import annotations

from configs.schema import DatasetConfig
from stages.backends.weights import Weights
from stages.base import Stage, check_chain
from stages.caption import CaptionStage
from stages.detect import DetectStage
from stages.embed import EmbedStage
from stages.parse import ParseStage
from stages.resize import ResizeStage


def build_stages(config: DatasetConfig) -> list[Stage]:
    """Returns resize, detect, parse, embed and caption, in this order; loads no weights yet.

    Raises ConfigError or WeightsError for a setting that isn't possible.
    """
    weights = Weights(config.weights)
    chain: list[Stage] = [
        ResizeStage(config.resize),
        DetectStage(config.detect, weights),
        ParseStage(config.parse, weights),
        EmbedStage(config.embed, weights),
        CaptionStage(config.caption, weights, config.resize.largest),
    ]
    check_chain(chain)
    return chain
