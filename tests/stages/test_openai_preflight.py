"""The `openai` backend before a run: do model, checkpoint and the largest picture fit?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytest

from configs.captions import CaptionConfig, OpenAIConfig
from configs.errors import ServerError
from configs.schema import ResizeConfig
from stages.backends.openai import OpenAICaptioner
from stages.backends.openai.preflight import stated_root
from stages.backends.weights import Weights
from stages.caption import CaptionStage
from stages.chain import build_stages
from stages.codec import decode_jpeg
from tests.pipelines.helpers import config as dataset_config
from tests.stages.chat_server import ChatServer, refusal, within
from tests.stages.records import drawn_record
from tests.stages.transformers_server import free_port

GONE = f"http://127.0.0.1:{free_port()}/v1"
KEY = "sk-test-5b2d0c9e77"


def config_of(*servers: ChatServer | str, **changes: Any) -> OpenAIConfig:
    urls = [server if isinstance(server, str) else server.base_url for server in servers]
    settings: dict[str, Any] = {"model": "m", "tries": 1, "timeout": 20.0, **changes}
    return OpenAIConfig(base_url=",".join(urls), **settings)


def listed(root: str = "m", context: int = 0, name: str = "m") -> Sequence[dict[str, Any]]:
    """Returns a list of models as vLLM's."""
    model = {"id": name, "object": "model", "owned_by": "vllm", "root": root}
    return [model | ({"max_model_len": context} if context else {})]


@pytest.fixture
def start() -> Iterator[Callable[..., ChatServer]]:
    """Starts servers, which end with the test. Another test's server may have had the same port, or
    get it later, with another root.
    """
    stated_root.cache_clear()
    with ExitStack() as stack:
        yield lambda *args, **settings: stack.enter_context(ChatServer(*args, **settings))
    stated_root.cache_clear()


@pytest.mark.parametrize(
    ("mode", "pads", "shape"),
    [
        ("short_side", True, (1024, 1024, 3)),
        ("short_side", False, (1024, 512, 3)),
        ("squash", True, (512, 512, 3)),
    ],
)
def test_the_largest_picture_is_asked_about_with_all_prompts(
    mode: Any, pads: bool, shape: tuple[int, ...], start: Callable[..., ChatServer]
) -> None:
    assert ResizeConfig(mode=mode, max_aspect=2).largest == (512, shape[0])
    server = start()
    config = dataset_config(
        "photos",
        "out",
        f"resize.mode={mode}",
        "resize.max_aspect=2",
        "caption.backend=openai",
        f"caption.openai={{base_url: '{server.base_url}', model: m, face_view_below: 0.2, "
        f"pad_to_square: {str(pads).lower()}}}",
    )
    build_stages(config)[-1].preflight()
    for request in server.requests:
        shapes = [decode_jpeg(jpeg).shape for jpeg in request.jpegs]
        crop = [(448, 448, 3)] if "face" in request.prompt else []
        assert shapes == [shape, *crop], request.prompt
    openai = config.caption.openai
    prompts = {openai.prompt, openai.face_prompt, openai.retry_prompt, openai.face_retry_prompt}
    assert {request.prompt for request in server.requests} == prompts
    assert max(request.body["max_tokens"] for request in server.requests) == 160
    assert server.most_open <= openai.concurrency


def test_a_context_that_is_too_short_is_an_error_with_both_numbers(
    start: Callable[..., ChatServer],
) -> None:
    """2048² pixels are 5,369 tokens, with room for the answer 5,529."""
    OpenAICaptioner.preflight(
        config_of(start(within(5529), models=listed(context=5529))), (2048, 2048)
    )
    server = start(within(5528), models=listed(context=5528))
    with pytest.raises(ServerError) as caught:
        OpenAICaptioner.preflight(config_of(server), (2048, 2048))
    for part in (
        "2048 × 2048 pixels",
        "5,369 tokens",
        "5,529 in all",
        "5,528 (max_model_len)",
        "--max-model-len 5529 or more",
        "lower resize.size",
        "caption.openai.max_new_tokens",
    ):
        assert part in str(caught.value)
    assert {request.body["max_tokens"] for request in server.requests} == {1}


@pytest.mark.parametrize("context", [0, 4096])
def test_a_refusal_of_the_largest_picture_is_an_error_with_the_servers_words(
    context: int, start: Callable[..., ChatServer]
) -> None:
    server = start(within(4096), models=listed(context=context))
    with pytest.raises(ServerError) as caught:
        OpenAICaptioner.preflight(config_of(server), (2048, 2048))
    stated = "Its context has 4,096 tokens (max_model_len)"
    for part in ("status 400", "has 5369 input tokens", "a larger --max-model-len"):
        assert part in str(caught.value)
    assert (stated in str(caught.value)) == bool(context)


