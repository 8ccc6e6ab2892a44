"""All measures of an adapter, as the command takes them, and what a second start does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from configs.errors import ConfigError
from configs.evaluation import MEASURES, EvaluationConfig
from infer.evaluation.evaluate import evaluate
from infer.evaluation.faces import MeasuredPicture
from infer.evaluation.sheet import PersonRow, people_sheet
from tests.infer.helpers import small


@pytest.fixture(scope="module")
def config(adapter: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> EvaluationConfig:
    output = tmp_path_factory.mktemp("evaluation") / "results.json"
    config = EvaluationConfig(
        data=str(data),
        output=str(output),
        split="all",
        people=2,
        images=1,
        region_people=2,
        text_people=2,
        portraits=small(adapter, num_inference_steps=1, start_merge_step=0),
    )
    evaluate(config, lambda line: None)
    return config


def test_the_file_has_every_measure_with_its_interval(config: EvaluationConfig) -> None:
    results = json.loads(Path(config.output).read_text())
    assert set(results) == {"origin", *MEASURES}
    assert results["losses"]["swapped_minus_right"]["identities"] == 2
    assert results["portraits"]["portraits"] == 2
    assert set(results["regions"]) == {"eyes", "mouth"}
    assert 0 < results["attention"]["overall"]["inside"]["mean"] < 1
    assert set(results["texts"]["difference"]) == {"glasses", "black hair", "smile"}
    assert results["calibration"]["photograph"]["has_face"]["mean"] == 1
    assert results["copying"]["people"] == []  # nobody has another photograph
    sheet = results["sheet"]
    assert len(sheet["portraits"]) == 4  # two people, one prompt, two of each
    assert Image.open(Path(config.output).with_name(sheet["file"])).width > 400


def test_a_second_start_takes_missing_measures_only(config: EvaluationConfig) -> None:
    path, taken = Path(config.output), list[str]()
    before = json.loads(path.read_text())
    evaluate(config, taken.append)
    assert not taken
    path.write_text(json.dumps({key: before[key] for key in before if key != "losses"}))
    evaluate(config, taken.append)
    assert [line.split(":")[0] for line in taken] == ["losses"]
    assert json.loads(path.read_text()) == before


def test_another_seed_in_the_same_file_is_refused(config: EvaluationConfig) -> None:
    with pytest.raises(ConfigError, match="another adapter, or with other settings"):
        evaluate(replace(config, seed=2), lambda line: None)


def test_the_sheet_has_a_row_for_each_person(
    references: dict[str, MeasuredPicture], small_photos: dict[str, MeasuredPicture]
) -> None:
    names = [*references][:3]

    def row(name: str, shown: str) -> PersonRow:
        return PersonRow(name, {"a prompt": [small_photos[shown]] * 2})

    right = people_sheet([row(name, name) for name in names], references)
    one = people_sheet([row(names[0], names[0])], references)
    assert isinstance(right, Image.Image)
    assert right.width == one.width and right.height > 2 * one.height
    wrong = people_sheet([row(names[0], names[1])], references)
    assert wrong.size == one.size and wrong.tobytes() != one.tobytes()
    with pytest.raises(ValueError, match="at least one person"):
        people_sheet([], references)
