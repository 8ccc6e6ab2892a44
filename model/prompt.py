"""Prompts with marks: the facial description's nouns get `<|facial|>`, and the marks become token positions.

A mark stands behind the noun whose token a region's image will be fused into; it is taken out again
before the text encoder sees the ids. `legacy` repeats the reference's routine and its texts to the
letter (REFERENCE.md 4): clauses are re-ordered, capital or repeated words are missed, ids are cut
without an EOS. `corrected` leaves the description's order alone, finds words in any case, and pairs
a region with its own noun; instead of cutting ids it leaves out clauses, those without a mark
first, so that no mark is ever lost unsaid.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from model.spec import TOKEN_LIMIT, ModelSpec
from stages.regions import REGION_WORDS, Mode, word_of

IMAGE_MARK: Final = "<|image|>"  # never used, but it takes the id before the facial mark's
FACIAL_MARK: Final = "<|facial|>"
MAX_RAW_CAPTION: Final = 330  # characters of a description, inference (reference)
MAX_MARKED_CAPTION: Final = 340  # characters of a marked description, training (reference)

# What a description may call a region; the first form is the reference's only one.
_FORMS: Final = {
    "face": ("face",),
    "ears": ("ears", "ear"),
    "eyes": ("eyes", "eye"),
    "nose": ("nose",),
    "mouth": ("mouth", "lips"),
}
# tokens: with this much for the description a user's prompt keeps at least 25
_DETAIL_LIMIT: Final = 50
_LEAD: Final = 3  # words kept before the noun when a clause has to be shortened


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkedText:
    """A whole text with marks. `regions`: the region of each fused slot, in slot order; `dropped`:
    (region, reason).
    """

    text: str
    regions: tuple[str, ...]
    dropped: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenIds:
    """Ids of exactly TOKEN_LIMIT tokens without marks, and where the marked nouns stand in them,
    ascending.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]


def add_marks(tokenizer: Any) -> Any:
    """Teach a CLIP tokenizer the two marks, in the reference's order; returns the tokenizer.
    Idempotent.
    """
    tokenizer.add_tokens([IMAGE_MARK, FACIAL_MARK], special_tokens=True)
    return tokenizer


def tokenize_marked(
    text: str, tokenizer: Any, *, keep_eos: bool, pad_id: int | None = None
) -> TokenIds:
    """Ids without marks, cut or padded to TOKEN_LIMIT, and the marked nouns' positions that are
    within it.

    keep_eos=False cuts a long text without restoring EOS, as the reference does. The tokenizer must
    know the mark (`add_marks`); ValueError if not.
    """
    mark_id = tokenizer.convert_tokens_to_ids(FACIAL_MARK)
    if mark_id is None or mark_id == tokenizer.unk_token_id:
        raise ValueError(
            f"the tokenizer doesn't know {FACIAL_MARK}; pass it through add_marks first"
        )
    clean: list[int] = []
    positions: list[int] = []
    for token in cast(list[int], tokenizer.encode(text, verbose=False)):
        if token != mark_id:
            clean.append(token)
        elif len(clean) - 1 not in positions:
            positions.append(len(clean) - 1)
    if len(clean) > TOKEN_LIMIT:
        clean = (
            [*clean[: TOKEN_LIMIT - 1], tokenizer.eos_token_id] if keep_eos else clean[:TOKEN_LIMIT]
        )
    limit = TOKEN_LIMIT - 1 if keep_eos else TOKEN_LIMIT
    pad = tokenizer.pad_token_id if pad_id is None else pad_id
    ids = (*clean, *[pad] * (TOKEN_LIMIT - len(clean)))
    return TokenIds(
        ids=ids, positions=tuple(position for position in positions if position < limit)
    )


