"""Marked texts: which words of a prompt a region is fused into, and their token positions.

A facial mark, `<|facial|>`, follows each noun whose token a region's image is fused into. The
marks are removed from the ids before the text encoder reads them.

`legacy` gives exactly the reference's texts (its functions.py): it re-orders clauses, misses
capitalised and repeated words, and truncates ids without an EOS. `corrected` preserves the order
of the description, finds words in any case, and pairs a region with its own noun. It doesn't
truncate ids but leaves out clauses, those without a mark first, and reports every region that
loses its mark.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from model.spec import TOKEN_LIMIT, ModelSpec
from stages.regions import REGION_WORDS, Mode, word_of

IMAGE_MARK: Final = "<|image|>"  # unused, but the facial mark has the id behind it
FACIAL_MARK: Final = "<|facial|>"
MAX_RAW_CAPTION: Final = 330  # characters of a description in legacy inference (reference)
MAX_MARKED_CAPTION: Final = 340  # characters of a marked description in legacy training (reference)

# The words for each region in a description. The reference knows only the first one.
_FORMS: Final = {
    "face": ("face",),
    "ears": ("ears", "ear"),
    "eyes": ("eyes", "eye"),
    "nose": ("nose",),
    "mouth": ("mouth", "lips"),
}
# Tokens for the facial description, which leaves at least 25 to the prompt.
_DETAIL_LIMIT: Final = 50
_LEAD: Final = 3  # words before the noun that a shortened clause retains


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkedText:
    """A text with marks.

    regions: the region of each mark, in the order of the slots. dropped: (region, reason) of the
    regions without a mark. cut: the last words of the prompt, or in corrected mode of the caption,
    that the token limit leaves no room for; "" if all are read.
    """

    text: str
    regions: tuple[str, ...]
    dropped: tuple[tuple[str, str], ...] = ()
    cut: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenIds:
    """Exactly TOKEN_LIMIT ids without marks, and the marked nouns' positions in them, ascending."""

    ids: tuple[int, ...]
    positions: tuple[int, ...]


def add_marks(tokenizer: Any) -> Any:
    """Adds the two marks to a CLIP tokenizer, in the reference's order, and returns the tokenizer.

    Adding them a second time changes nothing.
    """
    tokenizer.add_tokens([IMAGE_MARK, FACIAL_MARK], special_tokens=True)
    return tokenizer


def tokenize_marked(
    text: str, tokenizer: Any, *, keep_eos: bool, pad_id: int | None = None
) -> TokenIds:
    """Tokenizes a text with marks into TOKEN_LIMIT ids without marks, and the marked positions.

    A long text is truncated, a short one padded with pad_id (None: the tokenizer's own). Positions
    beyond the limit are left out. keep_eos=False truncates without restoring EOS, as the reference
    does. Raises ValueError if the marks were not added to the tokenizer (`add_marks`).
    """
    mark_id = tokenizer.convert_tokens_to_ids(FACIAL_MARK)
    if mark_id is None or mark_id == tokenizer.unk_token_id:
        raise ValueError(f"the tokenizer has no token {FACIAL_MARK}; call add_marks on it first")
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
    """Returns a text's tokens, the regions fused into its marked nouns, and the dropped regions.

    The regions are in the order of the positions; dropped regions are (region, reason). Raises
    ValueError if the text has more marks than regions.
    """
    tokens = tokenize_marked(text.text, tokenizer, keep_eos=mode == "corrected")
    slots = text.regions[: len(tokens.positions)]
    if len(slots) != len(tokens.positions):
        raise ValueError(
            f"{len(tokens.positions)} marks for {len(slots)} regions in {text.text!r}; expected a "
            "text with a region for every mark"
        )
    cut = tuple((region, "mark_cut_off") for region in text.regions[len(slots) :])
    return tokens, slots, (*text.dropped, *cut)


def named_regions(text: str) -> tuple[str, ...]:
    """Returns those of REGION_WORDS that a text contains, in any form and case."""
    return tuple(region_nouns(text))


def region_nouns(text: str, regions: Sequence[str] = REGION_WORDS) -> dict[str, re.Match[str]]:
    """Returns for each region that a text names the noun that gets its mark in corrected mode.

    regions: names as in `stages.regions.region_masks`, in whose order the result is.
    """
    nouns: dict[str, re.Match[str]] = {}
    for region in regions:
        forms = (re.search(rf"\b{form}\b", text, re.IGNORECASE) for form in _FORMS[word_of(region)])
        if match := next((match for match in forms if match), None):
            nouns[region] = match
    return nouns


