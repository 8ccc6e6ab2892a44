"""Pairs: which sample gives the conditions of another, and what is taken of each of the two."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from configs.training import DataSource
from model.conditions import Conditions, DropRates, build_conditions
from model.pixels import training_pixels
from model.spec import SPECS
from stages.codec import decode_labels, encode_labels
from stages.record import Record
from stages.regions import Mode, region_masks
from tests.train.conftest import Mixed
from tests.train.helpers import Parts, assert_same_rows, run, small
from train.batch_maker import BatchMaker, Fetched
from train.data import unpacked
from train.history import read_lines
from train.mixture import Mixture
from train.shards import ShardSet


def test_a_reference_is_another_sample_of_the_person_at_the_given_rate(mixed: Mixed) -> None:
    mixture = Mixture(mixed.sources, pair_prob=0.3)
    order = mixture.order(3)
    pairs = mixture.pairs(order)
    references = [(order.sample(p), pairs.reference(p)) for p in range(4_000)]
    with_others = [pair for pair in references if mixture.others(pair[0])]
    changed = Counter(pair for pair in with_others if pair[0] != pair[1])
    assert 0.27 < changed.total() / len(with_others) < 0.33  # four standard deviations
    expected = {(n, other) for n in range(len(mixture)) for other in mixture.others(n)}
    assert {*changed} == expected and all(reference == n for n, reference in references if n == 12)
    # of three others of a person, none is preferred
    uses = [changed[13, other] for other in mixture.others(13)]
    assert max(uses) < 2 * min(uses)


def test_the_positions_of_a_reference_are_those_at_which_it_is_one(mixed: Mixed) -> None:
    mixture = Mixture(mixed.sources, pair_prob=0.5)
    order = mixture.order(5)
    pairs = mixture.pairs(order)
    used = [(order.sample(p), pairs.reference(p)) for p in range(1_500)]
    for number in range(len(mixture)):
        expected = [p for p, (n, reference) in enumerate(used) if reference == number != n]
        assert sorted(pairs.positions(number, len(used))) == expected
    assert not [*Mixture(mixed.sources).pairs(order).positions(0, 1_500)]


def records(mixture: Mixture, *numbers: int) -> list[Record]:
    read = mixture.records(numbers)
    assert all(isinstance(record, Record) for record in read)
    return [record for record in read if isinstance(record, Record)]


@pytest.mark.parametrize("mode", ["corrected", "legacy"])
def test_a_pair_has_the_text_of_one_photograph_and_the_person_of_the_other(
    mixture: Mixture, parts: Parts, mode: Mode
) -> None:
    def names(record: Record) -> tuple[str, ...]:
        return tuple(region_masks(decode_labels(record.parsing), mode))

    def conditions(of: Record, reference: Record | None = None) -> Conditions:
        tokenizer = parts.preparation.tokenizer
        return build_conditions(
            of, tokenizer, SPECS["tiny"], mode, resolution=32, reference=reference
        )

    record, *others = records(mixture, *range(8))
    reference = next(other for other in others if names(other) == names(record))
    captions = {"caption": record.caption, "face_caption": record.face_caption}
    own, shown = conditions(record), conditions(replace(reference, **captions))
    pair = conditions(record, reference)
    assert pair.key == record.key and pair.regions == own.regions != ()
    of_record = {"input_ids", "input_ids_2", "token_idx", "masks"}
    for field in fields(pair):
        value = getattr(pair, field.name)
        if isinstance(value, torch.Tensor):
            source = own if field.name in of_record else shown
            assert torch.equal(value, getattr(source, field.name)), field.name
            assert torch.equal(
                getattr(own, field.name), getattr(conditions(record, record), field.name)
            )


def without_mouth(record: Record) -> Record:
    labels = decode_labels(record.parsing).copy()
    labels[region_masks(labels, "corrected")["mouth"]] = 1  # skin
    return replace(record, parsing=encode_labels(labels))


def test_a_region_that_one_of_the_two_lacks_has_no_slot(mixture: Mixture, parts: Parts) -> None:
    one, two = records(mixture, 0, 1)
    for record, reference in ((one, without_mouth(two)), (without_mouth(one), two)):
        pair = build_conditions(
            record,
            parts.preparation.tokenizer,
            SPECS["tiny"],
            "corrected",
            resolution=32,
            reference=reference,
        )
        assert "mouth" not in pair.regions and "nose" in pair.regions
        assert pair.token_valid.sum() == len(pair.regions)


def test_batches_of_pairs_have_the_conditions_of_their_references(
    mixed: Mixed, parts: Parts
) -> None:
    mixture = Mixture(mixed.sources, pair_prob=0.6)
    preparation = replace(parts.preparation, drop=DropRates(text=0, identity=0, both=0))
    maker = BatchMaker(mixture, mixture.order(3), preparation)
    batch = unpacked(maker(range(12)), preparation, "cpu")
    order = mixture.order(3)
    numbers = [order.sample(position) for position in range(12)]
    references = [mixture.pairs(order).reference(position) for position in range(12)]
    assert batch.keys == tuple(map(mixture.key, numbers))
    assert batch.references == tuple(map(mixture.key, references))
    assert sum(one != other for one, other in zip(numbers, references, strict=True)) in range(3, 9)
    for row, (record, reference) in enumerate(
        zip(records(mixture, *numbers), records(mixture, *references), strict=True)
    ):
        assert torch.equal(batch.pixels[row], training_pixels(record, 32))
        assert torch.equal(batch.identity[row], torch.from_numpy(reference.identity))
    # the cache holds pairs, not samples: a sample comes alone and with several references
    cached = BatchMaker(mixture, order, replace(preparation, cache_size=15))
    for start in (0, 12, 6):
        positions = range(start, start + 12)
        assert_same_rows(
            *(unpacked(make(positions), preparation, "cpu") for make in (cached, maker))
        )


def test_a_bad_reference_makes_the_sample_bad_and_is_the_one_that_is_named(
    mixed: Mixed, tiny_base: Path, parts: Parts, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(mixed.sources[0].path, tmp_path / "data"))
    place = ShardSet(str(copy)).place(2)  # of the person of 0 and 4
    with (copy / "shards" / place.tar).open("r+b") as tar:
        tar.seek(place.offset + place.size // 2)
        tar.write(b"spoiled")
    source = (DataSource(path=str(copy)),)
    mixture = Mixture(source, pair_prob=0.5)
    maker = BatchMaker(mixture, mixture.order(3), parts.preparation)
    read = Fetched(dict(enumerate(mixture.records(range(8)))), {}, {}, {})
    pairs = [(0, 2), (0, 4), (2, 0), (2, 2), (0, 0)]
    prepared = {pair: maker._prepare(pair, read) for pair in pairs}
    bad = {pair: each.bad and each.bad.key for pair, each in prepared.items()}
    spoiled = mixture.key(2)
    assert bad == {(0, 2): spoiled, (0, 4): None, (2, 0): spoiled, (2, 2): spoiled, (0, 0): None}
    assert prepared[0, 2].conditions.key == mixture.key(0) and not prepared[0, 2].pixels.any()
    config = small(
        source, tiny_base, tmp_path / "out", pair_prob=0.5, max_bad_share=0.2, max_train_steps=8
    )
    run(config)
    lines = [*read_lines(tmp_path / "out/skipped.jsonl")]
    order = mixture.order(config.seed)
    used = [(order.sample(p), mixture.pairs(order).reference(p)) for p in range(16)]
    assert [line["step"] for line in lines] == [1 + p // 2 for p in range(16) if 2 in used[p]]
    assert {(line["key"], line["shard"]) for line in lines} == {(spoiled, place.tar)}
    assert any(2 in pair and pair != (2, 2) for pair in used)
