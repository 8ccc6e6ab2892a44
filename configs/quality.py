"""Settings of rights, thumbnails, quality rules, the global pass and the review of captions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from configs.common import NOT_HASHED, PlacementConfig, check


@dataclass(frozen=True, slots=True, kw_only=True)
class RightsConfig:
    """Which licenses and consents are allowed. Other inputs are dropped, and nothing of their
    images is stored.
    """

    # Patterns, for example [CC0*, CC-BY-*]; * and ? are wildcards, case is ignored. Empty: all are
    # allowed, also if none is stated.
    license_allow: tuple[str, ...] = ()
    consent_allow: tuple[str, ...] = ()  # the same for the consent that the source states
    placement: PlacementConfig = field(default_factory=PlacementConfig, metadata=NOT_HASHED)


@dataclass(frozen=True, slots=True, kw_only=True)
class ThumbnailConfig:
    """Thumbnails for the report, 96 pixels on the long side; dropped records have them too."""

    quality: int = 55  # WebP quality, 1 to 100
    placement: PlacementConfig = field(default_factory=PlacementConfig, metadata=NOT_HASHED)

    def __post_init__(self) -> None:
        check(1 <= self.quality <= 100, f"thumbnail.quality={self.quality}: expected 1 to 100")


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureConfig:
    """The measure stage. The limits of its metrics are in RulesConfig."""

    placement: PlacementConfig = field(default_factory=PlacementConfig, metadata=NOT_HASHED)


@dataclass(frozen=True, slots=True, kw_only=True)
class RulesConfig:
    """Limits on the recorded metrics of a sample; 0 switches a rule off.

    A changed limit needs no model call, since the metrics are recorded. The defaults accept 999 of
    1,000 synthetic portraits (the other one has a second face). They were tested on few
    photographs: `python -m bench.quality FOLDER` shows the metrics of yours.
    """

    min_side: int = 256  # short side of the source image, pixels
    # counts only faces with at least a third of the main face's side: smaller ones are background
    max_faces: int = 1
    min_faces: int = 1
    min_face: float = 64.0  # short side of the main face's box, pixels of the resized image
    min_score: float = 0.5  # detection score of the main face, 0 to 1
    # 0 to 1; sharp portraits: 0.25 to 0.47, blurred by 2 % of the face's width: 0.11 to 0.18
    min_sharpness: float = 0.22
    # mean luma of the skin, 0 to 1; the darkest well-lit skin has 0.145
    min_brightness: float = 0.12
    max_brightness: float = 0.92
    max_clipped: float = 0.25  # share of the face's pixels that are black or white, 0 to 1
    max_yaw: float = 60.0  # degrees in either direction, up to 180
    max_pitch: float = 40.0
    max_roll: float = 35.0
    # share of the face, 0 to 1; portraits: up to 0.03, mouth or eyes covered: 0.25 or more
    max_occlusion: float = 0.2
    # norm of ArcFace's raw embedding; w600k_mbf: 16 to 26 for faces, 6 to 13 for other images
    min_identity_norm: float = 12.0
    placement: PlacementConfig = field(default_factory=PlacementConfig, metadata=NOT_HASHED)

    def __post_init__(self) -> None:
        for name in ("min_side", "max_faces", "min_faces", "min_face", "min_identity_norm"):
            value = getattr(self, name)
            check(value >= 0, f"rules.{name}={value}: expected at least 0")
        shares = (
            "min_score",
            "min_sharpness",
            "min_brightness",
            "max_brightness",
            "max_clipped",
            "max_occlusion",
        )
        limits = dict.fromkeys(shares, 1) | dict.fromkeys(("max_yaw", "max_pitch", "max_roll"), 180)
        for name, most in limits.items():
            value = getattr(self, name)
            check(0 <= value <= most, f"rules.{name}={value}: expected 0 to {most}")
        for low, high in (("min_faces", "max_faces"), ("min_brightness", "max_brightness")):
            least, greatest = getattr(self, low), getattr(self, high)
            fits = not greatest or least <= greatest
            check(
                fits,
                f"rules.{low}={least} is over rules.{high}={greatest}: every sample would be "
                "dropped",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimsConfig:
    """The comparison of captions with label maps and measures; see docs/captions.md."""

    # least share of the claims of a sample's captions that nothing contradicts, 0 to 1; 1: none may
    # be contradicted. A rule like those of RulesConfig, off by default, of a stage after the
    # captions
    min_agreement: float = 0.0
    placement: PlacementConfig = field(default_factory=PlacementConfig, metadata=NOT_HASHED)

    def __post_init__(self) -> None:
        check(
            0 <= self.min_agreement <= 1,
            f"claims.min_agreement={self.min_agreement}: expected 0 to 1",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalPassConfig:
    """The global pass: duplicates across shards, identities, and the train/val split."""

    # near_duplicate: two perceptual hashes may differ in this many of 256 bits; -1: off. Measured
    # (docs/benchmarks.md): re-encoded or scaled versions of an image differ in at most 6 bits,
    # images of different people in at least 46; among half a million different images, 0.1 pairs
    # are expected within 10 bits. Cropped versions are found by the face instead.
    max_hash_distance: int = 10
    # face_duplicate: two images with at least this cosine of their embeddings count as one; 0: off
    max_similarity: float = 0.95
    # Two groups of samples with at least this mean cosine become one identity. The default was
    # measured on the hardest case: the demo's embedder on synthetic portraits of different people,
    # where one pair in a thousand has a cosine of 0.57. Of 300 people, 0.5 merges 132 with others,
    # 0.6 merges 25. With a better embedder on photographs, different people have cosines near 0;
    # then 0.6 divides people into several identities, and 0.35 merges no two people (simulated).
    # Lower it for an embedder that you have measured.
    identity_similarity: float = 0.6
    # The same for split groups: identities that may be one person stay on one side of the split.
    # With identities that 0.6 had divided, a value of 0.35 left half a per cent of the val samples
    # with images of the same person in train; 0.45 left half of them (simulated).
    split_similarity: float = 0.35
    # nearest neighbours of each sample; twice as many changed the result by half a per cent
    nearest: int = 16
    val_share: float = 0.02  # share of the split groups on the val side, 0 to 1
    seed: int = 0  # of the split

    def __post_init__(self) -> None:
        check(
            -1 <= self.max_hash_distance <= 128,
            f"global_pass.max_hash_distance={self.max_hash_distance}: "
            "expected -1 (off) to 128 bits",
        )
        for name in ("max_similarity", "val_share"):
            check(
                0 <= getattr(self, name) <= 1,
                f"global_pass.{name}={getattr(self, name)}: expected 0 to 1",
            )
        check(
            0 < self.split_similarity <= self.identity_similarity < 1,
            f"global_pass.split_similarity={self.split_similarity}, "
            f"global_pass.identity_similarity={self.identity_similarity}: "
            "expected over 0, under 1, and split_similarity not over identity_similarity",
        )
        check(5 <= self.nearest <= 256, f"global_pass.nearest={self.nearest}: expected 5 to 256")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReviewConfig:
    """The review of captions. `spec` and `mode` must be those that the trainer will use."""

    spec: Literal["tiny", "small", "sd15", "sdxl"] = "sd15"
    mode: Literal["corrected", "legacy"] = "corrected"
    # a run fails if more than this share of its records is not trainable, 0 to 1: without caption,
    # since the captioner failed, or without a fused region
    max_untrainable: float = field(default=0.5, metadata=NOT_HASHED)
    placement: PlacementConfig = field(default_factory=PlacementConfig, metadata=NOT_HASHED)

    def __post_init__(self) -> None:
        check(
            0 <= self.max_untrainable <= 1,
            f"review.max_untrainable={self.max_untrainable}: expected 0 to 1",
        )
