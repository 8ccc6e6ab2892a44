"""Settings of captions: impossible values are errors, which never show a key."""

from __future__ import annotations

from typing import Any

import pytest

from configs.captions import LlavaConfig, OpenAIConfig
from configs.errors import ConfigError
from configs.load import load
from configs.schema import DatasetConfig

KEY = "sk-test-5b2d0c9e77"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"api_key_env": KEY}, "not the name of an environment variable"),
        ({"base_url": f"http://me:{KEY}@127.0.0.1/v1"}, "more than a scheme, a host and a path"),
        ({"base_url": f"http://127.0.0.1/v1?key={KEY}"}, "more than a scheme, a host and a path"),
        ({"base_url": "127.0.0.1:8000"}, "expected a URL"),
        ({"base_url": "http://a/v1,"}, "base_url='': expected a URL"),
        ({"base_url": "http://a/v1,b/v1"}, "base_url='b/v1': expected a URL"),
        ({"base_url": f"http://a/v1,http://me:{KEY}@b/v1"}, "more than a scheme"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"concurrency": 1025}, "concurrency=1025"),
        ({"tries": 0}, "tries=0"),
        ({"timeout": 0.0}, "timeout=0"),
        ({"max_new_tokens": 0}, r"caption\.openai\.max_new_tokens=0"),
        ({"face_max_new_tokens": 0}, r"caption\.openai\.face_max_new_tokens=0"),
    ],
)
def test_impossible_settings_are_errors_that_do_not_show_a_key(
    changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        OpenAIConfig(**{"base_url": "http://127.0.0.1:9/v1", **changes})
    assert KEY not in str(caught.value)


def test_several_urls_are_separated_by_commas() -> None:
    urls = "http://a:8000/v1, https://b/v1/,http://a:8000/v1"
    config = load(DatasetConfig, None, [f"caption.openai.base_url={urls}"]).caption.openai
    assert config.base_urls == ("http://a:8000/v1", "https://b/v1", "http://a:8000/v1")
    assert OpenAIConfig().base_urls == ()


def test_zero_tokens_for_llava_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"caption\.llava\.max_new_tokens=0"):
        LlavaConfig(max_new_tokens=0)
