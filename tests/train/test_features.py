"""Reading features: equal training with and without them, and nothing that is stale."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import ConfigError
from configs.load import load
from configs.schema import DatasetConfig
from configs.training import TrainConfig
from pipelines.takedown import by_source, take_down
from stages.storage.reader import DatasetReader
from stages.storage.store import Store
from tests.train.featured import KINDS, features, losses, make, opened, paired, rewrite
from tests.train.helpers import Listener, Parts, run, same, weights
from train.batch_maker import BatchMaker
from train.data import unpacked
from train.features import kinds
from train.history import read_lines
from train.mixture import Mixture, open_mixture
from train.replay import replay
from train.shards import ShardSet
from train.step import frozen_features
from train.trainer import Trainer


@pytest.fixture(scope="module")
def uncached(people: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that encodes each sample alone."""
    output = tmp_path_factory.mktemp("uncached") / "run"
    run(paired(people, tiny_base, output))
    return output


@pytest.fixture
def own(featured: Path, tmp_path: Path) -> Path:
    """A copy of it, which the test may change."""
    return Path(shutil.copytree(featured, tmp_path / "data"))


def folder_of(kind: str, data: Path) -> Path:
    return next(data.glob(f"features/{kind}-*"))


def test_float32_features_give_the_bits_of_a_run_that_encodes_each_sample_alone(
    featured: Path, uncached: Path, tiny_base: Path, tmp_path: Path
) -> None:
    config = paired(featured, tiny_base, tmp_path / "cached", num_workers=1)
    listener = Listener()
    cached = run(config, listener)
    for kind in KINDS:
        assert any(f"features: {kind} is read (float32" in text for text in listener.messages)
    assert losses(tmp_path / "cached") == losses(uncached)
    assert cached.adapter
    assert same(weights(uncached / "final"), weights(cached.adapter))
    # ignored on request, though they are there
    run(replace(config, features=features(use=False), output=str(tmp_path / "ignored")))
    assert losses(tmp_path / "ignored") == losses(uncached)


def test_float16_features_give_nearly_the_same_losses(
    people: Path, uncached: Path, tiny_base: Path, tmp_path: Path
) -> None:
    half = Path(shutil.copytree(people, tmp_path / "data"))
    config = paired(half, tiny_base, tmp_path / "cached", features=features("float16"))
    make(config)
    run(config)
    pairs = zip(losses(tmp_path / "cached"), losses(uncached), strict=True)
    for with_features, without in pairs:
        assert with_features == pytest.approx(without, rel=2e-3)
    assert losses(tmp_path / "cached") != losses(uncached)


@pytest.mark.parametrize("pair_prob", [0, 0.5])
def test_the_encoders_of_features_that_are_read_take_no_memory_and_do_not_run(
    featured: Path, tiny_base: Path, tmp_path: Path, pair_prob: float
) -> None:
    config = paired(featured, tiny_base, tmp_path / "cached", pair_prob=pair_prob)
    with ExitStack() as stack:
        trainer = Trainer(config, Listener(), stack)
        base = trainer.frozen.base
        freed = [base.vae, base.image_encoder, *([] if pair_prob else [base.text_encoder])]
        for encoder in freed:
            assert {p.device.type for p in encoder.parameters()} == {"meta"}
        assert pair_prob == 0 or next(base.text_encoder.parameters()).device.type == "cpu"
        loaded = trainer._batches()
        batches = [next(loaded) for _ in range(8)]
        loaded.close()
    for batch in batches:
        assert batch.moments is not None and batch.hidden is not None
        assert batch.pixels.numel() == batch.clip_images.numel() == 0
    stored, encoded = (
        sum(len(rows) for batch in batches if (rows := getattr(batch, name)) is not None)
        for name in ("texts", "encoded_texts")
    )
    assert stored and bool(encoded) == bool(pair_prob)


def texts(config: TrainConfig, parts: Parts, mixture: Mixture, count: int) -> torch.Tensor:
    """The states of the texts of a run's first samples, with the features that it reads."""
    maker = BatchMaker(mixture, mixture.order(config.seed), parts.preparation, opened(config)[0])
    batch = unpacked(maker(range(count)), parts.preparation, "cpu")
    return frozen_features(parts.frozen, batch).text_hidden


@pytest.mark.parametrize("mode", ["corrected", "legacy"])
def test_each_sample_has_the_states_of_its_own_text_also_in_pairs(
    own: Path, tiny_base: Path, tmp_path: Path, mode: Any
) -> None:
    config = paired(own, tiny_base, tmp_path / "none", pair_prob=0.8)
    config = replace(
        config, features=features(kinds=("text",)), model=replace(config.model, mode=mode)
    )
    make(config)
    mixture = open_mixture(config, None)
    parts = Parts(config, mixture)
    read = texts(config, parts, mixture, 48)
    plain = replace(config, features=features(use=False))
    assert torch.equal(read, texts(plain, parts, mixture, 48))
    assert len(read.unique(dim=0)) > 9  # eight samples, the empty text, and others of pairs


