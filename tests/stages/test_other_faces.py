"""Other faces: embeddings of all faces but the main one, in the sidecar only."""

from __future__ import annotations

import tarfile
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from configs.errors import ConfigError
from configs.schema import DatasetConfig, EmbedConfig
from pipelines.run import run
from stages.backends.weights import Weights
from stages.base import Stage, run_chain
from stages.chain import build_stages
from stages.other_faces import OtherFacesStage
from stages.record import IDENTITY_DIM, Face, FloatArray, Record, Status, key_of
from stages.storage.reader import DatasetReader
from stages.storage.sidecar import row_to_record, sidecar_columns, sidecar_row
from tests.pipelines.helpers import NO_RULES, config, rows_of


@pytest.fixture(scope="module")
def chain() -> list[Stage]:
    stages = {stage.name: stage for stage in build_stages(DatasetConfig())}
    return [*(stages[n] for n in ("resize", "detect", "embed")), _stage()]


def _stage() -> OtherFacesStage:
    return OtherFacesStage(EmbedConfig(), Weights())


def _records(chain: list[Stage], *images: bytes) -> list[Record]:
    inputs = [Record(key=key_of(str(n)), source=str(n), image=i) for n, i in enumerate(images)]
    return run_chain(chain, inputs)


def side_by_side(*paths: Path, widths: tuple[int, ...] = ()) -> bytes:
    """Returns a JPEG of pictures beside each other. widths: of each, pixels."""
    tiles = []
    for path, width in zip(paths, widths or (400,) * len(paths), strict=True):
        image = cv2.resize(cv2.imread(str(path)), (width, width), interpolation=cv2.INTER_AREA)
        tiles.append(np.pad(image, ((0, 400 - width), (0, 0), (0, 0))))
    encoded, data = cv2.imencode(".jpg", np.hstack(tiles), [cv2.IMWRITE_JPEG_QUALITY, 95])
    assert encoded
    return data.tobytes()


def test_every_other_face_gets_the_embedding_of_the_person(
    chain: list[Stage], portraits: Path
) -> None:
    ann, ben, cleo = sorted(portraits.glob("*.jpg"))[:3]
    alone = _records(chain, *(path.read_bytes() for path in (ann, ben, cleo)))
    assert [r.other_identities is not None and r.other_identities.size for r in alone] == [0] * 3
    [group] = _records(chain, side_by_side(ann, ben, cleo, widths=(300, 400, 300)))
    assert len(group.faces) == 3
    others = _vectors(group)
    assert np.allclose(np.linalg.norm(others, axis=1), 1, atol=1e-5)
    by_place = sorted(group.other_faces, key=lambda face: face.box[0])
    order = [group.other_faces.index(face) for face in by_place]
    for vector, person in zip(others[order], (alone[0], alone[2]), strict=True):
        cosines = [float(vector @ each.identity) for each in alone if each.identity is not None]
        assert max(cosines) == pytest.approx(float(vector @ person.identity)), cosines
        assert max(cosines) > 0.7
    # the same as if a face had been the main one
    assert group.identity is not None and float(group.identity @ alone[1].identity) > 0.7


def test_the_result_does_not_depend_on_the_records_beside_it(
    chain: list[Stage], portraits: Path
) -> None:
    ann, ben, cleo = sorted(portraits.glob("*.jpg"))[:3]
    pairs = side_by_side(ann, ben), side_by_side(ben, cleo)
    together = _records(chain, *pairs)
    for record, image in zip(together, pairs, strict=True):
        [single] = _records(chain, image)
        assert np.array_equal(_vectors(record), _vectors(single))


def test_a_face_without_a_usable_vector_is_zeros(chain: list[Stage], portraits: Path) -> None:
    [record] = _records(chain[:3], side_by_side(*sorted(portraits.glob("*.jpg"))[:3]))
    stage = _stage()

    class FailsOnTheFirst:
        def embed(self, images: list[object], faces: list[Face]) -> list[FloatArray]:
            first = record.other_faces[0]
            return [np.full(IDENTITY_DIM, 2 * (face != first), np.float32) for face in faces]

    stage._backend = FailsOnTheFirst()
    vectors = _vectors(stage.process([record])[0])
    assert not vectors[0].any() and np.linalg.norm(vectors[1]) == pytest.approx(1)


def test_only_the_sidecar_has_them_and_a_rewritten_shard_keeps_them(
    portraits: Path, tmp_path: Path
) -> None:
    source, output = tmp_path / "photos", tmp_path / "out"
    source.mkdir()
    ann, ben = sorted(portraits.glob("*.jpg"))[:2]
    (source / "couple.jpg").write_bytes(side_by_side(ann, ben))
    (source / "ann.jpg").write_bytes(ann.read_bytes())
    settings = (*NO_RULES, "parse.size=320")
    run(config(source, output, *settings))
    before = {row["source"]: row["other_identities"] for row in rows_of(output)}
    assert len(before["couple.jpg"]) == IDENTITY_DIM and before["ann.jpg"] == []
    with tarfile.open(output / "shards/fgid-000000.tar") as tar:
        members = {member.name: tar.extractfile(member) for member in tar}
        data = b"".join(stream.read() for stream in members.values() if stream)
    assert len({name.partition(".")[2] for name in members}) == 5
    assert b"other_identities" not in data
    assert np.asarray(before["couple.jpg"], np.float32).tobytes() not in data
    run(config(source, output, *settings, "rules.max_faces=1"))  # the couple is quarantined
    run(config(source, output, *settings))
    assert {row["source"]: row["other_identities"] for row in rows_of(output)} == before
    [row] = [r for r in rows_of(output) if r["source"] == "couple.jpg"]
    sample = DatasetReader(str(output)).sample(0, row)
    assert sample is not None and _vectors(sample).shape == (1, IDENTITY_DIM)


def test_a_record_without_a_sample_has_none(chain: list[Stage], portraits: Path) -> None:
    [record] = _records(chain, side_by_side(*sorted(portraits.glob("*.jpg"))[:2]))
    dropped = replace(record, status=Status.DROPPED, reason="no_face_parsed", stage="parse")
    row = sidecar_row(dropped, ())
    assert len(row["other_identities"]) == IDENTITY_DIM
    columns = {column.name: column for column in sidecar_columns(())}
    assert row_to_record(row, columns).other_identities is None


def test_it_takes_the_weights_of_embed_and_no_others() -> None:
    with pytest.raises(ConfigError, match="these weights are for detect"):
        OtherFacesStage(EmbedConfig(weights="det_10g"), Weights())


def _vectors(record: Record) -> FloatArray:
    assert record.other_identities is not None
    return record.other_identities.reshape(-1, IDENTITY_DIM)
