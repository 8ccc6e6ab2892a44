"""Takes the measures of one adapter, and writes them to a file."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final

from configs.errors import ConfigError
from configs.evaluation import EvaluationConfig
from infer.evaluation.attention import attention_shares
from infer.evaluation.calibration import calibration
from infer.evaluation.copying import copying
from infer.evaluation.denoising import adapted_model
from infer.evaluation.faces import FaceMeasurer, MeasuredPicture
from infer.evaluation.losses import noise_losses
from infer.evaluation.people import Person, by_person, held_out_people
from infer.evaluation.pictures import painter, painters, photographs, portraits, seeds_of
from infer.evaluation.regions import region_use
from infer.evaluation.resemblance import likeness, measure_portraits
from infer.evaluation.sheet import PersonRow, people_sheet
from infer.evaluation.texts import trait_differences, trait_shares
from infer.identity import Identity
from infer.load import configured_adapter, load_pipeline
from stages.codec import Image
from stages.storage.reader import DatasetReader

SWAPPED: Final = ("eyes", "mouth")  # regions that are exchanged


def evaluate(config: EvaluationConfig, message: Callable[[str], None]) -> dict[str, Any]:
    """Takes the measures that aren't in `config.output` yet, and returns all of them.

    The file is written after each measure, so an interrupted evaluation continues. message:
    receives a line for the user after each one. Raises ConfigError if a setting is missing, or if
    the file has measures of another adapter or with other settings.
    """
    for name in ("data", "output"):
        if not getattr(config, name):
            raise ConfigError(f"{name} is empty. Set {name}=PATH.")
    path = Path(config.output)
    origin = _origin(config)
    results: dict[str, Any] = {"origin": origin}
    if path.is_file():
        results = json.loads(path.read_text(encoding="utf-8"))
        if results["origin"] != origin:
            raise ConfigError(
                f"{path} has the measures of another adapter, or with other settings. Remove it, "
                "or give another output."
            )
    missing = [name for name in config.measures if name not in results]
    if missing:
        evaluation = Evaluation(config)
        for name in missing:
            started = time.monotonic()
            results[name] = getattr(evaluation, name)()
            _write(path, results)
            message(f"{name}: {time.monotonic() - started:.0f} s")
    return results


def _origin(config: EvaluationConfig) -> dict[str, Any]:
    """Returns what the measures depend on: the adapter's digest and the settings."""
    source = configured_adapter(config.portraits)
    files = sorted(source.glob("adapter.*")) if source.is_dir() else [source]
    digest = hashlib.sha256(b"".join(each.read_bytes() for each in files)).hexdigest()
    settings = asdict(config)
    for name in ("output", "measures"):
        del settings[name]
    values: dict[str, Any] = json.loads(json.dumps({"adapter_sha256": digest, **settings}))
    return values


