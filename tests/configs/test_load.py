"""Loading configurations: presets, overrides, and errors for wrong keys and values."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.captions import FACE_PROMPT, PROMPT
from configs.errors import ConfigError
from configs.load import load, load_text, to_yaml
from configs.portraits import InferConfig
from configs.schema import DatasetConfig
from configs.training import DataSource, TrainConfig

PRESETS = [
    (p, k)
    for k, f in ((DatasetConfig, "dataset"), (TrainConfig, "train"), (InferConfig, "infer"))
    for p in sorted(Path("configs", f).glob("*.yaml"))
]


@pytest.mark.parametrize(("path", "kind"), PRESETS, ids=lambda value: str(value))
def test_every_preset_loads_and_is_equal_after_writing_and_reading(path: Path, kind: type) -> None:
    config = load(kind, path)
    assert load_text(kind, to_yaml(config)) == config


def test_the_production_preset_has_the_production_weights() -> None:
    fgid = load(DatasetConfig, "configs/dataset/fgid.yaml")
    assert (fgid.detect.weights, fgid.embed.weights, fgid.parse.weights) == (
        "det_10g",
        "w600k_r50",
        "parsing_bisenet",
    )
    assert fgid.caption.backend == "llava"
    for section in (fgid.caption.llava, fgid.caption.openai):
        assert section.model == "llava-hf/llava-1.5-7b-hf"
        assert (section.prompt, section.face_prompt) == (PROMPT, FACE_PROMPT)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("detct.min_score=1", "Did you mean detect"),
        ("detect.min_scor=1", "Did you mean detect.min_score"),
        ("detect.min_score=2", "over 0, under 1"),
        ("executor=spark", "one of ray, inline"),
        ("shard_size=many", "whole number"),
        ("shard_size=0", "1 to 100000"),
        ("shard_size", "key=value"),
        ("shard_size.x=1", "expected a whole number"),
        ("detect=1", "section"),
        ("source.extensions=[JPG]", "lower case"),
        ("detect.scales=[100]", "multiples of 32"),
        ("threads=-1", "threads=-1: expected at least 0"),
        ("ray.workers=-2", "ray.workers=-2: expected at least 0"),
        ("parse.size=0", "at least 32 pixels"),
        ("rules.max_yaw=.inf", "max_yaw=inf: expected a finite number"),
        ("stuck_after=nan", "expected a finite number"),
    ],
)
def test_the_error_for_a_wrong_override_says_what_was_expected(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(DatasetConfig, None, [override])


def test_overrides_are_parsed_by_the_type_of_their_field() -> None:
    config = load(
        DatasetConfig,
        None,
        ["output=007", "source.path=[a] b: c", "detect.min_score=6e-1", "detect.scales=320"],
    )
    assert (config.output, config.source.path) == ("007", "[a] b: c")
    assert (config.detect.min_score, config.detect.scales) == (0.6, (320,))


def test_a_missing_or_malformed_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no configuration at"):
        load(DatasetConfig, tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load(DatasetConfig, tmp_path / "bad.yaml")


def test_the_home_folder_is_expanded_in_overrides_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    preset = tmp_path / "preset.yaml"
    preset.write_text("source:\n  path: ~/photos\n")
    config = load(DatasetConfig, preset, ["output=~/out", "source.author=~nobody"])
    assert (config.source.path, config.output) == ("/home/me/photos", "/home/me/out")
    assert config.source.author == "~nobody"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", [("a", None)]),
        ("007", [("007", None)]),
        ("s3://bucket/a", [("s3://bucket/a", None)]),
        ("[a, b]", [("a", None), ("b", None)]),
        ("[{path: a, weight: 2}, {path: b, weight: 1e-1}]", [("a", 2), ("b", 0.1)]),
        ("[{path: a}, b]", [("a", None), ("b", None)]),
        ("{path: a, weight: 3}", [("a", 3)]),
        ("['[a]']", [("[a]", None)]),
    ],
)
def test_data_is_a_path_or_a_list_in_files_and_overrides(
    tmp_path: Path, text: str, expected: list[tuple[str, float | None]]
) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_text(f"data: {text!r}" if text == "007" else f"data: {text}")
    for config in (load(TrainConfig, preset), load(TrainConfig, None, [f"data={text}"])):
        assert [(source.path, source.weight) for source in config.data] == expected
        assert load_text(TrainConfig, to_yaml(config)) == config
    # an override replaces the file's data sets
    assert load(TrainConfig, preset, ["data=z"]).data == (DataSource(path="z"),)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data=[{path: a, weight: 2}, {path: b}]", "weights are given for a, and not for b"),
        ("data=[{path: a, weight: 0}]", "weight 0.0 of a: expected more than 0"),
        ("data=[{path: a, weigth: 1}]", r"Did you mean data\[0\]\.weight"),
        ("data=[a, b, a]", "a is given twice"),
        ("data=[[a]]", r"data\[0\].path=.* expected text"),
        ("pair_prob=1.5", "pair_prob=1.5: expected 0 to 1"),
    ],
)
def test_data_sets_and_pairs_that_are_impossible_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(TrainConfig, None, [override])