def test_features_that_do_not_fit_are_not_used_and_the_log_says_why(
    featured: Path, tiny_base: Path, tmp_path: Path
) -> None:
    config = paired(featured, tiny_base, tmp_path / "run")

    def answer(changed: TrainConfig, kind: str) -> str:
        """Returns the message about a kind that isn't used. All other kinds must be used."""
        sets, messages = opened(changed)
        assert kind not in sets
        return next(text for text in messages if f"{kind} isn't used" in text)

    larger = replace(config, resolution=64)
    assert "has resolution 32, this run needs 64" in answer(larger, "vae")
    assert [*opened(larger)[0]] == ["image", "text"]
    half = replace(config, features=features("float16"))
    assert "has dtype 'float32', this run needs 'float16'" in answer(half, "vae")
    legacy = replace(config, model=replace(config.model, mode="legacy"))
    assert "has mode 'corrected', this run needs 'legacy'" in answer(legacy, "text")
    assert [*opened(legacy)[0]] == ["vae"]

    # other weights, and another tokenizer
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    other = replace(config, model=replace(config.model, base=str(base)))
    assert [*opened(other)[0]] == [*KINDS]  # wherever it is
    for part, kind in (("vae", "vae"), ("text_encoder", "text")):
        file = next((base / part).glob("*.safetensors"))
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        assert "has encoder '" in answer(other, kind)
    shutil.copytree(tiny_base / "text_encoder", base / "text_encoder", dirs_exist_ok=True)
    assert "text" in opened(other)[0]
    with (base / "tokenizer/tokenizer_config.json").open("a") as settings:
        settings.write("\n")
    assert "has tokenizer '" in answer(other, "text")


def remove_a_sample(data: Path) -> str:
    """Takes down the first sample of a shard; returns its key."""
    store, settings = (
        Store(str(data)),
        load(DatasetConfig, data / "config.yaml", [f"output={data}"]),
    )
    record = next(DatasetReader(store).samples(1))
    take_down(store, settings, by_source(store, record.source), "source", "")
    return record.key


def test_features_of_a_shard_that_changed_are_removed_and_made_again(
    own: Path, tiny_base: Path, tmp_path: Path
) -> None:
    config = paired(own, tiny_base, tmp_path / "run", pair_prob=0)
    folders = [folder_of(kind, own) for kind in KINDS]
    key = remove_a_sample(own)
    for folder in folders:
        assert not [*folder.glob("shards/fgid-000001.*")]
        assert not [p for p in folder.rglob("*") if p.is_file() and key.encode() in p.read_bytes()]
    sets, messages = opened(config)
    assert not sets and len(messages) == len(KINDS)
    for text in messages:
        assert "has no features of the present samples of 1 of 3 shards" in text

    before = {path: path.read_bytes() for path in folders[0].glob("shards/*")}
    assert make(config) == folders
    for path, content in before.items():
        assert path.read_bytes() == content
    assert [*opened(config)[0]] == [*KINDS]


def test_a_changed_caption_makes_its_features_stale_even_if_they_are_put_back(
    own: Path, tiny_base: Path, tmp_path: Path
) -> None:
    config = paired(own, tiny_base, tmp_path / "none")
    before = Path(shutil.copytree(own / "features", tmp_path / "before"))
    key = ShardSet(str(own)).key(0)
    rewrite(own, lambda r: replace(r, caption="a poster") if r.key == key else r)
    shutil.copytree(before, own / "features", dirs_exist_ok=True)
    sets, messages = opened(config)
    assert not sets
    assert all("of the present samples of 1 of 3 shards" in text for text in messages)


def test_states_of_other_tokens_than_a_samples_are_never_read(
    people: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if another version of the program, which didn't raise the kind's version, made them."""
    own = Path(shutil.copytree(people, tmp_path / "data"))
    config = paired(own, tiny_base, tmp_path / "none", pair_prob=0)
    config = replace(config, features=features(kinds=("text",)))
    with monkeypatch.context() as patch:
        real = kinds.training_text
        patch.setattr(kinds, "training_text", lambda caption, *rest: real(f"so {caption}", *rest))
        make(config)
    mixture = open_mixture(config, None)
    parts = Parts(config, mixture)
    maker = BatchMaker(mixture, mixture.order(3), parts.preparation, opened(config)[0])
    batch = maker(range(8))
    assert len(batch.bad) == 8 and batch.texts is None
    assert "a text with other tokens" in batch.bad[0].reason


def test_features_that_appear_during_a_run_are_refused_unless_they_are_accepted(
    people: Path, tiny_base: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(people, tmp_path / "data"))
    config = paired(own, tiny_base, tmp_path / "run", max_train_steps=2)
    run(config)
    make(config)
    more = replace(config, max_train_steps=4)
    with pytest.raises(ConfigError, match=r"features that were read: none, now vae-.*\[features\]"):
        run(more)
    assert run(replace(more, accept_changes=("features",))).step == 4
    # a replay reads them too
    answer = replay(tmp_path / "run", 3, images=tmp_path / "pictures")
    assert len([*(tmp_path / "pictures").iterdir()]) == 2
    assert answer.equal and not answer.notes
    # and not where the run didn't
    assert replay(tmp_path / "run", 1).equal


@pytest.mark.parametrize("kind", ["vae", "text"])
def test_a_damaged_feature_costs_its_sample_alone(
    own: Path, tiny_base: Path, tmp_path: Path, kind: str
) -> None:
    config = paired(own, tiny_base, tmp_path / "run", pair_prob=0)
    folder = folder_of(kind, own)
    place = ShardSet(str(folder)).place(2)
    with (folder / "shards" / place.tar).open("r+b") as tar:
        tar.seek(place.offset + place.size // 2)
        tar.write(b"spoiled")
    if kind == "vae":
        run(replace(config, max_bad_share=0.2))
        (line, *_) = read_lines(tmp_path / "run/skipped.jsonl")
        assert line["key"] == place.key and "not those written" in line["reason"]
        return
    mixture = open_mixture(config, None)
    parts = Parts(config, mixture)
    maker = BatchMaker(mixture, mixture.order(3), parts.preparation, opened(config)[0])
    batch = maker(range(8))
    assert [bad.key for bad in batch.bad] == [place.key]
    assert "not those written" in batch.bad[0].reason
