"""Blocked people: later pictures of a person are quarantined, until an operator releases them."""

from __future__ import annotations

import base64
import json
import logging
from pathlib import Path

import numpy as np
import pytest

from configs.errors import PipelineError, ShardError
from pipelines.dedup.global_pass import is_global_pass_current
from pipelines.ledger import read_ledger
from pipelines.lint import lint
from pipelines.run import run
from pipelines.takedown import by_source, release, statements, take_down
from pipelines.takedown.matching import by_face
from stages.record import key_of
from stages.storage.exclusions import blocked_people, read_takedowns
from stages.storage.reader import DatasetReader
from stages.storage.store import Store
from tests.pipelines.helpers import digests, rows_of, stamps
from tests.pipelines.stub_chain import Scene, stub_chain
from tests.pipelines.takedown.helpers import make, request, settings_of, with_own_identities

FIRST = {"ann": Scene(person="ann"), "ben": Scene(person="ben"), "carl": Scene(person="carl")}
LATER = {
    "later": Scene(person="ann", shot=2),
    "couple": Scene(person="dora", shot=2, beside=("ann",)),
    "dora": Scene(person="dora", shot=3),
}


def block(folder: Path, store: Store, *people: str) -> None:
    search = by_face(store, request(folder, *people))
    settings = settings_of(folder)
    take_down(store, settings, search.matches, "photo", "", stub_chain, search.request, block=True)


def reasons(folder: Path) -> dict[str, str]:
    """Returns source → reason; removed inputs by key."""
    return {
        row["source"].removesuffix(".jpg") or row["key"]: row["reason"]
        for row in rows_of(folder / "out")
    }


def test_later_pictures_of_a_blocked_person_are_quarantined(tmp_path: Path) -> None:
    store = make(tmp_path, FIRST)
    block(tmp_path, store, "ann")
    assert reasons(tmp_path) == {key_of("ann.jpg"): "taken_down", "ben": "", "carl": ""}
    before = stamps(tmp_path / "out")
    make(tmp_path, LATER)
    blocked = {"later": "blocked_person", "couple": "blocked_person", "dora": ""}
    assert {name: reasons(tmp_path)[name] for name in LATER} == blocked
    assert read_ledger(store).dropped == {"taken_down": 1, "blocked_person": 2}
    after = stamps(tmp_path / "out")
    assert {name: after[name] for name in before} == before, (
        "shards without matches are not written"
    )
    rows = {row["source"]: row for row in rows_of(tmp_path / "out")}
    assert rows["couple.jpg"]["stage"] == "global_pass"
    assert rows["couple.jpg"]["quarantine_offset"] >= 0
    assert "to a blocked person, face 2" in rows["couple.jpg"]["detail"]
    assert key_of("later.jpg") not in DatasetReader(store).identities().column("key").to_pylist()
    assert list(lint(store)) == []
    stamp = stamps(tmp_path / "out")
    make(tmp_path, {})
    assert stamps(tmp_path / "out") == stamp, "a second run changes nothing"


def test_the_order_of_events_does_not_change_the_result(tmp_path: Path) -> None:
    early, late = tmp_path / "early", tmp_path / "late"
    for folder in (early, late):
        folder.mkdir()
    store = make(early, FIRST)
    block(early, store, "carl")
    make(early, {"carl 2": Scene(person="carl", shot=2)})
    store = make(late, FIRST)
    log = (early / "out/takedown.jsonl").read_text()
    block(late, store, "carl")
    (late / "out/takedown.jsonl").write_text(log)
    make(late, {"carl 2": Scene(person="carl", shot=2)})
    assert digests(early / "out") == digests(late / "out")


