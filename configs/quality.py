"""Settings of what is measured and decided about samples: rights, quality rules, the global pass,
review of captions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from configs.common import NO_ANSWER, PlacementConfig, check


@dataclass(frozen=True, slots=True, kw_only=True)
class RightsConfig:
    """Pictures of another licence or consent are dropped, and nothing of them is kept."""

    # e.g. [CC0*, CC-BY-*]: * and ? stand for anything, case doesn't count
    license_allow: tuple[str, ...] = ()
    # of what the source states as consent; both empty: anything, stated or not
    consent_allow: tuple[str, ...] = ()
    placement: PlacementConfig = field(default_factory=PlacementConfig, metadata=NO_ANSWER)


@dataclass(frozen=True, slots=True, kw_only=True)
class ThumbnailConfig:
    """Of 96 pixels on the long side, for the report; kept of dropped pictures too."""

    quality: int = 55  # of WebP
    placement: PlacementConfig = field(default_factory=PlacementConfig, metadata=NO_ANSWER)

    def __post_init__(self) -> None:
        check(1 <= self.quality <= 100, f"thumbnail.quality={self.quality}: expected 1 to 100")


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureConfig:
    """What is measured has no settings; what is made of it, RulesConfig says."""

    placement: PlacementConfig = field(default_factory=PlacementConfig, metadata=NO_ANSWER)


@dataclass(frozen=True, slots=True, kw_only=True)
class RulesConfig:
    """What a sample must be, in figures that are recorded; another rule needs no model to run
    again. 0: no such rule.

    The defaults keep 999 of 1,000 synthetic portraits (the other has a second face) and were tried
    on few photographs: `python -m bench.quality FOLDER` shows where yours lie.
    """

    min_side: int = 256  # short side of the source, pixels
    # of at least a third of the chosen one's side: passers-by far behind don't count
    max_faces: int = 1
    min_faces: int = 1
    min_face: float = 64.0  # short side of the chosen face's box, pixels of the resized picture
    min_score: float = 0.5  # of the chosen face's detection, 0 to 1
    # 0 to 1: sharp portraits 0.25 to 0.47, blurred by 2 % of the face's width 0.11 to 0.18
    min_sharpness: float = 0.22
    # mean luma of the skin, 0 to 1; under the darkest well-lit skin (0.145)
    min_brightness: float = 0.12
    max_brightness: float = 0.92
    max_clipped: float = 0.25  # share of the face that is black or white, 0 to 1
    max_yaw: float = 60.0  # degrees either way, up to 180
    max_pitch: float = 40.0
    max_roll: float = 35.0
    # share of the face, 0 to 1: portraits up to 0.03, mouth or eyes covered 0.25 and more
    max_occlusion: float = 0.2
    # of ArcFace's raw embedding, w600k_mbf: faces 16 to 26, no faces 6 to 13
    min_identity_norm: float = 12.0
    placement: PlacementConfig = field(default_factory=PlacementConfig, metadata=NO_ANSWER)

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
                f"rules.{low}={least} is over rules.{high}={greatest}: no picture would be left",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalPassConfig:
    """The global pass: duplicates across shards, identities, and the train/val split."""

    # Measured (docs/benchmarks.md): what was encoded again or scaled is within 6 bits, no strangers
    # within 46; of half a million strangers about one pair in ten sets would be within 10. Cropped
    # copies are found by the face.
    # near_duplicate: bits of 256 in which perceptual hashes differ; -1: off
    max_hash_distance: int = 10
    # face_duplicate: cosine of identities from which it is the same picture; 0: off
    max_similarity: float = 0.95
    # Mean cosine between two groups that become one identity. Measured where strangers are hardest
    # to tell apart, with the demo's embedder on synthetic portraits, of which one pair in a
    # thousand has 0.57: of 300 strangers 0.5 joins 132 to others, 0.6 joins 25. Where strangers lie
    # near 0, as photographs' do by a better embedder, 0.6 leaves people in pieces and 0.35 joins no
    # one falsely (simulated): lower it for one that you have measured.
    identity_similarity: float = 0.6
    # Identities that may be one person stay on one side: the same, asked more loosely. Where people
    # fall into pieces at 0.6, 0.35 left half a per cent of val's pictures with their person in
    # train, 0.45 half of them (simulated).
    split_similarity: float = 0.35
    # neighbours looked at of each sample; twice as many gave the same within half a per cent
    nearest: int = 16
    val_share: float = 0.02  # of these groups, kept apart for validation
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
            f"identity_similarity={self.identity_similarity}: "
            "expected over 0, under 1, and the first not over the second",
        )
        check(5 <= self.nearest <= 256, f"global_pass.nearest={self.nearest}: expected 5 to 256")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReviewConfig:
    """What the trainer will make of the texts; `spec` and `mode` as it will be told."""

    spec: Literal["tiny", "sd15", "sdxl"] = "sd15"
    mode: Literal["corrected", "legacy"] = "corrected"
    # share of samples; over it a run fails
    max_untrainable: float = field(default=0.5, metadata=NO_ANSWER)
    placement: PlacementConfig = field(default_factory=PlacementConfig, metadata=NO_ANSWER)

    def __post_init__(self) -> None:
        check(
            0 <= self.max_untrainable <= 1,
            f"review.max_untrainable={self.max_untrainable}: expected 0 to 1",
        )
