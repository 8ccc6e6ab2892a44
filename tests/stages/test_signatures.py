"""Signatures equal those of version 0.1, so that its data sets are not processed again; except for
the captions of `attributes`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest

from configs.common import NOT_HASHED, PlacementConfig, hashed_settings, introduced
from configs.load import load
from configs.schema import DatasetConfig
from pipelines.chain import build_chain
from stages.backends.weights import Weights
from stages.base import RecordStage, current_signature, introduced_name
from stages.caption import CaptionStage
from stages.record import Record

DATA = Path("tests/data/dataset_v2")
# All literal signatures here were computed by the program at commit 56178d4, except that of
# `attributes` captions, whose rules are in their second version.
DEMO = [
    "rights-1-3c1f682d25193215",
    "resize-4-8d31b3f61877a5ac",
    "thumbnail-1-7a099ecb9367d5e6",
    "detect-1-cd9109b47580c6ea",
    "parse-1-a3346ad922896cea",
    "embed-2-e2ec01411c26ca66",
    "measure-1-3bb5eca10225aafe",
    "judge-1-597a1f934f6729ea",
    "caption-1-dd41bd4570df4068",
    "review-1-85e9f6f1ce78da89",
]
CHANGES = (
    "resize.size=192",
    "rights.license_allow=[CC0*]",
    "detect.min_score=0.6",
    "parse.dtype=bfloat16",
    "parse.device=cuda:1",
    "rules.min_sharpness=0.25",
    "rules.placement.cpus=2",
    "review.mode=legacy",
    "review.max_untrainable=0.1",
    "thumbnail.quality=70",
    "embed.weights=w600k_r50",
)
CHANGED = [
    "rights-1-f21fb30dd6642ba1",
    "resize-4-3bd8cde8153e6008",
    "thumbnail-1-a5af098c81af7d4e",
    "detect-1-a525816d8ebbf0b4",
    "parse-1-7a14f2310b17a4cd",
    "embed-2-80cb08b82013c925",
    "measure-1-3bb5eca10225aafe",
    "judge-1-efe206e7ad4f90ba",
    "caption-1-dd41bd4570df4068",
    "review-1-f78e020b8144e1b5",
]
LLAVA = (
    "caption.backend=llava",
    "caption.llava.model=checkpoint",
    "caption.llava.check_answers=false",
    "caption.llava.pad_to_square=false",
    "caption.llava.dtype=float32",
    "caption.llava.max_new_tokens=512",
    "caption.llava.face_max_new_tokens=512",
)
OPENAI = (
    "caption.backend=openai",
    "caption.openai.model=someone/model",
    "caption.openai.base_url=http://127.0.0.1:9/v1",
    "caption.openai.check_answers=false",
    "caption.openai.pad_to_square=false",
    "caption.openai.max_new_tokens=512",
    "caption.openai.face_max_new_tokens=512",
)
CAPTIONS: list[tuple[tuple[str, ...], tuple[str, ...], str]] = [
    ((), (), "dd41bd4570df4068"),
    (LLAVA, (), "4a2ca981a4f807ec"),
    (LLAVA, ("llava.prompt=Who?",), "c2cc0f095770a3cf"),
    (LLAVA, ("llava.face_prompt=Which eyes?",), "d63d655ade229c13"),
    (LLAVA, ("llava.max_new_tokens=64", "llava.face_max_new_tokens=64"), "948e5ee29b02c147"),
    (LLAVA, ("llava.dtype=float16",), "d489418ddbce19fc"),
    (LLAVA, ("llava.quantize=4bit",), "624b346e26adbdb0"),
    (LLAVA, ("llava.device=cpu", "placement.batch_size=8"), "4a2ca981a4f807ec"),
    (LLAVA, ("llava.memory_share=0", "llava.tiles=all"), "4a2ca981a4f807ec"),
    (LLAVA, ("openai.concurrency=3",), "4a2ca981a4f807ec"),
    (OPENAI, (), "6a04f2ea11844921"),
    (OPENAI, ("openai.prompt=Who?",), "602226f2ff63d00e"),
    (OPENAI, ("openai.face_prompt=Which eyes?",), "7c02cf43245d443a"),
    (OPENAI, ("openai.max_new_tokens=64", "openai.face_max_new_tokens=64"), "7093be1af2e19959"),
    (OPENAI, ("openai.model=other",), "98510a1c616c3c0a"),
    (OPENAI, ("openai.tries=9", "openai.timeout=5", "openai.api_key_env=X"), "6a04f2ea11844921"),
    # Settings that the chosen backend doesn't read are hashed with the defaults of version 0.1.
    (OPENAI, ("llava.dtype=float16", "llava.quantize=4bit", "llava.prompt=a"), "6a04f2ea11844921"),
    ((), ("llava.prompt=a", "openai.model=b", "llava.max_new_tokens=9"), "dd41bd4570df4068"),
]


def signatures(config: DatasetConfig) -> list[str]:
    """Returns the signatures of the stages that version 0.1 had."""
    old = {signature.split("-")[0] for signature in map(current_signature, DEMO)}
    return [stage.signature() for stage in build_chain(config) if stage.name in old]


@pytest.mark.parametrize(("overrides", "expected"), [((), DEMO), (CHANGES, CHANGED)])
def test_the_chain_of_the_demo_has_the_signatures_of_version_0_1(
    overrides: tuple[str, ...], expected: list[str]
) -> None:
    config = load(DatasetConfig, "configs/dataset/demo.yaml", overrides)
    assert signatures(config) == [current_signature(signature) for signature in expected]


def test_a_data_set_of_version_0_1_has_the_signatures_of_its_configuration_today() -> None:
    expected = signatures(load(DatasetConfig, DATA / "config.yaml"))
    manifests = sorted(DATA.glob("shards/*.json"))
    assert len(manifests) == 2
    for path in (*manifests, DATA / "dataset.json"):
        stored = json.loads(path.read_text())["signatures"]
        signatures_today = [current_signature(signature) for signature in stored]
        captions = signatures_today.index("caption-1-1bc2b81f201736b0")
        assert signatures_today[:captions] == expected[:captions]
        assert signatures_today[captions + 1 :] == expected[captions + 1 :]
        assert expected[captions] == "caption-1-dd41bd4570df4068"


@pytest.mark.parametrize(("backend", "changes", "expected"), CAPTIONS)
def test_a_caption_signature_covers_the_settings_of_its_backend_as_in_version_0_1(
    backend: tuple[str, ...],
    changes: tuple[str, ...],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("checkpoint").mkdir()
    Path("checkpoint/config.json").write_text("{}")
    Path("checkpoint/model.safetensors").write_bytes(b"weights")
    overrides = [*backend, *(f"caption.{change}" for change in changes)]
    caption = load(DatasetConfig, None, overrides).caption
    # as a server that states no root, or the model's name
    caption = replace(caption, openai=replace(caption.openai, root=caption.openai.model))
    assert CaptionStage(caption, Weights()).signature() == f"caption-1-{expected}"


@pytest.mark.parametrize("backend", ["llava", "openai"])
def test_other_numbers_of_tokens_for_the_two_captions_give_other_signatures(
    backend: Literal["llava", "openai"], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    chosen = [f"caption.backend={backend}", f"caption.{backend}.model={tmp_path}"]
    chosen += ["caption.openai.base_url=http://127.0.0.1:9/v1", "caption.openai.root=x"]
    signatures = set()
    for coarse, fine in ((512, 512), (64, 64), (64, 512), (512, 64), (96, 160)):
        tokens = {"max_new_tokens": coarse, "face_max_new_tokens": fine}
        overrides = [f"caption.{backend}.{name}={count}" for name, count in tokens.items()]
        config = load(DatasetConfig, None, [*chosen, *overrides]).caption
        signatures.add(CaptionStage(config, Weights()).signature())
    assert len(signatures) == 5


def test_a_renamed_stage_is_hashed_under_the_name_it_was_introduced_with() -> None:
    class Stage(RecordStage):
        name = "judge"

        def process_one(self, record: Record) -> Record:
            return record

    class Renamed(Stage):
        name = "quality_filter"

    assert introduced_name("quality_filter") == "judge"
    assert Renamed(None).signature() == current_signature(Stage(None).signature())


def test_old_stage_names_in_signatures_are_replaced_by_current_ones() -> None:
    assert current_signature("judge-1-597a1f934f6729ea") == "quality_filter-1-597a1f934f6729ea"
    for signature in ("quality_filter-1-0f", "caption-12-0f", "skin-tone-1-0f"):
        assert current_signature(signature) == signature


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    used: int = 1
    device: str = field(default="auto", metadata=NOT_HASHED)
    added: int = field(default=3, metadata=introduced(2))  # its default has changed since


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """A configuration to which `since`, `new_part` and `part.added` were added later."""

    original: tuple[int, ...] = (1, 2)
    part: Part = field(default_factory=Part)
    since: int = field(default=0, metadata=introduced(0))
    new_part: Part = field(default_factory=Part, metadata=introduced(Part()))
    placement: PlacementConfig = field(default_factory=PlacementConfig, metadata=NOT_HASHED)


def test_a_setting_is_hashed_unless_it_has_the_value_it_was_introduced_with() -> None:
    before = Whole(part=Part(added=2))
    assert hashed_settings(before) == {"original": (1, 2), "part": {"used": 1}}
    for unhashed_change in (
        replace(before, placement=PlacementConfig(cpus=9)),
        replace(before, part=replace(before.part, device="cpu")),
    ):
        assert hashed_settings(unhashed_change) == hashed_settings(before)
    assert hashed_settings(Whole())["part"] == {"used": 1, "added": 3}
    assert hashed_settings(replace(before, since=1))["since"] == 1
    other = replace(before, new_part=Part(used=5, added=2))
    assert hashed_settings(other)["new_part"] == {"used": 5}
