"""Caption: writes a caption of each image and one of its main face, with `config.backend`.

Answers of a vision-language model are checked (stages/answers). What can't be mended is tried once
more with another prompt; after that the record fails, by the verdict on its second answer. If that
happens to too many of the first captions, the captioner doesn't fit, and the run stops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from configs.captions import FACE_PROMPT, PROMPT, CaptionConfig
from configs.common import hashed_settings
from configs.errors import QualityError
from configs.schema import ResizeConfig
from stages.annotations import Answers
from stages.answers import (
    ANSWERS_VERSION,
    CUT,
    EMPTY,
    LOOP,
    NAMES_A_PERSON,
    NOT_ENGLISH,
    REFUSAL,
    Mended,
    mended,
)
from stages.backends.protocols import Answer, Kind
from stages.backends.registry import backend_class
from stages.backends.views import face_height, has_small_face
from stages.backends.weights import Weights
from stages.base import BackendStage, Failed, reject
from stages.codec import decode_jpeg, decode_labels
from stages.record import Record

# Version 0.1 hashed one set of settings for all backends. A setting that the chosen backend doesn't
# have is still hashed, with its default of version 0.1. If one of these constants is changed, its
# present value must be written here instead.
_HASHED_IN_0_1: Final = {
    "model": "",
    "prompt": PROMPT,
    "face_prompt": FACE_PROMPT,
    "max_new_tokens": 512,
    "dtype": "float32",
    "quantize": "none",
}
_FIRST: Final = 200  # captions that tell whether the captioner fits
_PART: Final = 50
_EXAMPLES: Final = 10
_BAD_INPUT: Final = "bad_input"
_KINDS: Final = ("coarse", "fine")  # names of the kinds
_BOTH: Final[tuple[Kind, Kind]] = (0, 1)
# the reason of failure for each fatal verdict
_REASONS: Final = {
    EMPTY: "empty_caption",
    LOOP: "caption_loop",
    REFUSAL: "caption_refusal",
    NOT_ENGLISH: "caption_not_english",
    NAMES_A_PERSON: "caption_names_a_person",
    CUT: "caption_cut",
}


@dataclass(frozen=True, slots=True)
class _Draft:
    """A checked answer. first: the checked answer before it, if this is that of the second try."""

    answer: Answer
    checked: Mended
    first: Mended | None = None


class _FirstCaptions:
    """Counts the useless captions among the first ones of a copy of the stage. limit: the share
    that may be useless.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._count, self._useless, self._examples = 0, 0, list[str]()

    @property
    def counted(self) -> bool:
        """Whether all first captions are counted."""
        return self._count >= _FIRST

    def add(self, record: Record) -> None:
        """Counts a captioned or failed record. Raises QualityError when the limit is exceeded."""
        if self.counted or record.reason == _BAD_INPUT:
            return
        self._count += 1
        if not (why := _useless_because(record)):
            return
        self._useless += 1
        if len(self._examples) < _EXAMPLES:
            self._examples.append(f"\n  {record.source}: {why}")
        if self._useless > self._limit * _FIRST:
            raise QualityError(
                f"{self._useless} of the first {self._count} captions failed or needed a second "
                f"try. Of the first {_FIRST}, at most {self._limit:.0%} may (caption.max_useless). "
                "Change the prompt or the model, or raise that limit; 1 never stops a run. "
                f"Finished shards are kept. The first ones:{''.join(self._examples)}"
            )


def _useless_because(record: Record) -> str:
    """Returns why a record has no caption, or one of a second try only; "" for any other."""
    if not record.ok:
        return f"{record.reason}: {record.detail}"
    answers = record.annotation(Answers)
    first = zip(_KINDS, answers.first_verdicts if answers else ("", ""), strict=True)
    return ", ".join(f"{kind} description: {why}, then tried again" for kind, why in first if why)