def _write(path: Path, results: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(f".{path.name}.partial")
    partial_path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    partial_path.replace(path)


class Evaluation:
    """An adapter on its pipeline, and the people on whom it is measured.

    Each public method takes a measure and returns it in JSON's types. What several of them need is
    made once.
    """

    def __init__(self, config: EvaluationConfig) -> None:
        self._config, self._settings, self._seed = config, config.portraits, config.seed
        self._pipe = load_pipeline(config.portraits)
        reader = DatasetReader(config.data)
        self._people = held_out_people(reader, config.people, seed=config.seed, split=config.split)
        self._measurer = FaceMeasurer(self._pipe.adapter.reader.config)
        self._seeds = seeds_of(config.images, config.seed, "portraits")

    @cached_property
    def _model(self) -> Any:
        return adapted_model(self._pipe)

    @cached_property
    def _references(self) -> dict[str, MeasuredPicture]:
        records = [person.reference for person in self._people]
        return by_person(self._people, self._measurer.records(records))

    @cached_property
    def _identities(self) -> dict[str, Identity]:
        encode = self._pipe.encode_identity
        return by_person(self._people, [encode(person.reference) for person in self._people])

    @cached_property
    def _pictures(self) -> dict[str, list[Image]]:
        own = painters(self._pipe, self._settings, self._identities)
        return portraits(own, self._config.prompt, self._seeds)

    @cached_property
    def _measured(self) -> dict[str, list[MeasuredPicture]]:
        return self._measurer.by_person(self._pictures)

    def losses(self) -> dict[str, Any]:
        """The noise loss with the right, another and no identity."""
        return asdict(noise_losses(self._model, self._people, seed=self._seed))

    def attention(self) -> dict[str, Any]:
        """Where the region tokens' attention goes."""
        return asdict(attention_shares(self._model, self._people, seed=self._seed))

    def portraits(self) -> dict[str, Any]:
        """Whether portraits have a face, and resemble the person."""
        return asdict(measure_portraits(self._measured, self._references, seed=self._seed))

    def calibration(self) -> dict[str, Any]:
        """What the measures of `portraits` say of photographs, of the base, and of noise."""
        rows = calibration(
            self._pipe,
            self._settings,
            self._people,
            self._references,
            self._config.prompt,
            self._seeds,
            self._measurer,
            seed=self._seed,
        )
        return {name: asdict(row) for name, row in rows.items()}

    def regions(self) -> dict[str, Any]:
        """What changes when a region's token is another person's."""
        people = self._first(self._config.region_people)
        return {
            region: asdict(
                region_use(
                    partial(painter, self._pipe, self._settings),
                    people,
                    region,
                    self._config.prompt,
                    self._seeds[:2],
                    self._measurer,
                    seed=self._seed,
                )
            )
            for region in SWAPPED
        }

    def texts(self) -> dict[str, Any]:
        """Whether prompts say what portraits show, with the adapter and by the base alone."""
        people = self._first(self._config.text_people)
        own, base = (
            trait_shares(
                painters(self._pipe, self._settings, shown),
                self._config.images,
                self._measurer,
                seed=self._seed,
            )
            for shown in (people, dict.fromkeys(people))
        )
        differences = trait_differences(own, base, seed=self._seed)
        return {
            "with_identity": [asdict(each) for each in own],
            "base": [asdict(each) for each in base],
            "difference": {name: asdict(each) for name, each in differences.items()},
        }

    def copying(self) -> dict[str, Any]:
        """Whether portraits take pose and background from the reference photograph."""
        several = [person for person in self._people if person.another is not None]
        side = self._pipe.adapter.model.spec.resolution

        def cropped(people: list[Person], which: str) -> dict[str, MeasuredPicture]:
            pictures = photographs([getattr(person, which) for person in people], side)
            return by_person(people, self._measurer.pictures(pictures))

        return asdict(
            copying(
                self._measured,
                cropped(self._people, "reference"),
                cropped(several, "another"),
                seed=self._seed,
            )
        )

    def sheet(self) -> dict[str, Any]:
        """Draws the contact sheet, OUTPUT.png. Returns its file name, and what is written on it."""
        config = self._config
        prompts = self._settings.prompts or (config.prompt,)
        drawn = painters(self._pipe, self._settings, self._first(config.sheet_people))
        seeds = seeds_of(config.sheet_images, self._seed, "sheet")
        rows = [
            PersonRow(
                name, {p: self._measurer.pictures(paint([p] * len(seeds), seeds)) for p in prompts}
            )
            for name, paint in drawn.items()
        ]
        path = Path(config.output).with_suffix(".png")
        people_sheet(rows, self._references).save(path)
        compared = [
            (row.person, prompt, likeness(portrait, row.person, self._references))
            for row in rows
            for prompt, own in row.portraits.items()
            for portrait in own
        ]
        return {
            "file": path.name,
            "portraits": [
                {"person": person, "prompt": prompt, **(asdict(each) if each else {})}
                for person, prompt, each in compared
            ],
        }

    def _first(self, count: int) -> dict[str, Identity]:
        return dict([*self._identities.items()][:count])