def fused_regions(
    text: MarkedText, tokenizer: Any, mode: Mode
) -> tuple[TokenIds, tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Where the marked nouns stand, the regions fused into them in that order, and (region, reason)
    of all others.

    Raises ValueError if marks and regions don't match.
    """
    tokens = tokenize_marked(text.text, tokenizer, keep_eos=mode == "corrected")
    slots = text.regions[: len(tokens.positions)]
    if len(slots) != len(tokens.positions):
        raise ValueError(f"{len(tokens.positions)} marks for {len(slots)} regions in {text.text!r}")
    cut = tuple((region, "mark_cut_off") for region in text.regions[len(slots) :])
    return tokens, slots, (*text.dropped, *cut)


def named_regions(text: str) -> tuple[str, ...]:
    """Those of REGION_WORDS that a text names, in any form and case."""
    return tuple(
        word
        for word in REGION_WORDS
        if any(re.search(rf"\b{form}\b", text, re.IGNORECASE) for form in _FORMS[word])
    )


def region_words(face_caption: str) -> dict[str, int]:
    """Region → words of the description's clause that names it first; a clause that names several
    counts for each.
    """
    clauses, _ = _marked_clauses(face_caption, REGION_WORDS)
    return {
        region: len(without_marks(clause.full).split())
        for clause in clauses
        for region in clause.regions
    }


def without_marks(text: str) -> str:
    return text.replace(FACIAL_MARK, "")


def training_text(
    caption: str,
    face_caption: str,
    regions: Sequence[str],
    tokenizer: Any,
    spec: ModelSpec,
    mode: Mode,
) -> MarkedText:
    """The text of a training sample: its coarse caption with its marked facial description.

    regions: names as `stages.regions.region_masks` gives them. Marks that stand in the caption
    already are taken out.
    """
    caption, face_caption = without_marks(caption), without_marks(face_caption)
    if mode == "corrected":
        return _fitted(caption, face_caption, regions, tokenizer)
    marked = mark_clauses(face_caption, regions)
    if len(marked.text) > MAX_MARKED_CAPTION:
        dropped = tuple((region, "caption_too_long") for region in marked.regions)
        return MarkedText(text=caption, regions=(), dropped=(*marked.dropped, *dropped))
    first, rest = _first_sentence(caption)
    text = f"Caption:{first} Detail:{marked.text}{rest[:-1]}"
    if _length(text, tokenizer) > TOKEN_LIMIT:
        text = f"Detail:{marked.text} Caption:{caption}"
    return MarkedText(text=text, regions=marked.regions, dropped=marked.dropped)


def inference_text(
    prompt: str,
    face_caption: str,
    regions: Sequence[str],
    tokenizer: Any,
    spec: ModelSpec,
    mode: Mode,
) -> MarkedText:
    """The text of a picture to be made: the user's prompt with the marked facial description.

    legacy ignores `face_caption` and describes every face in the words of `spec.template`, as the
    reference does. Marks that stand in the prompt already are taken out.
    """
    prompt, face_caption = without_marks(prompt), without_marks(face_caption)
    if mode == "corrected":
        return _fitted(prompt, face_caption or spec.template, regions, tokenizer)
    if len(spec.template) > MAX_RAW_CAPTION:
        return MarkedText(
            text=prompt, regions=(), dropped=tuple((name, "caption_too_long") for name in regions)
        )
    marked = mark_clauses(spec.template, regions)
    text = f"{prompt}{spec.detail_prefix}{marked.text}"
    if _length(text, tokenizer) > TOKEN_LIMIT:
        text = f"{spec.detail_prefix}{marked.text} Caption:{prompt}"
    return MarkedText(text=text, regions=marked.regions, dropped=marked.dropped)


def mark_clauses(face_caption: str, regions: Sequence[str]) -> MarkedText:
    """The reference's marker routine (`process_text_with_markers`, REFERENCE.md 4.2): marks, then
    re-ordered clauses.

    Regions whose word isn't there in lower case are dropped. The n-th region left goes to the n-th
    mark, and their orders differ (4.4): with eyes and ears both there, each gets the other's
    picture.
    """
    available = [
        word for word in REGION_WORDS if any(word_of(region) == word for region in regions)
    ]
    text = _without_repeats(" ".join(re.findall(r"\w+|[.,;!?]", face_caption)))
    found: list[str] = []
    for word in reversed(available):
        text, count = re.subn(rf"\b{word}\b", f"{word} <|{word}|>", text, count=1)
        found.extend([word] * count)
    clauses: list[str] = []
    for word in available:
        mark = f"<|{word}|>"
        at = text.find(mark)
        if at < 0:
            continue
        start = max(text.rfind(stop, 0, at) for stop in ",.;") + 1
        end = min(
            stop for stop in (*(text.find(stop, at) for stop in ",.;"), len(text)) if stop >= 0
        )
        clauses.append(text[start:end].strip() + ",")
        text = text[:start] + text[end:]
    marked = " ".join(clauses)
    for word in available:
        marked = marked.replace(f"<|{word}|>", FACIAL_MARK)
    return MarkedText(
        text=marked,
        regions=tuple(region for region in regions if word_of(region) in found),
        dropped=tuple(
            (region, "word_not_in_caption") for region in regions if word_of(region) not in found
        ),
    )


def _without_repeats(text: str) -> str:
    """Every region word but its first occurrence in any case taken out; the spaces round it stay."""
    for word in REGION_WORDS:
        matches = list(re.finditer(rf"\b{word}\b", text, re.IGNORECASE))
        for match in reversed(matches[1:]):
            text = text[: match.start()] + text[match.end() :]
    return text


def _first_sentence(caption: str) -> tuple[str, str]:
    end = caption.find(".") + 1
    return (caption[:end], caption[end:]) if end else (caption, "")


def _length(text: str, tokenizer: Any) -> int:
    return len(tokenizer.encode(text, verbose=False))


@dataclass(frozen=True, slots=True)
class _Clause:
    """A clause of the description. `full`, `short`: its text with marks, whole and cut down to the
    marked nouns.
    """

    full: str
    short: str
    regions: tuple[str, ...]


def _fitted(main: str, face_caption: str, regions: Sequence[str], tokenizer: Any) -> MarkedText:
    """Corrected: `main`, then the description; what doesn't fit is left out clause by clause,
    marked ones last.
    """
    clauses, missing = _marked_clauses(face_caption, regions)
    dropped = [(region, "word_not_in_caption") for region in missing]
    kept = {index: clause.short for index, clause in enumerate(clauses) if clause.regions}

    def detail() -> str:
        return " ".join(kept[index] for index in sorted(kept))

    def fits(text: str, limit: int) -> bool:
        return _length(without_marks(text), tokenizer) - 2 <= limit

    while kept and not fits(f"Detail: {detail()}", _DETAIL_LIMIT):
        index = max(kept)
        del kept[index]
        dropped.extend((region, "caption_too_long") for region in clauses[index].regions)
    for index in list(kept):
        _grow(kept, index, clauses[index].full, lambda: fits(f"Detail: {detail()}", _DETAIL_LIMIT))
    lead = _leading_part(main, lambda part: fits(_joined(part, detail()), TOKEN_LIMIT - 2))
    for index, clause in enumerate(clauses):
        if index not in kept and not clause.regions:
            _grow(kept, index, clause.full, lambda: fits(_joined(lead, detail()), TOKEN_LIMIT - 2))
    slots = tuple(region for index in sorted(kept) for region in clauses[index].regions)
    return MarkedText(text=_joined(lead, detail()), regions=slots, dropped=tuple(dropped))


def _joined(main: str, detail: str) -> str:
    return f"{main.strip()} Detail: {detail}".strip() if detail else main.strip()


def _grow(kept: dict[int, str], index: int, text: str, fits: Callable[[], bool]) -> None:
    before = kept.get(index)
    kept[index] = text
    if not fits():
        del kept[index]
        if before is not None:
            kept[index] = before


def _leading_part(text: str, fits: Callable[[str], bool]) -> str:
    """As many leading words as fit; at a clause's end if anything is cut and a clause's end is
    there.
    """
    if fits(text):
        return text
    words = text.split()
    low, high = 0, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(" ".join(words[:middle])) else (low, middle - 1)
    part = " ".join(words[:low])
    end = max(part.rfind(stop) for stop in ",.;!?")
    return part[: end + 1] if end > 0 else part


def _marked_clauses(face_caption: str, regions: Sequence[str]) -> tuple[list[_Clause], list[str]]:
    """The description's clauses with marks, and the regions whose word isn't in it."""
    spots: dict[int, str] = {}  # offset of a noun's end → region
    missing: list[str] = []
    for region in regions:
        forms = (
            re.search(rf"\b{form}\b", face_caption, re.IGNORECASE)
            for form in _FORMS[word_of(region)]
        )
        match = next((match for match in forms if match), None)
        if match is None:
            missing.append(region)
        else:
            spots[match.end()] = region
    clauses: list[_Clause] = []
    for piece in re.finditer(r"[^,.;!?]+[,.;!?]*\s*", face_caption):
        ends = sorted(end for end in spots if piece.start() < end <= piece.end())
        if piece.group().strip():
            clauses.append(
                _clause(
                    face_caption, piece.start(), piece.end(), ends, [spots[end] for end in ends]
                )
            )
    return clauses, missing


def _clause(
    text: str, start: int, end: int, ends: Sequence[int], regions: Sequence[str]
) -> _Clause:
    full, short, last = "", "", start
    for spot in ends:
        piece = text[last:spot]
        full += f"{piece} {FACIAL_MARK}"
        short += f"{' '.join(['', *piece.split()[-_LEAD - 1 :]])} {FACIAL_MARK}"
        last = spot
    return _Clause(
        full=(full + text[last:end]).strip(), short=f"{short.strip()},", regions=tuple(regions)
    )
