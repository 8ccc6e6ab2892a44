"""build_stages: the readable list. The data set pipeline and inference both run exactly this."""

from __future__ import annotations

from collections.abc import Callable

from configs.schema import DatasetConfig
from stages.backends.weights import Weights
from stages.base import Stage, check_chain
from stages.caption import CaptionStage
from stages.detect import DetectStage
from stages.embed import EmbedStage
from stages.parse import ParseStage
from stages.resize import ResizeStage

Chain = Callable[[DatasetConfig], list[Stage]]
"""A module's function that builds a chain: executors hand it to their processes, which import it by its name."""


def build_stages(config: DatasetConfig) -> list[Stage]:
    """The chain, in order; nothing is loaded yet. Raises ConfigError or WeightsError for a setting that can't be."""
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