def region_words(face_caption: str) -> dict[str, int]:
    """Returns for each region the number of words in the first clause that names it.

    A clause that names several regions counts for each of them.
    """
    clauses, _ = _marked_clauses(face_caption, REGION_WORDS)
    return {
        region: len(without_marks(clause.full).split())
        for clause in clauses
        for region in clause.regions
    }


def without_marks(text: str) -> str:
    """Returns the text without facial marks."""
    return text.replace(FACIAL_MARK, "")


def training_text(
    caption: str,
    face_caption: str,
    regions: Sequence[str],
    tokenizer: Any,
    spec: ModelSpec,
    mode: Mode,
) -> MarkedText:
    """Returns the text of a training sample: its caption with its marked facial description.

    regions: names as in `stages.regions.region_masks`. Marks in the captions themselves are
    removed.
    """
    caption, face_caption = without_marks(caption), without_marks(face_caption)
    if mode == "corrected":
        return _fit_text(caption, face_caption, regions, tokenizer)
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
    """Returns the text of an image to generate: the user's prompt with a marked facial description.

    As in the reference, legacy mode ignores `face_caption` and describes every face by
    `spec.template`. Marks in the prompt itself are removed.
    """
    prompt, face_caption = without_marks(prompt), without_marks(face_caption)
    if mode == "corrected":
        return _fit_text(prompt, face_caption or spec.template, regions, tokenizer)
    if len(spec.template) > MAX_RAW_CAPTION:
        return MarkedText(
            text=prompt, regions=(), dropped=tuple((name, "caption_too_long") for name in regions)
        )
    marked = mark_clauses(spec.template, regions)
    text = f"{prompt}{spec.detail_prefix}{marked.text}"
    cut = ""
    if _length(text, tokenizer) > TOKEN_LIMIT:
        before = f"{spec.detail_prefix}{marked.text} Caption:"
        text = f"{before}{prompt}"
        # Without marks, and without the EOS that legacy texts lose.
        words = _fitting_words(
            prompt, lambda part: _length(without_marks(before + part), tokenizer) - 1 <= TOKEN_LIMIT
        )
        cut = " ".join(prompt.split()[words:])
    return MarkedText(text=text, regions=marked.regions, dropped=marked.dropped, cut=cut)


def mark_clauses(face_caption: str, regions: Sequence[str]) -> MarkedText:
    """Marks the nouns of a description and re-orders its clauses, as the reference does.

    This is `process_text_with_markers` of its functions.py. Regions whose word doesn't occur in
    lower case are dropped. The n-th remaining region is paired with the n-th mark although their
    orders differ, so with both eyes and ears in the text, each gets the other's image. Where a
    clause has several marks, or a region's word is missing, punctuation may be left as clauses of
    its own: "a face <|facial|> and a nose <|facial|>, .,".
    """
    available = [
        word for word in REGION_WORDS if any(word_of(region) == word for region in regions)
    ]
    text = _without_repeats(" ".join(re.findall(r"\w+|[.,;!?]", face_caption)))
    marked_words: list[str] = []
    for word in reversed(available):
        text, count = re.subn(rf"\b{word}\b", f"{word} <|{word}|>", text, count=1)
        marked_words.extend([word] * count)
    clauses: list[str] = []
    for word in available:
        mark = f"<|{word}|>"
        # find returns -1 for a mark that the text doesn't contain, or that was in a moved clause.
        # The reference uses -1 as a position, so the clause may be the last character.
        start = text.find(mark)
        ends = (text.find(stop, start + len(mark)) for stop in ",.;")
        end = min((stop for stop in ends if stop >= 0), default=len(text))
        if start > 0:
            start = max(text.rfind(stop, 0, start) for stop in ",.;") + 1
        if clause := text[start:end].strip():
            clauses.append(clause + ",")
            text = text[:start] + text[end:]
    marked = " ".join(clauses)
    for word in available:
        marked = marked.replace(f"<|{word}|>", FACIAL_MARK)
    return MarkedText(
        text=marked,
        regions=tuple(region for region in regions if word_of(region) in marked_words),
        dropped=tuple(
            (region, "word_not_in_caption")
            for region in regions
            if word_of(region) not in marked_words
        ),
    )


def _without_repeats(text: str) -> str:
    """Removes all but the first occurrence, in any case, of each region word; spaces remain."""
    for word in REGION_WORDS:
        matches = list(re.finditer(rf"\b{word}\b", text, re.IGNORECASE))
        for match in reversed(matches[1:]):
            text = text[: match.start()] + text[match.end() :]
    return text


def _first_sentence(caption: str) -> tuple[str, str]:
    """Splits a caption behind its first full stop; without one, all of it is the first part."""
    end = caption.find(".") + 1
    return (caption[:end], caption[end:]) if end else (caption, "")


