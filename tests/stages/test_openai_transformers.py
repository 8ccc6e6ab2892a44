"""The `openai` backend with two servers of `transformers serve`, one of which is killed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from skimage.data import astronaut, cat, coffee, rocket

from configs.captions import LlavaConfig, OpenAIConfig
from configs.errors import ServerError
from stages.backends.llava import Llava
from stages.backends.openai import OpenAICaptioner
from stages.codec import encode_jpeg
from stages.record import Record
from tests.stages.tiny_llava import make_checkpoint
from tests.stages.transformers_server import TransformersServer, transformers_server

TOKENS = 24
pytestmark = [pytest.mark.slow, pytest.mark.thorough]


@pytest.fixture(scope="module")
def records() -> list[Record]:
    images = (astronaut(), cat()[:, :150], coffee()[:300], rocket())
    return [
        Record(key=f"{n:020x}", source=str(n), image=encode_jpeg(image, 95))
        for n, image in enumerate(images)
    ]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with sampling settings, which both ways must override by greedy decoding."""
    torch.set_num_threads(1)
    folder = make_checkpoint(tmp_path_factory.mktemp("llava"))
    settings = json.loads((folder / "generation_config.json").read_text())
    settings |= {"do_sample": True, "temperature": 2.0, "repetition_penalty": 1.5}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def started(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[TransformersServer]]:
    """Two servers with the checkpoint."""
    folder = tmp_path_factory.mktemp("serve")
    with ExitStack() as stack:
        logs = [folder / "one.txt", folder / "two.txt"]
        yield [stack.enter_context(transformers_server(checkpoint, log)) for log in logs]


@pytest.fixture(scope="module")
def config(checkpoint: Path, started: list[TransformersServer]) -> OpenAIConfig:
    settings: dict[str, Any] = {"max_new_tokens": TOKENS, "face_max_new_tokens": TOKENS}
    settings |= {"tries": 2, "concurrency": 4}
    # else the padded pictures are encoded again, with other pixels
    settings["pad_to_square"] = False
    urls = ",".join(server.base_url() for server in started)
    return OpenAIConfig(base_url=urls, model=str(checkpoint), **settings)


@pytest.fixture(scope="module")
def local(checkpoint: Path, records: list[Record]) -> list[Any]:
    """The captions that the model in this process gives."""
    settings: dict[str, Any] = {"max_new_tokens": TOKENS, "face_max_new_tokens": TOKENS}
    settings["pad_to_square"] = False
    llava = Llava(LlavaConfig(model=str(checkpoint), device="cpu", **settings))
    captions = llava.caption(records, batch_size=4)
    texts = {text for pair in captions for text in pair}
    assert len(texts) == 2 * len(records), "the test needs captions that all differ"
    return list(captions)


def test_servers_and_the_model_in_this_process_give_the_same_captions(
    config: OpenAIConfig, records: list[Record], local: list[Any], started: list[TransformersServer]
) -> None:
    OpenAICaptioner.preflight(config, (512, 512))
    assert OpenAICaptioner.digests(config) == {}, "no root is stated"
    before = [server.answers() for server in started]
    captioner = OpenAICaptioner(config)
    assert captioner.caption(records) == local
    assert captioner.caption(records[::-1]) == local[::-1], "a second call, on open connections"
    assert captioner.counts["completion_tokens"] == 2 * 2 * len(records) * TOKENS, (
        "each caption has max_new_tokens"
    )
    assert captioner.counts["prompt_tokens"] > 2 * 2 * len(records) * 16, (
        "each image counts as 16 tokens"
    )
    after = [server.answers() for server in started]
    assert all(b - a >= 4 for a, b in zip(before, after, strict=True))


def test_a_model_that_the_servers_do_not_have_ends_the_run(
    config: OpenAIConfig, records: list[Record], started: list[TransformersServer]
) -> None:
    other = OpenAIConfig(base_url=config.base_url, model="someone/other", tries=1)
    expected = r"caption\.openai\.model=someone/other: .*status 400.*someone/other"
    with pytest.raises(ServerError, match=expected):
        OpenAICaptioner.preflight(other, (512, 512))
    with pytest.raises(ServerError, match=expected) as caught:
        OpenAICaptioner(other).caption(records[:1])
    assert all(server.base_url() in str(caught.value) for server in started)


def test_captions_stay_the_same_while_a_server_is_killed_and_the_last_one_ends_the_run(
    config: OpenAIConfig,
    records: list[Record],
    local: list[Any],
    started: list[TransformersServer],
    caplog: pytest.LogCaptureFixture,
) -> None:
    one, two = started
    captioner = OpenAICaptioner(config)
    results: list[Any] = []
    run = Thread(target=lambda: results.extend(captioner.caption(records * 8)))
    before = one.answers()
    run.start()
    while one.answers() < before + 4:
        time.sleep(0.01)
    one.process.kill()
    run.join()
    assert results == local * 8
    url, _, other = config.base_url.partition(",")
    assert f"caption server {url} is left out" in caplog.text and other not in caplog.text
    two.process.kill()
    with pytest.raises(ServerError, match=rf"{url}: .*{other}: "):
        captioner.caption(records)
