"""build_chain: the stages of a data set, in order.

Its models are those of stages.chain, which inference runs too. The other stages here check rights,
embed further faces, measure, filter, review and make thumbnails, which only training data needs.
"""

from __future__ import annotations

from collections.abc import Callable

from configs.schema import DatasetConfig
from pipelines.review import ReviewStage
from stages.backends.weights import Weights
from stages.base import Stage, check_chain
from stages.chain import build_stages
from stages.claims import ClaimsStage
from stages.measure import MeasureStage
from stages.other_faces import OtherFacesStage
from stages.quality_filter import QualityFilterStage
from stages.rights import RightsStage
from stages.thumbnail import ThumbnailStage

# A function at the top level of a module that builds a chain. Worker processes import it by name.
Chain = Callable[[DatasetConfig], list[Stage]]


def build_chain(config: DatasetConfig) -> list[Stage]:
    """Returns the stages in order, without loading models. Raises ConfigError or WeightsError for
    an impossible setting.

    Captions come after the quality filter, since they cost most: a dropped record is captioned only
    if changed rules restore it.
    """
    resize, detect, parse, embed, caption = build_stages(config)
    weights = Weights(config.weights)
    chain: list[Stage] = [
        RightsStage(config.rights),
        resize,
        ThumbnailStage(config.thumbnail),
        detect,
        parse,
        embed,
        OtherFacesStage(
            config.embed, weights
        ),  # before the filter: quarantined samples have it too
        MeasureStage(config.measure),
        QualityFilterStage(config.rules),
        caption,
        ClaimsStage(config.claims),
        ReviewStage(config.review, weights),
    ]
    check_chain(chain)
    return chain
