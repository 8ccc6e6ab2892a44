"""Requests by photograph: which pictures they find, and when they refuse to search."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from configs.errors import ShardError
from pipelines.dedup.faces import FACE_COLUMNS, best_of, faces_of
from pipelines.ledger import read_ledger
from pipelines.lint import lint
from pipelines.run import plan_job, run
from pipelines.takedown import by_source, matching, rates, take_down
from pipelines.takedown.matching import Search, by_face
from stages.backends.same_person import SAME_PERSON, same_person, upper_bound
from stages.record import key_of
from stages.storage.reader import DatasetReader
from stages.storage.store import Store
from tests.pipelines.helpers import NO_RULES
from tests.pipelines.stub_chain import OUTAGE, Scene, stub_chain
from tests.pipelines.takedown.helpers import (
    make,
    request,
    settings_of,
    sources,
    with_own_identities,
    without_other_faces,
)

QUARANTINING = (*NO_RULES, "shard_size=2", "rules.min_sharpness=0.3")


def test_every_face_of_samples_and_quarantined_samples_is_compared(tmp_path: Path) -> None:
    scenes = {
        "alone": Scene(person="ann"),
        "nearly the same": Scene(person="ann", saved=1),
        "beside ben": Scene(person="ben", beside=("carl", "ann")),
        "with ben beside": Scene(person="ann", shot=3, beside=("ben",)),
        "blurred": Scene(person="ben", shot=4, sharpness=0.1, beside=("ann",)),
        "nearly the same couple": Scene(person="ben", saved=1, beside=("carl", "ann")),
        "ben": Scene(person="ben", shot=5),
        "ben and carl": Scene(person="ben", shot=6, beside=("carl",)),
    }
    store = make(tmp_path, scenes, *QUARANTINING)
    search = by_face(store, request(tmp_path, "ann"))
    assert sources([*search.matches]) == sorted({*scenes} - {"ben", "ben and carl"})
    assert search.faces == 8 + 2 + 1 + 1 + 2 + 1 and search.not_compared == 0
    why = {match.source: match for match in search.matches}
    assert "face 3 of 3" in why["beside ben.jpg"].why and why["beside ben.jpg"].face == 2
    assert why["alone.jpg"].face == 0 and why["alone.jpg"].why.startswith("cosine 0.")


def test_only_the_identity_of_a_matched_main_face_is_expanded(tmp_path: Path) -> None:
    """The couple is of ben's identity: his other pictures are not hers."""
    scenes = {f"ben {shot}": Scene(person="ben", shot=shot) for shot in range(3)}
    scenes |= {"couple": Scene(person="ben", shot=7, beside=("ann",))}
    scenes |= {"ann": Scene(person="ann")}
    store = make(tmp_path, scenes)
    assert sources([*by_face(store, request(tmp_path, "ann")).matches]) == ["ann", "couple"]
    strict = request(tmp_path, "ben", cosine=0.999)
    exact = replace(strict, vectors=Scene(person="ben", shot=0).identity[None])
    of_identity = by_face(store, exact).matches
    assert sources([*of_identity]) == ["ben 0", "ben 1", "ben 2", "couple"]
    assert sum(match.why.startswith("identity id-") for match in of_identity) == 3


def test_several_photographs_find_what_each_of_them_finds(tmp_path: Path) -> None:
    store = make(tmp_path, {name: Scene(person=name) for name in ("ann", "ben", "carl")})
    assert sources([*by_face(store, request(tmp_path, "ann", "ben")).matches]) == ["ann", "ben"]


def test_near_misses_are_sorted_and_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes = {f"twin {shot}": Scene(person="twin", shot=shot) for shot in range(9)}
    store = make(tmp_path, {"ann": Scene(person="ann"), "ben": Scene(person="ben"), **scenes})
    monkeypatch.setattr(matching, "MOST_NEAR", 7)
    search = by_face(store, request(tmp_path, "ann", cosine=0.55))
    assert sources([*search.matches]) == ["ann"]
    cosines = [match.cosine or 0 for match in search.near]
    assert cosines == sorted(cosines, reverse=True) and all(0.45 <= c < 0.55 for c in cosines)
    assert len(search.near) == 7 and search.more_near == 2


