"""Reading a photograph: conditions equal to a shard's, saved identities, and errors."""

from __future__ import annotations

import hashlib
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from configs.errors import ConfigError, FaceError, SourceError
from configs.schema import DatasetConfig
from infer.adapter import reading_config
from infer.generate import generate
from infer.identity import Identity
from infer.load import load_pipeline
from infer.photo import photo_record, read_photo
from infer.pipelines import ConsistentIDPipeline
from model.checkpoint import read_adapter, write_adapter
from model.conditions import Conditions, build_conditions, photo_images
from stages.base import run_stage
from stages.chain import build_stages
from stages.codec import encode_jpeg
from stages.record import Record, from_table, key_of, to_table
from stages.storage.samples import from_members, to_members
from tests.infer.helpers import small


def differing(one: Conditions, other: Conditions) -> list[str]:
    """Returns the names of the fields that aren't bitwise equal."""
    pairs = {
        field.name: (getattr(one, field.name), getattr(other, field.name))
        for field in fields(Conditions)
    }
    return [
        name
        for name, (a, b) in pairs.items()
        if not (torch.equal(a, b) if torch.is_tensor(a) else a == b)
    ]


@pytest.fixture(scope="module")
def from_shard(photo: Path) -> Record:
    """The photograph's record as in a shard: Arrow rows between stages, then a sample's members."""
    data = photo.read_bytes()
    record = Record(
        key=key_of(photo.name),
        source=photo.name,
        sha256=hashlib.sha256(data).hexdigest(),
        image=data,
    )
    for stage in build_stages(DatasetConfig()):
        stage.setup()
        [record] = from_table(to_table(run_stage(stage, [record])))
    return from_members(to_members(record, ()))


@pytest.mark.parametrize("prompt", ["a person in a garden", "", "a very long story, " * 40])
def test_conditions_of_a_shard_equal_those_of_inference(
    pipe: ConsistentIDPipeline, person: Identity, from_shard: Record, prompt: str
) -> None:
    model, tokenizer = pipe.adapter.model, pipe.adapter.marked(pipe.tokenizer)
    caption = from_shard.face_caption
    tokens, _ = pipe.prompt_text(person, prompt, caption)
    expected = build_conditions(
        from_shard, tokenizer, model.spec, model.mode, prompt=prompt, resolution=64
    )
    assert expected.regions, "without a region this comparison would be trivial"
    for name in ("text", "regions", "dropped"):
        assert getattr(tokens, name) == getattr(expected, name), name
    for name in ("input_ids", "input_ids_2", "token_mask", "token_idx", "token_valid"):
        assert torch.equal(getattr(tokens, name), getattr(expected, name)), name


def test_an_identity_of_a_shards_record_equals_the_photographs(
    pipe: ConsistentIDPipeline, person: Identity, from_shard: Record
) -> None:
    again = pipe.encode_identity(from_shard)
    assert again.regions == person.regions and again.embedder == person.embedder
    for name in ("clip_hidden", "region_hidden", "zero_hidden", "embedding"):
        assert torch.equal(getattr(again, name), getattr(person, name)), name


def test_images_of_an_identity_are_those_of_training(
    pipe: ConsistentIDPipeline, from_shard: Record
) -> None:
    """The image encoder reads the same pixels of the photograph and of each region."""
    model, tokenizer = pipe.adapter.model, pipe.adapter.marked(pipe.tokenizer)
    sample = build_conditions(from_shard, tokenizer, model.spec, model.mode, resolution=64)
    photo, regions = photo_images(from_shard, model.spec, model.mode)
    assert torch.equal(photo, sample.photo) and sample.regions
    for name, image in zip(sample.regions, sample.region_images, strict=False):
        assert torch.equal(regions[name], image), name


def test_differing_lists_the_fields_that_differ(
    pipe: ConsistentIDPipeline, person: Identity, stranger: Identity
) -> None:
    spec, mode = pipe.adapter.model.spec, pipe.adapter.model.mode
    one, other = (
        build_conditions(
            each.record, pipe.adapter.marked(pipe.tokenizer), spec, mode, prompt=p, resolution=64
        )
        for each, p in ((person, "a"), (stranger, "a b"))
    )
    assert {"key", "text", "input_ids", "region_images", "photo", "identity"} <= set(
        differing(one, other)
    )


def test_training_conditions_of_an_identitys_record_equal_the_shards(
    pipe: ConsistentIDPipeline, person: Identity, from_shard: Record
) -> None:
    spec, mode = pipe.adapter.model.spec, pipe.adapter.model.mode
    tokenizer = pipe.adapter.marked(pipe.tokenizer)
    one, other = (
        build_conditions(r, tokenizer, spec, mode, resolution=64)
        for r in (person.record, from_shard)
    )
    assert differing(one, other) == []