class CaptionStage(BackendStage):
    """Captions the records of a batch together; a record that can't be captioned fails alone.

    Reasons of failure: `bad_input` (image, label map and main face don't fit together),
    `caption_failed` (the model server gave no usable response for this image), `empty_caption`,
    and if answers are checked those of _REASONS. largest: short and long side of the run's largest
    image, pixels.
    """

    name = "caption"
    version = 1
    requires = ("image", "faces", "face", "parsing")
    provides: tuple[str, ...] = ("caption", "face_caption")
    config: CaptionConfig

    def __init__(
        self,
        config: CaptionConfig,
        weights: Weights,
        largest: tuple[int, int] = ResizeConfig().largest,
    ) -> None:
        super().__init__(config, weights)
        self._largest = largest
        if self._checks:
            self.provides, self.annotation = (*self.provides, Answers.name), Answers
        self._first = _FirstCaptions(config.max_useless)

    @property
    def _checks(self) -> bool:
        """Whether answers are checked. Composed captions have nothing to check."""
        return getattr(self.backend_config, "check_answers", False)

    def hashed_settings(self) -> dict[str, Any]:
        settings = hashed_settings(self.backend_config)
        return {**_HASHED_IN_0_1, "backend": self.config.backend, **settings}

    def digests(self) -> Mapping[str, str]:
        digests: Mapping[str, str] = self._captioner.digests(self.backend_config)
        return {**digests, "answers": ANSWERS_VERSION} if self._checks else digests

    @property
    def batch_size(self) -> int:
        window: int = self._captioner.window(self.backend_config, self.resources.batch_size)
        return window

    @property
    def backend_config(self) -> Any:
        """The section of the chosen backend. Raises ConfigError for an unknown backend."""
        backend_class(self.name, self.config.backend)
        return getattr(self.config, self.config.backend)

    @property
    def _captioner(self) -> Any:
        return backend_class(self.name, self.config.backend)

    def preflight(self) -> None:
        """Raises PipelineError if the captioner has a check that fails, such as of its servers."""
        check_captioner = getattr(self._captioner, "preflight", None)
        if check_captioner is not None:
            check_captioner(self.backend_config, self._largest)

    def setup(self) -> None:
        super().setup()
        prepare = getattr(self.backend, "prepare", None)
        if prepare is not None:
            prepare(self._largest, _is_useless if self._checks else None)

    def process(self, records: list[Record]) -> list[Record]:
        captioned: list[Record] = []
        while len(captioned) < len(records):
            # a large window would ask for many more captions than are needed to see that they fail
            small = self._captioner.independent and not self._first.counted
            size = _PART if small else len(records)
            part = self._process(records[len(captioned) :][:size])
            for record in part:
                self._first.add(record)
            captioned += part
        return captioned

    def _process(self, records: list[Record]) -> list[Record]:
        valid: list[Record] = []
        results: dict[str, Record] = {}
        for record in records:
            try:
                check(record)
                valid.append(record)
            except Failed as rejection:
                results[record.key] = reject(record, rejection, self.name)
        answers: Sequence[tuple[Answer, Answer] | Failed] = (
            self.backend.caption(valid, self.resources.batch_size) if valid else []
        )
        captioned = self._checked(valid, answers) if self._checks else _unchecked(valid, answers)
        results |= {record.key: record for record in captioned}
        return [results[record.key] for record in records]

    def _checked(
        self, records: Sequence[Record], answers: Sequence[tuple[Answer, Answer] | Failed]
    ) -> list[Record]:
        """Returns the records with mended captions, or failed, in order."""
        failures = {i: pair for i, pair in enumerate(answers) if isinstance(pair, Failed)}
        drafts = {
            i: [_Draft(answer, mended(answer)) for answer in pair]
            for i, pair in enumerate(answers)
            if not isinstance(pair, Failed)
        }
        useless = [(i, k) for i, pair in drafts.items() for k in _BOTH if pair[k].checked.fatal]
        asked = [records[i] for i, _ in useless]
        kinds = [kind for _, kind in useless]
        size = self.resources.batch_size
        tries = self.backend.retry(asked, kinds, size) if asked else []
        for (i, kind), answer in zip(useless, tries, strict=True):
            if isinstance(answer, Failed):
                failures.setdefault(i, answer)
                continue
            draft = _Draft(answer, mended(answer), drafts[i][kind].checked)
            drafts[i][kind] = draft
            if draft.checked.fatal:
                failures.setdefault(i, _useless(kind, draft))
        return [
            reject(record, failures[i], self.name)
            if i in failures
            else _annotated(record, drafts[i], self.backend_config.face_view_below)
            for i, record in enumerate(records)
        ]


def _is_useless(answer: Answer) -> bool:
    return bool(mended(answer).fatal)


def _useless(kind: int, draft: _Draft) -> Failed:
    """Returns why a record fails whose second answer is no caption either."""
    about = f" ({draft.checked.detail})" if draft.checked.detail else ""
    return Failed(
        _REASONS[draft.checked.fatal],
        f"the {_KINDS[kind]} description, after a second try{about}: {draft.answer.text!r}",
    )


def _annotated(record: Record, drafts: Sequence[_Draft], face_view_below: float) -> Record:
    checked, firsts = [d.checked for d in drafts], [d.first for d in drafts]
    answers = Answers(
        answer_finish=tuple(draft.answer.finish for draft in drafts),
        answer_verdicts=tuple(" ".join(each.verdicts) for each in checked),
        answer_mended=tuple(each.was_mended for each in checked),
        first_verdicts=tuple(" ".join(first.verdicts) if first else "" for first in firsts),
        mended_answers=sum(each.was_mended for each in checked),
        second_tries=sum(first is not None for first in firsts),
        face_height=face_height(record),
        face_view=has_small_face(record, face_view_below),
    )
    caption, face_caption = (each.text for each in checked)
    return replace(record, caption=caption, face_caption=face_caption).annotated(answers)


def _unchecked(
    records: Sequence[Record], answers: Sequence[tuple[Answer, Answer] | Failed]
) -> list[Record]:
    """Returns the records with the answers as captions; a record fails if one is empty."""
    return [_captioned(record, pair) for record, pair in zip(records, answers, strict=True)]


def _captioned(record: Record, pair: tuple[Answer, Answer] | Failed) -> Record:
    if isinstance(pair, Failed):
        return reject(record, pair, CaptionStage.name)
    for kind, answer in zip(_KINDS, pair, strict=True):
        if not answer.text.strip():
            empty = Failed("empty_caption", f"the {kind} description is empty")
            return reject(record, empty, CaptionStage.name)
    return replace(record, caption=pair[0].text, face_caption=pair[1].text)


def check(record: Record) -> None:
    """Raises Failed unless the image decodes, the label map has the image's size, and the main face
    has five landmarks.
    """
    if not record.image or not record.parsing:
        raise Failed(_BAD_INPUT, f"no {'label map' if record.image else 'image'}")
    try:
        size = decode_jpeg(record.image).shape[:2]
        labels = decode_labels(record.parsing).shape
        landmarks = len(record.main_face.landmarks)
    except ValueError as error:
        raise Failed(_BAD_INPUT, str(error)) from error
    if size != labels:
        raise Failed(_BAD_INPUT, f"image {size[1]}×{size[0]}, label map {labels[1]}×{labels[0]}")
    if landmarks != 5:
        raise Failed(_BAD_INPUT, f"{landmarks} landmarks, expected 5")