def test_shards_without_the_other_faces_are_refused_until_a_run_has_added_them(
    tmp_path: Path,
) -> None:
    (tmp_path / "photos").mkdir()
    scene = Scene(person="ben", beside=("ann",))
    (tmp_path / "photos/couple.jpg").write_bytes(scene.encode())
    settings = settings_of(tmp_path)
    run(settings, chain=without_other_faces)
    with pytest.raises(ShardError, match=r"out/config\.yaml output=\S*/out`") as error:
        by_face(plan_job(settings, chain=stub_chain).store, request(tmp_path, "ann"))
    assert "other faces of 1 pictures" in str(error.value)
    job = plan_job(settings, chain=stub_chain)
    assert job.why() == ["1 shard through other_faces, from their own samples"]
    store = make(tmp_path, {})
    assert sources([*by_face(store, request(tmp_path, "ann")).matches]) == ["couple"]


def test_shards_of_another_embedder_are_refused(tmp_path: Path) -> None:
    store = make(tmp_path, {"ann": Scene(person="ann")})
    other = replace(request(tmp_path, "ann"), embedder="embed-2-0123456789abcdef")
    with pytest.raises(ShardError, match="1 shards were made with another embedder"):
        by_face(store, other)


def test_inputs_with_a_face_but_no_embedding_are_counted(tmp_path: Path) -> None:
    (tmp_path / OUTAGE).write_text(json.dumps([key_of("ann.jpg")]))
    couple = Scene(person="ann", beside=("carl",))
    scenes = {"ann": couple, "ben": Scene(person="ben"), "nobody": Scene(person="")}
    store = make(tmp_path, scenes)
    search = by_face(store, request(tmp_path, "ann"))
    assert search.matches == [] and search.not_compared == 1
    [row] = DatasetReader(store).rows(0, ("reason", "other_identities")).to_pylist()[:1]
    assert row == {"reason": "caption_failed", "other_identities": None}
    assert any(line.startswith("1 inputs show a face, but") for line in rates(search))