def test_a_saved_identity_is_the_same_person(
    pipe: ConsistentIDPipeline, adapter: Path, person: Identity, tmp_path: Path
) -> None:
    loaded = Identity.load(person.save(tmp_path / "deep" / "ada.safetensors"))
    for name in ("mode", "spec", "embedder", "regions"):
        assert getattr(loaded, name) == getattr(person, name), name
    for name in ("clip_hidden", "region_hidden", "zero_hidden", "embedding"):
        assert torch.equal(getattr(loaded, name), getattr(person, name)), name
    assert abs(float(loaded.embedding.norm()) - 1) < 1e-3
    settings = small(adapter, prompts=("a",))
    one, other = (next(generate(pipe, p, settings)).pixels for p in (person, loaded))
    assert np.array_equal(one, other)


def test_several_photographs_of_a_person_give_the_mean_embedding(
    pipe: ConsistentIDPipeline, person: Identity, stranger: Identity
) -> None:
    both = pipe.encode_identity([person.record, stranger.record])
    mean = person.embedding + stranger.embedding
    assert torch.allclose(both.embedding, mean / mean.norm(), atol=1e-6)
    assert torch.equal(both.region_hidden, person.region_hidden)


def test_files_that_hold_no_identity_are_errors(tmp_path: Path, photo: Path) -> None:
    with pytest.raises(SourceError, match="no identity at"):
        Identity.load(tmp_path / "none.safetensors")
    with pytest.raises(SourceError, match="holds no identity"):
        Identity.load(photo)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(SourceError, match="its format is None"):
        Identity.load(tmp_path / "other.safetensors")


def test_an_identity_that_does_not_fit_the_adapter_is_refused(
    pipe: ConsistentIDPipeline, person: Identity, legacy_adapter: Path
) -> None:
    legacy = load_pipeline(small(legacy_adapter))
    cases = [
        (legacy, person, "made in corrected mode, the adapter is of legacy mode"),
        (legacy, replace(person, mode="legacy", spec="sdxl"), "made for sdxl"),
        (pipe, replace(person, embedder="0" * 64), "by a face embedder with sha256 000000000000"),
        (pipe, replace(person, clip_hidden=person.clip_hidden[:, :9]), "another image encoder"),
        (pipe, replace(person, zero_hidden=-person.zero_hidden), "another image encoder than"),
    ]
    for each, other, message in cases:
        with pytest.raises(ConfigError, match=message):
            each("a", identity=other, num_inference_steps=2)


def test_paths_that_are_no_photograph_are_source_errors(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no photograph at"):
        read_photo(tmp_path / "none.jpg")
    with pytest.raises(SourceError, match="is a folder"):
        read_photo(tmp_path)


def test_an_image_without_a_face_is_a_face_error(
    pipe: ConsistentIDPipeline, tmp_path: Path
) -> None:
    gradient = np.linspace(0, 255, 256, dtype=np.uint8)
    image = np.repeat(np.repeat(gradient[None, :, None], 256, 0), 3, 2)
    path = tmp_path / "sky.jpg"
    path.write_bytes(encode_jpeg(image, 90))
    with pytest.raises(
        FaceError, match=rf"no face found in {path} .*Give a photograph that shows one face"
    ):
        pipe.encode_identity(path)


@pytest.mark.parametrize(
    ("name", "length", "message"),
    [
        ("page.jpg", None, "is not an image"),
        ("none.jpg", 0, "empty file"),
        ("half.jpg", 20_000, "truncated"),
    ],
)
def test_broken_images_are_source_errors(
    pipe: ConsistentIDPipeline, photo: Path, name: str, length: int | None, message: str
) -> None:
    data = b"<html>sign in</html>" if length is None else photo.read_bytes()[:length]
    with pytest.raises(SourceError, match=rf"{name} .*{message}"):
        pipe.encode_identity(photo_record(data, name))


def test_the_stages_configuration_comes_from_the_checkpoint(adapter: Path, tmp_path: Path) -> None:
    folder, other = tmp_path / "own", tmp_path / "other.yaml"
    folder.mkdir()
    for name in ("adapter.safetensors", "adapter.json"):
        (folder / name).write_bytes((adapter / name).read_bytes())
    file = read_adapter(folder)
    assert reading_config(folder, file) == DatasetConfig()
    (folder / "dataset.yaml").write_text("resize: {size: 256}\n")
    other.write_text("resize: {size: 384}\n")
    assert reading_config(folder, file).resize.size == 256
    assert reading_config(folder, file, other).resize.size == 384


def test_published_weights_get_the_embedder_of_their_training_in_either_form(
    adapter: Path, tmp_path: Path
) -> None:
    published = tmp_path / "ConsistentID-v1.safetensors"
    published.write_bytes((adapter / "adapter.safetensors").read_bytes())
    file = read_adapter(published)
    converted = write_adapter(tmp_path / "ours", file.state, file.spec, file.mode, file.config)
    for source in (published, converted):
        config = reading_config(source, read_adapter(source))
        assert (config.detect.weights, config.embed.weights) == ("det_10g", "w600k_r50")
