"""Reading a photograph: conditions equal to a shard's, saved identities, and errors."""

from __future__ import annotations

import hashlib
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from configs.errors import ConfigError, FaceError, SourceError
from configs.portraits import InferConfig
from configs.schema import DatasetConfig
from infer.generator import ConsistentIDGenerator
from infer.identity import Identity, photo_record, read_photo
from infer.load import dataset_config, load_generator
from model.conditions import Conditions, build_conditions
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
    generator: ConsistentIDGenerator, person: Identity, from_shard: Record, prompt: str
) -> None:
    model, base = generator.model, generator.base
    expected = build_conditions(
        from_shard,
        base.tokenizer,
        model.spec,
        model.mode,
        prompt=prompt,
        resolution=model.spec.resolution,
    )
    assert expected.regions, "without a region this comparison would be trivial"
    assert differing(generator.conditions(person, prompt), expected) == []


def test_differing_lists_the_fields_that_differ(
    generator: ConsistentIDGenerator, person: Identity, stranger: Identity
) -> None:
    names = differing(generator.conditions(person, "a"), generator.conditions(stranger, "a b"))
    assert {"key", "text", "input_ids", "region_images", "photo", "identity"} <= set(names)


def test_training_conditions_of_an_identitys_record_equal_the_shards(
    generator: ConsistentIDGenerator, person: Identity, from_shard: Record
) -> None:
    spec, mode, tokenizer = generator.model.spec, generator.model.mode, generator.base.tokenizer
    one, other = (
        build_conditions(r, tokenizer, spec, mode, resolution=64)
        for r in (person.record, from_shard)
    )
    assert differing(one, other) == []


def test_a_saved_identity_is_the_same_person(
    generator: ConsistentIDGenerator, person: Identity, tmp_path: Path
) -> None:
    loaded = Identity.load(person.save(tmp_path / "deep" / "ada.safetensors"))
    assert differing(generator.conditions(person, "a"), generator.conditions(loaded, "a")) == []
    assert (loaded.mode, loaded.regions) == (person.mode, person.regions)
    for name in ("clip_hidden", "region_hidden", "encoder_fingerprint", "embedding"):
        assert torch.equal(getattr(loaded, name), getattr(person, name)), name
    assert abs(float(loaded.embedding.norm()) - 1) < 1e-3
    one, other = (next(generator.generate(p, "a")).pixels for p in (person, loaded))
    assert np.array_equal(one, other)


def test_files_that_hold_no_identity_are_errors(tmp_path: Path, photo: Path) -> None:
    with pytest.raises(SourceError, match="no identity at"):
        Identity.load(tmp_path / "none.safetensors")
    with pytest.raises(SourceError, match="holds no identity"):
        Identity.load(photo)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(SourceError, match="its format is None"):
        Identity.load(tmp_path / "other.safetensors")


def test_an_identity_of_another_mode_or_image_encoder_is_refused(
    generator: ConsistentIDGenerator, person: Identity, legacy_adapter: Path, tmp_path: Path
) -> None:
    legacy = load_generator(small(legacy_adapter))
    with pytest.raises(ConfigError, match="made in corrected mode, the adapter is of legacy mode"):
        next(legacy.generate(person, "a"))
    saved = Identity.load(person.save(tmp_path / "person.safetensors"))
    saved.encoder_fingerprint.neg_()
    with pytest.raises(ConfigError, match="another image encoder"):
        next(generator.generate(saved, "a"))


def test_paths_that_are_no_photograph_are_source_errors(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no photograph at"):
        read_photo(tmp_path / "none.jpg")
    with pytest.raises(SourceError, match="is a folder"):
        read_photo(tmp_path)


def test_an_image_without_a_face_is_a_face_error(
    generator: ConsistentIDGenerator, tmp_path: Path
) -> None:
    gradient = np.linspace(0, 255, 256, dtype=np.uint8)
    image = np.repeat(np.repeat(gradient[None, :, None], 256, 0), 3, 2)
    path = tmp_path / "sky.jpg"
    path.write_bytes(encode_jpeg(image, 90))
    with pytest.raises(
        FaceError, match=rf"no face found in {path} .*Give a photograph that shows one face"
    ):
        generator.identity(path)


@pytest.mark.parametrize(
    ("name", "length", "message"),
    [
        ("page.jpg", None, "is not an image"),
        ("none.jpg", 0, "empty file"),
        ("half.jpg", 20_000, "truncated"),
    ],
)
def test_broken_images_are_source_errors(
    generator: ConsistentIDGenerator, photo: Path, name: str, length: int | None, message: str
) -> None:
    data = b"<html>sign in</html>" if length is None else photo.read_bytes()[:length]
    with pytest.raises(SourceError, match=rf"{name} .*{message}"):
        generator.identity(photo_record(data, name))


def test_the_stages_configuration_comes_from_the_checkpoint(adapter: Path, tmp_path: Path) -> None:
    folder, other = tmp_path / "own", tmp_path / "other.yaml"
    folder.mkdir()
    for name in ("adapter.safetensors", "adapter.json"):
        (folder / name).write_bytes((adapter / name).read_bytes())
    assert dataset_config(InferConfig(adapter=str(folder))) == DatasetConfig()
    (folder / "dataset.yaml").write_text("resize: {size: 256}\n")
    other.write_text("resize: {size: 384}\n")
    assert dataset_config(InferConfig(adapter=str(folder))).resize.size == 256
    assert dataset_config(InferConfig(adapter=str(folder), dataset=str(other))).resize.size == 384


def test_published_weights_get_the_embedder_of_their_training(
    adapter: Path, tmp_path: Path
) -> None:
    published = tmp_path / "ConsistentID-v1.safetensors"
    published.write_bytes((adapter / "adapter.safetensors").read_bytes())
    assert dataset_config(InferConfig(adapter=str(published))).embed.weights == "w600k_r50"
