"""build_stages: the five stages with a model behind them. Data sets (pipelines/chain.py) and
inference share them.
"""

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
    """The stages, in order; nothing is loaded yet. Raises ConfigError or WeightsError for a setting
    that can't be.
    """
    weights = Weights(config.weights)
    chain: list[Stage] = [
        ResizeStage(config.resize),
        DetectStage(config.detect, weights),
        ParseStage(config.parse, weights),
        EmbedStage(config.embed, weights),
        CaptionStage(config.caption, weights),
    ]
    check_chain(chain)
    return chain
