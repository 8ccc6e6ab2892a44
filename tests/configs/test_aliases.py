"""Renamed configuration keys: the old names are read, with one warning each."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from configs import aliases
from configs.captions import LlavaConfig, OpenAIConfig
from configs.errors import ConfigError
from configs.load import load, load_text, to_yaml
from configs.schema import DatasetConfig
from configs.training import TrainConfig

GOLDEN = Path("tests/data/dataset_v2/config.yaml")  # written by version 0.1
SECRET = "sk-test-5b2d0c9e77"
# caption keys of version 0.1: a value for each, and the sections that have it now
CAPTIONS = {
    "model": ("someone/model", "llava openai"),
    "prompt": ("Who?", "llava openai"),
    "face_prompt": ("Which eyes?", "llava openai"),
    "max_new_tokens": (64, "llava openai"),
    "dtype": ("float16", "llava"),
    "quantize": ("4bit", "llava"),
    "device": ("cuda:1", "llava"),
    "base_url": ("http://127.0.0.1:9/v1", "openai"),
    "api_key_env": ("CAPTION_KEY", "openai"),
    "concurrency": (3, "openai"),
    "tries": (2, "openai"),
    "timeout": (5.0, "openai"),
}
# keys that have become several in each section
SPLIT = {"max_new_tokens": ("max_new_tokens", "face_max_new_tokens")}


@pytest.fixture(autouse=True)
def _warn_again() -> Iterator[None]:
    """Lets each test log every warning, as a new process does."""
    aliases._warn.cache_clear()
    yield
    aliases._warn.cache_clear()


def warnings(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("way", ["file", "text", "override"])
@pytest.mark.parametrize("name", CAPTIONS)
def test_an_old_caption_key_goes_to_every_backend_that_has_it(
    name: str, way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    value, sections = CAPTIONS[name]
    text = f"caption:\n  backend: llava\n  {name}: {value}\n"
    if way == "file":
        (tmp_path / "own.yaml").write_text(text)
        config = load(DatasetConfig, tmp_path / "own.yaml")
    elif way == "text":
        config = load_text(DatasetConfig, text)
    else:
        config = load(DatasetConfig, None, ["caption.backend=llava", f"caption.{name}={value}"])
    names = SPLIT.get(name, (name,))
    changed = dict.fromkeys(names, value)
    assert config.caption.llava == (
        LlavaConfig(**changed) if "llava" in sections else LlavaConfig()
    )
    assert config.caption.openai == (
        OpenAIConfig(**changed) if "openai" in sections else OpenAIConfig()
    )
    renamed = " and ".join(f"caption.{s}.{new}" for s in sections.split() for new in names)
    assert warnings(caplog) == [
        f"The setting caption.{name} is now {renamed}. The old name is read until version 0.3.0."
    ]


def test_all_settings_of_a_renamed_section_are_read(caplog: pytest.LogCaptureFixture) -> None:
    text = "neighbours:\n  val_share: 0.5\n  seed: 3\n"
    config = load_text(DatasetConfig, text, ["neighbours.seed=4"])
    assert (config.global_pass.val_share, config.global_pass.seed) == (0.5, 4)
    assert warnings(caplog) == [
        "The setting neighbours is now global_pass. The old name is read until version 0.3.0."
    ]


def test_a_configuration_of_version_0_1_is_read_and_written_under_the_new_names(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = load(DatasetConfig, GOLDEN)
    caption, tokens = DatasetConfig().caption, dict.fromkeys(SPLIT["max_new_tokens"], 512)
    caption = replace(
        caption,
        llava=replace(caption.llava, dtype="float32", **tokens),  # the default of version 0.1
        openai=replace(caption.openai, **tokens),
    )
    assert (config.caption, config.global_pass) == (caption, DatasetConfig().global_pass)
    assert len(warnings(caplog)) == len(CAPTIONS) + 1
    load(DatasetConfig, GOLDEN)
    load(DatasetConfig, GOLDEN, ["caption.prompt=Who?"])
    assert len(warnings(caplog)) == len(CAPTIONS) + 1, "one warning for each key in a process"
    assert load_text(DatasetConfig, to_yaml(config)) == config
    aliases._warn.cache_clear()
    caplog.clear()
    load_text(DatasetConfig, to_yaml(config))
    assert warnings(caplog) == []


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("caption.prompt", "caption.llava.prompt", "caption: {prompt: X, llava: {prompt: X}}"),
        ("caption.prompt", "caption.openai.prompt", "caption: {prompt: X, openai: {prompt: X}}"),
        (
            "caption.api_key_env",
            "caption.openai.api_key_env",
            "caption: {api_key_env: X, openai: {api_key_env: X}}",
        ),
        ("neighbours", "global_pass", "neighbours: {seed: X}\nglobal_pass: {seed: X}"),
    ],
)
def test_a_value_under_both_names_is_an_error_that_does_not_show_the_value(
    old: str, new: str, text: str, tmp_path: Path
) -> None:
    file = tmp_path / "both.yaml"
    file.write_text(text.replace("X", SECRET))
    key = "" if "." in old else ".seed"
    both = [f"{old}{key}={SECRET}", f"{new}{key}={SECRET}"]
    for path, overrides in ((file, []), (None, both), (None, both[::-1])):
        with pytest.raises(ConfigError, match=f"^{old} and {new} are both given") as caught:
            load(DatasetConfig, path, overrides)
        assert SECRET not in str(caught.value)


def test_an_override_wins_over_the_file_under_either_name() -> None:
    for inside in ("prompt: file", "llava: {prompt: file}\n  openai: {prompt: file}"):
        for names in (["prompt"], ["llava.prompt", "openai.prompt"]):
            overrides = [f"caption.{name}=own" for name in names]
            caption = load_text(DatasetConfig, f"caption:\n  {inside}\n", overrides).caption
            assert (caption.llava.prompt, caption.openai.prompt) == ("own", "own")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"caption.api_key_env={SECRET}", r"caption\.openai\.api_key_env is not the name"),
        (f"caption.base_url=http://me:{SECRET}@a/v1", r"caption\.openai\.base_url has more"),
        (f"caption.base_url=http://a/v1?key={SECRET}", r"caption\.openai\.base_url has more"),
        ("caption.base_url=a:8000", r"caption\.openai\.base_url='a:8000': expected a URL"),
        ("caption.max_new_tokens=0", r"caption\.llava\.max_new_tokens=0"),
        ("caption.dtype=int8", r"caption\.llava\.dtype='int8': expected one of"),
        ("caption.promt=x", r"unknown key caption\.promt"),
        ("neighbours.nearest=1", r"global_pass\.nearest=1: expected 5 to 256"),
        ("neighbours.near=9", r"unknown key global_pass\.near\. Did you mean global_pass\.nearest"),
        ("neighbours=1", "global_pass=1: expected a section"),
    ],
)
def test_old_keys_are_checked_like_the_new_ones(
    override: str, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key, _, value = override.partition("=")
    *section, name = key.split(".")
    (tmp_path / "own.yaml").write_text(
        "".join(f"{part}:\n  " for part in section) + f"{name}: {value}"
    )
    for path, overrides in ((None, [override]), (tmp_path / "own.yaml", [])):
        with pytest.raises(ConfigError, match=message) as caught:
            load(DatasetConfig, path, overrides)
        assert SECRET not in str(caught.value)
    assert not any(SECRET in text for text in warnings(caplog))


def test_a_value_in_place_of_a_section_is_an_error_that_does_not_show_the_override() -> None:
    with pytest.raises(ConfigError, match=r"override caption\.…: caption is a value") as caught:
        load_text(DatasetConfig, "caption: 1", [f"caption.model={SECRET}"])
    assert SECRET not in str(caught.value)
    with pytest.raises(ConfigError, match=r"caption\.llava\.model: llava is a value"):
        load_text(DatasetConfig, "caption: {model: a, llava: 1}")


def test_old_keys_of_one_configuration_are_unknown_to_others() -> None:
    with pytest.raises(ConfigError, match="unknown key neighbours"):
        load(TrainConfig, None, ["neighbours.seed=1"])
