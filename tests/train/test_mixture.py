"""Several data sets behind one numbering: samples, people, shares, and what can't be mixed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from configs.errors import ConfigError, ShardError
from configs.training import DataSource
from model.spec import Embedder
from stages.record import Record
from tests.train.conftest import Mixed
from tests.train.helpers import Listener, keys, run, small, sources, with_people
from train.mixture import Mixture
from train.shards import ShardSet


def test_samples_of_several_data_sets_are_numbered_through_and_read_in_order(
    mixed: Mixed, data: Path
) -> None:
    mixture = Mixture(mixed.sources)
    parts = [ShardSet(source.path) for source in mixed.sources]
    assert keys(mixture) == [key for part in parts for key in keys(part)]
    assert len(mixture) == 8 + 5 + 8
    numbers = [20, 3, 9, 0, 12, 3]
    records = mixture.records(numbers)
    assert [r.key for r in records if isinstance(r, Record)] == [mixture.key(n) for n in numbers]
    first = keys(parts[0])[0]
    assert mixture.numbers(first) == [0, 8, 13] and mixture.numbers("none") == []
    assert mixture.numbers(keys(parts[0])[3]) == [3, 16]  # its shard is not in the second one
    assert mixture.shard_of(12) == f"{mixed.sources[1].path}/shards/fgid-000002.tar"
    assert Mixture(mixed.sources[:1]).shard_of(0) == "fgid-000000.tar"
    assert mixture.dataset_config() == (data / "config.yaml").read_text()


def test_other_samples_of_a_person_are_those_of_its_own_data_set(mixed: Mixed) -> None:
    mixture = Mixture(mixed.sources)
    assert mixed.people == ("abababcc", "aabbc", "aaaabcde")
    assert [*map(mixture.others, (0, 6, 8, 10, 12, 14, 20))] == [
        *([2, 4], [7], [9], [11], []),
        *([13, 15, 16], []),
    ]
    assert mixture.with_others == 8 + 4 + 4


def test_the_digest_changes_with_all_that_changes_the_sequence(
    mixed: Mixed, data: Path, tmp_path: Path
) -> None:
    one, two, _ = (source.path for source in mixed.sources)

    def digest(*weights: float, paths: tuple[str, ...] = (one, two), pairs: float = 0) -> str:
        weighted = [DataSource(path=p, weight=w) for p, w in zip(paths, weights, strict=True)]
        return Mixture(weighted, pair_prob=pairs).digest

    assert digest(2, 1) == digest(4, 2) != digest(3, 1)
    assert digest(8, 5) == Mixture(sources(Path(one), Path(two))).digest
    assert digest(1, 2, paths=(two, one)) != digest(2, 1)
    assert digest(1, paths=(one,)) == digest(7, paths=(one,)) == ShardSet(one).digest
    # the same samples with other people: a difference only where there are pairs
    others = str(with_people(data, tmp_path / "others", "aabbccdd"))
    assert digest(1, paths=(others,)) == digest(1, paths=(one,))
    assert digest(1, paths=(others,), pairs=0.5) != digest(1, paths=(one,), pairs=0.5)


def test_data_sets_with_other_models_for_the_face_are_refused(data: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "copy"))
    assert len(Mixture(sources(data, copy, Path("tests/data/dataset_v2")))) > 16
    info = json.loads((copy / "dataset.json").read_text())
    [weights] = [each for each in info["weights"] if each["name"] == "w600k_mbf"]
    weights["sha256"] = "1234567890ab" + weights["sha256"][12:]
    (copy / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(ConfigError) as error:
        Mixture(sources(data, copy))
    own = weights["sha256"]
    assert Mixture(sources(copy)).embedder() == Embedder(name="w600k_mbf", sha256=own)
    assert Mixture(sources(data)).embedder() != Mixture(sources(copy)).embedder()
    assert f"in {data}, arcface 2 w600k_mbf 1234567890ab in {copy}" in str(error.value)
    assert "detect:" not in str(error.value)
    (copy / "dataset.json").write_text('{"weights": [1]}')
    with pytest.raises(ShardError, match=f"{copy}: dataset.json and config.yaml don't state"):
        Mixture(sources(data, copy))
    assert Mixture(sources(copy)).embedder() is None


def test_a_step_that_needs_samples_twice_is_refused_before_the_start(
    mixed: Mixed, tiny_base: Path, tmp_path: Path
) -> None:
    config = small(mixed.sources, tiny_base, tmp_path / "out", global_batch_size=22)
    with pytest.raises(ConfigError, match="has 21 samples, fewer than global_batch_size=22"):
        run(config)
    one, two, _ = (source.path for source in mixed.sources)
    mixture = Mixture([DataSource(path=one, weight=1), DataSource(path=two, weight=3)])
    mixture.check_step(6)
    with pytest.raises(ConfigError, match=r"has 5 samples, fewer than its share of a step, 6\.0"):
        mixture.check_step(8)


def test_pairs_need_a_person_with_two_samples(data: Path, tmp_path: Path) -> None:
    # of the eight portraits, all of other people
    assert Mixture(sources(data)).with_others == 0
    with pytest.raises(ConfigError, match=r"pair_prob=0\.5 needs people .* with split=train"):
        Mixture(sources(data), "train", pair_prob=0.5)
    people = with_people(data, tmp_path / "people", "aabbccdd")
    assert Mixture(sources(data, people), pair_prob=0.5).with_others == 8
    (people / "identities.parquet").unlink()
    with pytest.raises(ConfigError, match=r"make dataset has run to its end"):
        Mixture(sources(data, people), pair_prob=0.5)


def test_a_run_names_shares_and_pairs_at_its_start(
    mixed: Mixed, tiny_base: Path, tmp_path: Path
) -> None:
    listener = Listener()
    config = small(mixed.sources, tiny_base, tmp_path / "out", pair_prob=0.5, max_train_steps=1)
    run(config, listener)
    one, two, three = (source.path for source in mixed.sources)
    assert listener.messages[:2] == [
        f"{one}: 8 samples, 50.0% of the positions; {two}: 5 samples, 16.7% of the positions; "
        f"{three}: 8 samples, 33.3% of the positions; "
        "16 of 21 samples have another of the same person",
        "2 samples a step = 1 process × 2, on cpu",
    ]