def test_without_the_option_no_embedding_is_kept(tmp_path: Path) -> None:
    store = make(tmp_path, FIRST)
    search = by_face(store, request(tmp_path, "ann", "ben"))
    settings = settings_of(tmp_path)
    take_down(store, settings, search.matches, "photo", "", stub_chain, search.request)
    [entry] = read_takedowns(store)
    embedder = request(tmp_path, "ann").embedder
    expected = {"photos": 2, "cosine": 0.6, "embedder": embedder, "weights": "w600k_mbf"}
    assert entry["photo"] == expected and "block" not in entry
    assert len(json.dumps(entry)) < 1000 and blocked_people(store) == []
    make(tmp_path, LATER)
    assert reasons(tmp_path)["later"] == ""


def test_the_log_has_the_embeddings_of_a_blocked_person(tmp_path: Path) -> None:
    store = make(tmp_path, FIRST)
    block(tmp_path, store, "ann", "ben")
    [person] = blocked_people(store)
    assert np.array_equal(person.vectors, request(tmp_path, "ann", "ben").vectors)
    assert (person.cosine, person.released) == (0.6, frozenset())


def test_a_released_picture_is_a_sample_again_and_stays_one(tmp_path: Path) -> None:
    store, settings = make(tmp_path, FIRST), settings_of(tmp_path)
    block(tmp_path, store, "ann")
    make(tmp_path, LATER)
    release(store, settings, key_of("couple.jpg"), "ticket 8", stub_chain)
    expected = {"later": "blocked_person", "couple": "", "dora": ""}
    assert {name: reasons(tmp_path)[name] for name in LATER} == expected
    make(tmp_path, {"dora 4": Scene(person="dora", shot=4)})
    assert reasons(tmp_path)["couple"] == "" and list(lint(store)) == []
    assert len(read_takedowns(store)) == 1, "a release is no request"
    with pytest.raises(PipelineError, match="is a sample; expected one that was dropped as"):
        release(store, settings, key_of("couple.jpg"), "", stub_chain)
    # a later request removes both: a release counts for blocks only
    block(tmp_path, store, "ann")
    assert "couple" not in reasons(tmp_path) and "later" not in reasons(tmp_path)


def test_a_release_does_not_hold_for_another_image_of_the_same_name(tmp_path: Path) -> None:
    store, settings = make(tmp_path, FIRST), settings_of(tmp_path)
    block(tmp_path, store, "ann")
    make(tmp_path, LATER)
    release(store, settings, key_of("couple.jpg"), "", stub_chain)
    make(tmp_path, {"couple": Scene(person="dora", shot=8, beside=("ann",))})
    assert reasons(tmp_path)["couple"] == "blocked_person"


def test_a_blocked_picture_can_be_taken_down(tmp_path: Path) -> None:
    store = make(tmp_path, FIRST)
    block(tmp_path, store, "ann")
    make(tmp_path, LATER)
    matches = by_source(store, "later.jpg")
    assert [match.key for match in matches] == [key_of("later.jpg")]
    take_down(store, settings_of(tmp_path), matches, "source", "", stub_chain)
    assert reasons(tmp_path)[key_of("later.jpg")] == "taken_down" and list(lint(store)) == []


def test_a_block_ends_when_its_embeddings_are_removed_from_the_log(tmp_path: Path) -> None:
    store = make(tmp_path, FIRST)
    block(tmp_path, store, "ann")
    make(tmp_path, LATER)
    [entry] = map(json.loads, store.read("takedown.jsonl").decode().splitlines())
    del entry["block"]
    store.write("takedown.jsonl", json.dumps(entry) + "\n")
    make(tmp_path, {})
    assert {name: reasons(tmp_path)[name] for name in LATER} == dict.fromkeys(LATER, "")