def test_embeddings_that_came_with_the_source_are_counted(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/ann.jpg").write_bytes(Scene(person="ann").encode())
    run(settings_of(tmp_path), chain=with_own_identities)
    search = by_face(Store(str(tmp_path / "out")), request(tmp_path, "ann"))
    assert len(search.matches) == 1 and search.foreign == 1
    assert any("brought the embedding" in line for line in rates(search))
    store = make(tmp_path / "other", {"ann": Scene(person="ann")})
    assert by_face(store, request(tmp_path, "ann")).foreign == 0


def test_records_of_a_request_that_was_stopped_are_not_matched_again(tmp_path: Path) -> None:
    store = make(tmp_path, {"ann": Scene(person="ann"), "ben": Scene(person="ben")})
    [match] = by_source(store, "ann.jpg")
    entry = {"time": "", "by": "source", "note": "", "inputs": 1, "sha256": [match.sha256]}
    entry["removed"] = {"fgid-000000": [match.key]}
    store.write("takedown.jsonl", json.dumps(entry) + "\n")
    assert by_source(store, "ann.jpg") == []


def test_a_face_without_a_vector_is_not_compared(tmp_path: Path) -> None:
    store = make(
        tmp_path, {"a": Scene(person="ann", beside=("ben", "carl")), "b": Scene(person="")}
    )
    table = DatasetReader(store).rows(0, FACE_COLUMNS)
    others = table.column("other_identities").to_pylist()
    zeros = [[0.0] * 512 + others[0][512:], others[1]]
    column = table.schema.get_field_index("other_identities")
    field = table.schema.field(column)
    faces = faces_of(table.set_column(column, field, pa.array(zeros, field.type)))
    assert (faces.row.tolist(), faces.face.tolist()) == ([0, 0], [0, 2])
    best = best_of(faces, Scene(person="carl").identity[None], 2)
    assert best.face.tolist() == [2, -1] and best.cosine[0] > 0.99 and best.cosine[1] == -1


def test_the_threshold_is_printed_with_its_error_rates_and_a_bound(tmp_path: Path) -> None:
    vectors = request(tmp_path, "ann", "ben").vectors
    search = Search(matches=[], faces=10_000_000, request=request(tmp_path, "ann", cosine=0.40))
    text = "\n".join(rates(search))
    assert "0.40" in text and "99 %" in text and "95 % of the queries" in text
    assert "0 of 14,142" in text and "at most 2,119 false matches in 10,000,000" in text
    assert search.request is not None
    two = replace(search, request=replace(search.request, vectors=vectors))
    assert "at most 4,237 false matches in 20,000,000" in "\n".join(rates(two))
    lower = "\n".join(rates(replace(search, request=replace(search.request, cosine=0.3))))
    assert "not at this threshold" in lower and "bench.people" in lower and "99 %" not in lower
    unmeasured = replace(search.request, weights="w600k_r50")
    text = "\n".join(rates(replace(search, request=unmeasured)))
    assert "No error rates were measured for w600k_r50" in text
    assert "bench.people FOLDER --weights w600k_r50" in text


def test_the_bound_is_that_of_clopper_and_pearson() -> None:
    from scipy.stats import binomtest

    for false, pairs in ((0, 10), (0, 14_142), (3, 500), (99, 100)):
        exact = binomtest(false, pairs, alternative="less").proportion_ci(0.95, "exact").high
        assert upper_bound(false, pairs) == pytest.approx(exact)
    assert upper_bound(0, 14_142) == pytest.approx(3 / 14_142, rel=0.01)
    assert upper_bound(0, 0) == upper_bound(5, 5) == 1
    assert same_person("w600k_mbf") is SAME_PERSON["w600k_mbf"]
    assert same_person("w600k_r50").pairs == 0


def test_a_removed_couple_is_gone(tmp_path: Path) -> None:
    store = make(tmp_path, {"c": Scene(person="ben", beside=("ann",)), "ben": Scene(person="ben")})
    search = by_face(store, request(tmp_path, "ann"))
    settings = settings_of(tmp_path)
    take_down(store, settings, search.matches, "photo", "", stub_chain, request=search.request)
    table = DatasetReader(store).rows(0, ("key", "reason", "other_identities"))
    rows = {row["key"]: row for row in table.to_pylist()}
    assert rows[key_of("c.jpg")]["reason"] == "taken_down"
    assert rows[key_of("c.jpg")]["other_identities"] is None
    assert rows[key_of("ben.jpg")]["reason"] == ""
    assert by_face(store, request(tmp_path, "ann")).matches == []


def test_an_original_is_removed_with_its_exact_copy(tmp_path: Path) -> None:
    """The same bytes would stay, as a sample, if only the copy was removed."""
    ann, ben = Scene(person="ann"), Scene(person="ben")
    store = make(tmp_path, {"a": ann, "b": ben, "copy": ann, "copy 2": ann})
    assert read_ledger(store).dropped == {"duplicate": 2}
    matches = by_source(store, "copy.jpg")
    assert sources([*matches]) == ["a", "copy", "copy 2"]
    assert {match.sha256 for match in matches} - {""}, "the file is refused under any name"


def test_the_plan_loses_the_names_of_removed_inputs_with_their_files(tmp_path: Path) -> None:
    store = make(tmp_path, {name: Scene(person=name) for name in ("ann", "ben", "carl")})
    matches = by_source(store, "ann.jpg")
    take_down(store, settings_of(tmp_path), matches, "source", "", stub_chain)
    make(tmp_path, {})
    assert "ann.jpg" in store.table("plan.parquet").column("source").to_pylist(), "still listed"
    (tmp_path / "photos/ann.jpg").unlink()
    (tmp_path / "photos/ben.jpg").unlink()
    for _ in range(2):
        make(tmp_path, {})
        rows = store.table("plan.parquet", ["key", "source", "locator", "version"]).to_pylist()
        assert rows[0] == {"key": key_of("ann.jpg"), "source": "", "locator": b"", "version": ""}
        assert [row["source"] for row in rows] == ["", "ben.jpg", "carl.jpg"]
        assert read_ledger(store).written == 2 and list(lint(store)) == []
    make(tmp_path, {"ann": Scene(person="ann")})
    assert read_ledger(store).dropped == {"taken_down": 1}, "the name is still refused"
