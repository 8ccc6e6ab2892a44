"""build_chain: the readable list of what makes a data set.

Its models are those of stages.chain, which inference runs too. What stands round them here
measures, judges and shows pictures that are meant for training, and is of no use to a single
photograph.
"""

from __future__ import annotations

from collections.abc import Callable

from configs.schema import DatasetConfig
from pipelines.review import ReviewStage
from stages.backends.weights import Weights
from stages.base import Stage, check_chain
from stages.chain import build_stages
from stages.measure import MeasureStage
from stages.quality_filter import QualityFilterStage
from stages.rights import RightsStage
from stages.thumbnail import ThumbnailStage

Chain = Callable[[DatasetConfig], list[Stage]]
"""A function at the top of a module that builds a chain. Worker processes import it by its name."""


def build_chain(config: DatasetConfig) -> list[Stage]:
    """The chain, in order; nothing is loaded yet. Raises ConfigError or WeightsError for a setting
    that can't be.

    Captions come last, since they cost most: what a rule drops is never captioned, unless another
    rule takes it back.
    """
    resize, detect, parse, embed, caption = build_stages(config)
    chain: list[Stage] = [
        RightsStage(config.rights),
        resize,
        ThumbnailStage(config.thumbnail),
        detect,
        parse,
        embed,
        MeasureStage(config.measure),
        QualityFilterStage(config.rules),
        caption,
        ReviewStage(config.review, Weights(config.weights)),
    ]
    check_chain(chain)
    return chain