def test_lint_finds_samples_of_a_blocked_person(tmp_path: Path) -> None:
    store = make(tmp_path, FIRST)
    block(tmp_path, store, "ann")
    log = store.read("takedown.jsonl").decode()
    entries = map(json.loads, log.splitlines())
    without = [{name: value for name, value in e.items() if name != "block"} for e in entries]
    store.write("takedown.jsonl", "".join(f"{json.dumps(entry)}\n" for entry in without))
    make(tmp_path, LATER)
    assert list(lint(store)) == []
    store.write("takedown.jsonl", log)
    lines = [line for line in lint(store) if "shows a blocked person" in line]
    assert len(lines) == 2 and any(key_of("couple.jpg") in line for line in lines)
    assert not is_global_pass_current(store, settings_of(tmp_path).global_pass)
    make(tmp_path, {})
    assert list(lint(store)) == []


def test_lint_states_what_it_proves(tmp_path: Path) -> None:
    store = make(tmp_path, FIRST)
    assert list(statements(store)) == []
    take_down(store, settings_of(tmp_path), by_source(store, "ben.jpg"), "source", "", stub_chain)
    block(tmp_path, store, "ann")
    make(tmp_path, LATER)
    release(store, settings_of(tmp_path), key_of("couple.jpg"), "", stub_chain)
    search = by_face(store, request(tmp_path, "carl"))
    settings = settings_of(tmp_path)
    take_down(store, settings, search.matches, "photo", "", stub_chain, search.request)
    lines = list(statements(store))
    assert "3 requests" in lines[0] and "3 removed keys" in lines[0] and "3 removed dig" in lines[0]
    assert "at least 0.60 (w600k_mbf) to one of 1 photograph" in lines[1]
    assert "not compared" not in lines[1] and "came later were not compared" in lines[2]
    assert "blocked people: 1." in lines[3] and "at least 0.60" in lines[3]
    assert "without 1 released image" in lines[3] and len(lines) == 4


def test_a_block_of_another_embedder_is_a_warning_and_is_not_stated_as_proved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = make(tmp_path, FIRST)
    block(tmp_path, store, "ann")
    log = store.read("takedown.jsonl").decode()
    store.write("takedown.jsonl", log.replace("embed-", "embed-9"))
    with caplog.at_level(logging.WARNING):
        make(tmp_path, LATER)
    assert "1 blocked people were embedded by another embedder" in caplog.text
    assert reasons(tmp_path)["later"] == ""
    assert any("were not compared: 1." in line for line in statements(store))
    assert not any("No face of a sample" in line for line in statements(store))


def test_lint_states_which_samples_brought_their_embedding_along(tmp_path: Path) -> None:
    store = make(tmp_path, FIRST)
    block(tmp_path, store, "ann")
    assert len([*statements(store)]) == 3
    (tmp_path / "photos/dora.jpg").write_bytes(Scene(person="dora").encode())
    run(settings_of(tmp_path), chain=with_own_identities)
    line = [*statements(store)][-1]
    assert "1 sample brought the embedding" in line and "was not compared" in line


@pytest.mark.parametrize(
    "change",
    [
        {"block": "!"},
        {"block": "AAAA"},
        {"block": base64.b64encode(np.full(512, np.nan, "<f4").tobytes()).decode()},
        {"photo": {"cosine": None, "embedder": "embed-1-x"}},
        {"photo": {}},
        {"photo": {"cosine": "0.4", "embedder": "e", "photos": 1, "weights": "w"}},
        {"block": ""},
        {"sha256": None},
        {"sha256": "a digest"},
        {"removed": {"fgid-000000": "a key"}, "inputs": 5},
        {"by": 5},
        {"by": "release", "released": "all"},
        {"by": "release", "released": [["a digest"]]},
    ],
)
def test_a_damaged_entry_is_an_error(tmp_path: Path, change: dict[str, object]) -> None:
    store = make(tmp_path, {"ann": Scene(person="ann")})
    block(tmp_path, store, "ann")
    [entry] = map(json.loads, store.read("takedown.jsonl").decode().splitlines())
    store.write("takedown.jsonl", json.dumps(entry | change) + "\n")
    with pytest.raises(ShardError, match=r"line 1 of takedown\.jsonl"):
        run(settings_of(tmp_path), chain=stub_chain)
