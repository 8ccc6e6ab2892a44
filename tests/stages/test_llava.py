"""The `llava` backend on a tiny checkpoint: its captions must equal those of greedy `generate`."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import astronaut, cat, coffee

from configs.captions import CaptionConfig, LlavaConfig
from configs.common import PlacementConfig
from configs.errors import ConfigError, WeightsError
from stages.backends.llava import Llava
from stages.backends.protocols import Kind
from stages.backends.weights import Weights
from stages.caption import CaptionStage
from stages.codec import encode_jpeg
from stages.record import Record
from tests.stages.records import texts_of
from tests.stages.tiny_llava import PUBLISHED, make_checkpoint

TOKENS = 24
BATCH = 3  # images that go through the model together


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_checkpoint(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def records() -> list[Record]:
    """Three images: a square one, a tall one and a wide one."""
    images = (astronaut(), cat()[:, :150], coffee()[:300])
    return [
        Record(key=f"{n:020x}", source=str(n), image=encode_jpeg(image, 95))
        for n, image in enumerate(images)
    ]


def config_of(model: Path | str, **changes: Any) -> LlavaConfig:
    settings: dict[str, Any] = {"device": "cpu", "max_new_tokens": TOKENS, **changes}
    settings.setdefault("face_max_new_tokens", settings["max_new_tokens"])
    return LlavaConfig(model=str(model), **settings)


def expected_caption(backend: Llava, record: Record, prompt: str) -> str:
    """Returns what `generate` writes for one image and one prompt, without a shared cache."""
    image = Image.fromarray(backend.shown(record, 0)[0])
    inputs = backend.decoder.processor(images=[image], text=[prompt], return_tensors="pt")
    tokens = backend.decoder.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    text: str = backend.decoder.tokenizer.decode(
        tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return text.strip()


def expected_captions(backend: Llava, records: list[Record]) -> list[tuple[str, ...]]:
    return [
        tuple(expected_caption(backend, record, prompt) for prompt in backend.prompts)
        for record in records
    ]


@pytest.mark.parametrize("kind", PUBLISHED)
def test_batched_captions_with_a_shared_prefix_equal_those_of_generate(
    kind: Any, tmp_path: Path, records: list[Record]
) -> None:
    backend = Llava(config_of(make_checkpoint(tmp_path, kind, seed=3)))
    expected = expected_captions(backend, records)
    assert len({text for pair in expected for text in pair}) == 6, (
        "the test needs captions that depend on image and prompt"
    )
    assert texts_of(backend.caption(records, BATCH)) == expected
    assert [pair for record in records for pair in texts_of(backend.caption([record]))] == expected
    kinds: list[Kind] = [1, 0, 1]
    retry_prompts = (backend.config.retry_prompt, backend.config.face_retry_prompt)
    alone = [
        expected_caption(backend, record, backend.decoder.templated(retry_prompts[kind]))
        for record, kind in zip(records, kinds, strict=True)
    ]
    for size in (1, BATCH):
        assert [answer.text for answer in backend.retry(records, kinds, size)] == alone


def test_a_row_that_ends_early_does_not_change_the_others(
    checkpoint: Path, tmp_path: Path, records: list[Record]
) -> None:
    long = Llava(config_of(checkpoint))
    # the fifth generated token becomes another end-of-text token
    tokens = long.decoder.tokenizer(
        expected_caption(long, records[0], long.prompts[1]), add_special_tokens=False
    )["input_ids"]
    model = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    settings = json.loads((model / "generation_config.json").read_text())
    # newer checkpoints have several
    settings["eos_token_id"] = [settings["eos_token_id"], tokens[4]]
    (model / "generation_config.json").write_text(json.dumps(settings))
    backend = Llava(config_of(model))
    expected = expected_captions(backend, records)
    assert len({len(text) for pair in expected for text in pair}) > 1
    assert expected != expected_captions(long, records)
    answers = backend.caption(records, BATCH)
    assert texts_of(answers) == expected
    assert {answer.finish for pair in long.caption(records, BATCH) for answer in pair} == {"length"}
    full = expected_captions(long, records)
    for pair, texts in zip(answers, full, strict=True):
        for answer, text in zip(pair, texts, strict=True):
            assert answer.finish == ("length" if answer.text == text else "stop")


def test_each_image_is_encoded_once_for_both_prompts(
    checkpoint: Path, records: list[Record]
) -> None:
    backend = Llava(config_of(checkpoint))
    encoded: list[int] = []
    inputs: list[tuple[int, ...]] = []
    vision, language = (
        backend.decoder.model.model.vision_tower,
        backend.decoder.model.model.language_model,
    )
    vision.register_forward_pre_hook(lambda _, args: encoded.append(len(args[0])))
    language.register_forward_pre_hook(
        lambda _, __, kw: inputs.append(kw["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    backend.caption(records, BATCH)
    assert encoded == [len(records)]
    (rows, prefix), (both, tail) = inputs[0], inputs[1]
    assert (rows, both) == (len(records), 2 * len(records))
    whole = backend.decoder.processor(
        images=[np.zeros((28, 28, 3), np.uint8)], text=[backend.prompts[0]]
    )["input_ids"][0]
    assert prefix > 16, "the prefix contains the image's 16 tokens"
    assert prefix + tail <= len(whole) + 20, "the tail contains only words of the longer prompt"
    assert all(shape == (2 * len(records), 1) for shape in inputs[2:])


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision", "qwen2_5_vl"])
def test_images_of_equal_length_share_a_batch_and_captions_keep_the_order(
    kind: Any, tmp_path: Path
) -> None:
    shapes = ((56, 112), (84, 84), (56, 112), (84, 84))
    crops = [
        astronaut()[n * 20 :][:high, n * 20 :][:, :wide] for n, (high, wide) in enumerate(shapes)
    ]
    records = [
        Record(key=f"{n:020x}", source=str(n), image=encode_jpeg(crop, 95))
        for n, crop in enumerate(crops)
    ]
    backend = Llava(config_of(make_checkpoint(tmp_path, kind), max_new_tokens=8))
    prefixes: list[torch.Tensor] = []
    prefix = backend.decoder.prefix

    def recording(images: Any, prompts: Any) -> Any:
        inputs, tails = prefix(images, prompts)
        prefixes.append(inputs["attention_mask"])
        return inputs, tails

    backend.decoder.prefix = recording  # type: ignore[method-assign]
    captions = texts_of(backend.caption(records, 2))
    (rows, longest), (others, length) = (mask.shape for mask in prefixes)
    assert rows == others == 2 and longest > length, "the test needs different lengths"
    assert all(bool(mask.all()) for mask in prefixes), "no row is padded"
    assert captions == [pair for record in records for pair in texts_of(backend.caption([record]))]
    assert len(set(captions)) == len(records)


def test_a_call_takes_several_batches_of_records(checkpoint: Path) -> None:
    for size, window in ((8, 32), (1, 1)):
        config = CaptionConfig(
            backend="llava",
            llava=config_of(checkpoint),
            placement=PlacementConfig(batch_size=size),
        )
        assert CaptionStage(config, Weights()).batch_size == window
    # on a GPU, two of the largest batches that the size may rise to
    gpu = config_of(checkpoint, device="cuda:0")
    assert [Llava.window(gpu, size) for size in (1, 8)] == [16, 128]
    assert Llava.window(replace(gpu, memory_share=0.0), 8) == 32


def test_the_error_for_4bit_names_what_is_missing(checkpoint: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"caption\.llava\.quantize='4bit' needs a GPU \(the device here is cpu\)"
    ) as caught:
        Llava(config_of(checkpoint, quantize="4bit"))
    assert ("bitsandbytes" in str(caught.value)) == (
        importlib.util.find_spec("bitsandbytes") is None
    )


def test_sampling_settings_of_a_checkpoint_are_ignored(
    checkpoint: Path, tmp_path: Path, records: list[Record]
) -> None:
    model = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    settings = json.loads((model / "generation_config.json").read_text())
    settings |= {"do_sample": True, "temperature": 2.0, "repetition_penalty": 1.5}
    (model / "generation_config.json").write_text(json.dumps(settings))
    assert texts_of(Llava(config_of(model)).caption(records[:1])) == texts_of(
        Llava(config_of(checkpoint)).caption(records[:1])
    )


def test_a_processor_without_chat_template_gets_that_of_llava_1_5(
    tmp_path: Path, records: list[Record]
) -> None:
    backend = Llava(
        config_of(
            make_checkpoint(tmp_path, chat_template=False), prompt="Who?", face_prompt="Which eyes?"
        )
    )
    assert backend.prompts == (
        "USER: <image>\nWho? ASSISTANT:",
        "USER: <image>\nWhich eyes? ASSISTANT:",
    )
    assert texts_of(backend.caption(records, BATCH)) == expected_captions(backend, records)


def test_equal_prompts_give_equal_captions(checkpoint: Path, records: list[Record]) -> None:
    backend = Llava(config_of(checkpoint, prompt="Describe.", face_prompt="Describe."))
    coarse, fine = texts_of(backend.caption(records[:1]))[0]
    assert coarse == fine == expected_caption(backend, records[0], backend.prompts[0])


def test_dtype_is_that_of_the_loaded_model(checkpoint: Path, records: list[Record]) -> None:
    backend = Llava(config_of(checkpoint, dtype="bfloat16"))
    assert backend.decoder.model.dtype == torch.bfloat16
    assert all(text for text in texts_of(backend.caption(records[:1]))[0])


def test_the_digest_depends_on_the_weights_and_not_on_the_folder(
    checkpoint: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(checkpoint, tmp_path / "moved"))
    (moved / "README.md").write_text("captions don't depend on it")
    assert Llava.digests(config_of(moved)) == Llava.digests(config_of(checkpoint))
    data = bytearray((moved / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (moved / "model.safetensors").write_bytes(data)
    assert Llava.digests(config_of(moved)) != Llava.digests(config_of(checkpoint))


@pytest.mark.slow
def test_a_snapshot_in_the_hub_cache_is_identified_by_its_commit_and_loaded(
    checkpoint: Path, tmp_path: Path
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(checkpoint, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = (
        "from configs.captions import LlavaConfig; from stages.backends.llava import Llava\n"
        "config = LlavaConfig(model='someone/tiny', device='cpu')\n"
        "print(Llava.digests(config)['checkpoint'], type(Llava(config).decoder.model).__name__)"
    )
    # huggingface_hub reads these variables at import
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert process.stdout.split() == [commit, "LlavaForConditionalGeneration"], process.stderr


def test_a_missing_model_is_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"caption\.llava\.model is empty"):
        Llava(config_of(""))
    with pytest.raises(WeightsError, match="no such folder"):
        Llava(config_of(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match="safetensors"):
        Llava(config_of(tmp_path))
    # no server listens on this port
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(WeightsError, match="hf download someone/absent"):
        Llava(config_of("someone/absent"))


def test_a_checkpoint_of_another_kind_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    (model / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(WeightsError, match="image-text-to-text"):
        Llava(config_of(model))