def test_no_room_for_the_answer_is_an_error_if_the_server_states_no_context(
    start: Callable[..., ChatServer],
) -> None:
    with pytest.raises(ServerError, match=r"an answer of 160 tokens, .*5369 input tokens"):
        OpenAICaptioner.preflight(config_of(start(within(5528))), (2048, 2048))


def test_a_model_that_the_server_does_not_have_is_an_error_that_names_those_it_has(
    start: Callable[..., ChatServer],
) -> None:
    models = [*listed(name="b"), *listed(name="a")]
    server = start(lambda request: refusal(404, "no such model"), models=models)
    with pytest.raises(ServerError, match=r"has no such model .*those that it has: a, b"):
        OpenAICaptioner.preflight(config_of(server, root="m"), (512, 512))
    # `transformers serve` doesn't list a model in a folder
    OpenAICaptioner.preflight(config_of(start(models=models), root="m"), (512, 512))


def test_a_refused_key_is_an_error_without_the_key(
    start: Callable[..., ChatServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = start(lambda request: refusal(401, f"wrong: {KEY}"))
    with pytest.raises(ServerError, match="refuses the key") as caught:
        OpenAICaptioner.preflight(config_of(server), (512, 512))
    assert KEY not in str(caught.value)


def test_a_server_that_does_not_answer_is_passed_over_if_another_one_does(
    start: Callable[..., ChatServer], caplog: pytest.LogCaptureFixture
) -> None:
    failing = start(lambda request: refusal(503, "loading"))
    config = config_of(GONE, failing, start())
    OpenAICaptioner.preflight(config, (512, 512))
    for url in (GONE, failing.base_url):
        assert f"the run starts without caption server {url}: " in caplog.text
    with pytest.raises(ServerError, match=rf"{GONE}: APIConnectionError.*status 503.*loading"):
        OpenAICaptioner.preflight(config_of(GONE, failing), (512, 512))
    with pytest.raises(ServerError, match="no list of models"):
        OpenAICaptioner.preflight(config_of(GONE), (512, 512))


def test_a_server_with_another_checkpoint_than_planned_is_an_error(
    start: Callable[..., ChatServer],
) -> None:
    server = start(models=listed(root="/models/a"))
    config = config_of(server)
    assert OpenAICaptioner.digests(config) == {"root": "/models/a"}
    server.models = listed(root="/models/b")
    with pytest.raises(ServerError, match=r"'/models/a' when the run was planned.*'/models/b' now"):
        OpenAICaptioner.preflight(config, (512, 512))
    with pytest.raises(ServerError, match=r"root=/models/c: .*'/models/b' at"):
        OpenAICaptioner.preflight(config_of(server, root="/models/c"), (512, 512))


def signature(config: OpenAIConfig) -> str:
    return CaptionStage(CaptionConfig(backend="openai", openai=config), Weights()).signature()


def test_the_signature_covers_the_root_if_it_is_not_the_models_name(
    start: Callable[..., ChatServer],
) -> None:
    plain = signature(config_of("http://127.0.0.1:9/v1", root="m"))
    assert signature(config_of(start(models=[{"id": "m"}]))) == plain
    assert signature(config_of(start(models=[]))) == plain
    assert signature(config_of(start(models=listed()))) == plain
    assert signature(config_of(start(models=listed("/models/a", name="other")))) == plain
    first = signature(config_of(start(models=listed("/models/a"))))
    second = signature(config_of(start(models=listed("/models/b"))))
    assert len({plain, first, second}) == 3
    assert signature(config_of("http://127.0.0.1:9/v1", root="/models/a")) == first


def test_a_root_is_asked_for_once_in_a_process(start: Callable[..., ChatServer]) -> None:
    server = start(models=listed("/models/a"))
    config = config_of(server)
    first = signature(config)
    server.models = listed("/models/b")
    assert signature(config) == first


def test_servers_with_different_roots_are_an_error(start: Callable[..., ChatServer]) -> None:
    one, two = start(models=listed("/models/a")), start(models=listed("/models/b"))
    with pytest.raises(ServerError, match=r"'/models/a' at .*'/models/b' at .*same checkpoint"):
        signature(config_of(one, two))
    assert signature(config_of(GONE, one)) == signature(config_of(one))


def test_a_signature_without_a_server_is_an_error_that_says_how_to_plan() -> None:
    with pytest.raises(ServerError) as caught:
        signature(config_of(GONE, model="a/b"))
    for part in ("APIConnectionError", "Start the server", "caption.openai.root", "or to a/b"):
        assert part in str(caught.value)


def test_a_picture_that_does_not_fit_during_a_run_is_not_taken_for_a_records_fault(
    start: Callable[..., ChatServer],
) -> None:
    """A record's 512² pixels are 354 tokens. A picture of 256² would fit."""
    server = start(within(300))
    captioner = OpenAICaptioner(config_of(server, max_new_tokens=24))
    with pytest.raises(ServerError, match=r"plain test image failed too.*5369 input tokens"):
        captioner.caption([drawn_record("one")])