def _length(text: str, tokenizer: Any) -> int:
    """Returns the number of tokens of a text, BOS and EOS included."""
    return len(tokenizer.encode(text, verbose=False))


@dataclass(frozen=True, slots=True)
class _Clause:
    """A clause of the description, with marks.

    full: its whole text. short: only the marked nouns, each with the few words before it.
    """

    full: str
    short: str
    regions: tuple[str, ...]


def _fit_text(main: str, face_caption: str, regions: Sequence[str], tokenizer: Any) -> MarkedText:
    """Joins `main` and the marked description within the token limit (corrected mode).

    It starts with the short form of the marked clauses and leaves out the last ones while they are
    too long. Then, as far as there is room, it extends the marked clauses to their full text, adds
    the leading part of `main`, and adds the clauses without a mark.
    """
    clauses, missing = _marked_clauses(face_caption, regions)
    dropped = [(region, "word_not_in_caption") for region in missing]
    texts = {index: clause.short for index, clause in enumerate(clauses) if clause.regions}

    def detail() -> str:
        return " ".join(texts[index] for index in sorted(texts))

    def fits(text: str, limit: int) -> bool:
        return _length(without_marks(text), tokenizer) - 2 <= limit

    while texts and not fits(f"Detail: {detail()}", _DETAIL_LIMIT):
        index = max(texts)
        del texts[index]
        dropped.extend((region, "caption_too_long") for region in clauses[index].regions)
    for index in list(texts):
        _set_if_fits(
            texts, index, clauses[index].full, lambda: fits(f"Detail: {detail()}", _DETAIL_LIMIT)
        )
    lead = _leading_part(main, lambda part: fits(_joined(part, detail()), TOKEN_LIMIT - 2))
    for index, clause in enumerate(clauses):
        if index not in texts and not clause.regions:
            _set_if_fits(
                texts, index, clause.full, lambda: fits(_joined(lead, detail()), TOKEN_LIMIT - 2)
            )
    slots = tuple(region for index in sorted(texts) for region in clauses[index].regions)
    cut = " ".join(main.split())[len(lead) :].strip() if lead != main else ""
    return MarkedText(text=_joined(lead, detail()), regions=slots, dropped=tuple(dropped), cut=cut)


def _joined(main: str, detail: str) -> str:
    return f"{main.strip()} Detail: {detail}".strip() if detail else main.strip()


def _set_if_fits(texts: dict[int, str], index: int, text: str, fits: Callable[[], bool]) -> None:
    """Sets texts[index] to `text`, and restores what was there if the result doesn't fit."""
    before = texts.get(index)
    texts[index] = text
    if not fits():
        del texts[index]
        if before is not None:
            texts[index] = before


def _leading_part(text: str, fits: Callable[[str], bool]) -> str:
    """Returns as many leading words as fit, if possible up to the end of a clause."""
    if fits(text):
        return text
    part = " ".join(text.split()[: _fitting_words(text, fits)])
    end = max(part.rfind(stop) for stop in ",.;!?")
    return part[: end + 1] if end > 0 else part


def _fitting_words(text: str, fits: Callable[[str], bool]) -> int:
    """Returns how many leading words of a text fit."""
    words = text.split()
    low, high = 0, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(" ".join(words[:middle])) else (low, middle - 1)
    return low


def _marked_clauses(face_caption: str, regions: Sequence[str]) -> tuple[list[_Clause], list[str]]:
    """Returns the description's clauses with marks, and the regions that it doesn't name."""
    nouns = region_nouns(face_caption, regions)
    region_at = {match.end(): region for region, match in nouns.items()}
    missing = [region for region in regions if region not in nouns]
    clauses: list[_Clause] = []
    for piece in re.finditer(r"[^,.;!?]+[,.;!?]*\s*", face_caption):
        ends = sorted(end for end in region_at if piece.start() < end <= piece.end())
        named = [region_at[end] for end in ends]
        if piece.group().strip():
            clauses.append(_clause(face_caption, piece.start(), piece.end(), ends, named))
    return clauses, missing


def _clause(
    text: str, start: int, end: int, ends: Sequence[int], regions: Sequence[str]
) -> _Clause:
    """Builds the clause text[start:end]; `ends` are the offsets behind its nouns, ascending."""
    full, short, last = "", "", start
    for noun_end in ends:
        piece = text[last:noun_end]
        full += f"{piece} {FACIAL_MARK}"
        short += f"{' '.join(['', *piece.split()[-_LEAD - 1 :]])} {FACIAL_MARK}"
        last = noun_end
    return _Clause(
        full=(full + text[last:end]).strip(), short=f"{short.strip()},", regions=tuple(regions)
    )
