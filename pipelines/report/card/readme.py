"""Data card: OUT/README.md, in the form that Hugging Face defines, and OUT/croissant.json.

Licences, authors and reasons are text from outside the program. The front matter is written as
YAML, which quotes them; in tables, every character that Markdown or HTML could interpret is written
as an entity. The card names no image and no person.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import yaml

from pipelines.report.card.croissant import croissant_json
from pipelines.report.card.summary import PROVENANCE, Summary, summarise
from pipelines.report.card.texts import (
    BIASES,
    DESCRIPTION,
    KEYWORDS,
    LIMITS,
    PERSONAL,
    READING,
    REBUILDING,
    REMOVAL,
    USES,
)
from pipelines.report.stats import Report
from stages.backends.weights import WEIGHTS
from stages.storage import layout
from stages.storage.layout import SHARDS, SIDECARS, TARS
from stages.storage.reader import IDENTITIES_SCHEMA, DatasetReader
from stages.storage.samples import MEMBERS
from stages.storage.store import Store

_MAX_ROWS: Final = 50  # of a table of licences, authors or consents
_MAX_CELL: Final = 120  # characters
_LITERAL: Final = frozenset(" ,.:;/()'\"?=%-…")  # neither Markdown nor HTML inside a cell
_SIZES: Final = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
)
_LICENSES: Final = re.compile(
    r"cc0-1\.0|cc-by(-nc)?(-sa|-nd)?-(2\.0|2\.5|3\.0|4\.0)|apache-2\.0|mit|odbl|odc-by|pddl|unlicense"
)
# section of the configuration → pattern of the settings that are rules
_RULES: Final = {
    "rights": "",
    "resize": "m(in|ax)_",
    "detect": "m(in|ax)_",
    "rules": "",
    "global_pass": "",
}


def write_card(store: Store, report: Report) -> None:
    """Writes OUT/README.md and OUT/croissant.json. report: of the same data set."""
    summary = summarise(DatasetReader(store), report)
    store.write_if_changed(layout.README, card_text(summary))
    store.write_if_changed(layout.CROISSANT, croissant_json(summary))


def card_text(summary: Summary) -> str:
    """The content of README.md."""
    sections = {
        "How it was made": _stages(summary),
        "Inputs": _ledger(summary),
        "Rules": _rules(summary),
        "Fields": _fields(summary),
        "Identities and split": _identities(summary),
        "Licences, authors, consent": _provenance(summary),
        "Personal data": f"{PERSONAL}\n\n{REMOVAL}\n\n{_takedowns(summary)}",
        "Uses": _list(USES),
        "Known limits": _limits(summary),
        "Reading": READING,
        "Reproducing": REBUILDING,
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    head = (
        f"{summary.written:,} samples in {len(summary.manifests):,} shards, made from "
        f"{summary.inputs:,} inputs by the ConsistentID pipeline."
    )
    introduction = f"# FGID data set\n\n{DESCRIPTION}\n\n{head}"
    return f"---\n{_front_matter(summary)}---\n\n{introduction}\n\n{body}\n"


def _front_matter(summary: Summary) -> str:
    stated = [name for name, count in summary.provenance["license"].items() if count]
    licenses = sorted({_license(name) for name in stated}) or ["unknown"]
    others = sorted(name for name in stated if _license(name) == "other")
    values: dict[str, Any] = {
        "pretty_name": "FGID data set",
        "license": licenses if len(licenses) > 1 else licenses[0],
    }
    if others:
        values["license_name"] = others[0] if len(others) == 1 else "several, see below"
    size = next((name for limit, name in _SIZES if summary.written < limit), "n>10M")
    data_files = [{"split": "mixed", "path": f"{SHARDS}/{TARS}"}]
    values |= {
        "size_categories": [size],
        "task_categories": ["text-to-image", "image-to-image", "image-segmentation"],
        "annotations_creators": ["machine-generated"],
        "tags": list(KEYWORDS),
        "configs": [{"config_name": "default", "data_files": data_files}],
    }
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=False, width=120)


def _license(stated: str) -> str:
    """Hugging Face's identifier of a licence; `unknown` for "", `other` for one that has none."""
    name = re.sub(r"[\s_]+", "-", stated.strip().lower())
    return "unknown" if not name else name if _LICENSES.fullmatch(name) else "other"


def _stages(summary: Summary) -> str:
    dataset = summary.dataset
    backends: Mapping[str, str] = dataset.get("backends", {})
    signatures: Sequence[str] = dataset.get("signatures", [])
    stages = zip(dataset.get("stages", []), signatures, strict=False)
    rows = [(stage, signature, backends.get(stage, "")) for stage, signature in stages]
    text = [_table(("stage", "signature", "backend"), rows)]
    if model := _caption_model(summary.config):
        text.append(
            f"The captions were made by {_cell(_public(model))}, which has its own licence."
        )
    older = sum(list(manifest.signatures) != list(signatures) for manifest in summary.manifests)
    if older:
        text.append(f"{older:,} shards were made with other signatures; their manifests list them.")
    weights = [
        (weight["file"], weight["sha256"], weight["license"], _commercial(weight["name"]))
        for weight in dataset.get("weights", [])
    ]
    text.append(_table(("weights", "sha256", "licence", "commercial use"), weights))
    return "\n\n".join(text)


def _caption_model(config: Mapping[str, Any]) -> str:
    """The model of the caption backend, "" where it has none."""
    caption = config.get("caption", {})
    section = caption.get(caption.get("backend", ""), {}) or {}
    return str(section.get("model", ""))


def _commercial(name: str) -> str:
    if name not in WEIGHTS:
        return "not known"
    return "yes" if WEIGHTS[name].commercial else "no"


def _public(model: str) -> str:
    """A model's name on the hub. A path or an address is private, and is not named."""
    return model if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) else "a private model"


def _ledger(summary: Summary) -> str:
    rows = [("written", "", f"{summary.written:,}")]
    for status in ("dropped", "failed"):
        counts = [(-n, reason) for (of, reason), n in summary.unwritten.items() if of == status]
        rows += [(status, reason, f"{-count:,}") for count, reason in sorted(counts)]
    unwritten = sum(summary.unwritten.values())
    total = f"{summary.inputs:,} = {summary.written:,} written + {unwritten:,} dropped or failed."
    return f"{_table(('status', 'reason', 'inputs'), rows)}\n\n{total}"


def _rules(summary: Summary) -> str:
    rows = [
        (
            f"{section}.{name}",
            (", ".join(map(str, value)) or "any") if isinstance(value, list) else str(value),
        )
        for section, pattern in _RULES.items()
        for name, value in summary.config.get(section, {}).items()
        if name != "placement" and re.match(pattern, name)
    ]
    return f"{_table(('setting', 'value'), rows)}\n\nAll settings are in `config.yaml`."


def _fields(summary: Summary) -> str:
    members = [(f"KEY.{name}", description) for name, description in MEMBERS.items()]
    columns = [(column.name, column.description) for column in summary.columns.values()]
    identities = [
        (field.name, field.metadata[b"description"].decode()) for field in IDENTITIES_SCHEMA
    ]
    return "\n\n".join(
        (
            f"A sample is the files `KEY.*` of a tar, `{SHARDS}/{TARS}`:",
            _table(("file", "holds"), members),
            f"The sidecar of each tar, `{SHARDS}/{SIDECARS}`, has a row for every input, also "
            "dropped and failed ones:",
            _table(("column", "holds"), columns),
            f"`{layout.IDENTITIES}` has a row for every sample:",
            _table(("column", "holds"), identities),
        )
    )


def _identities(summary: Summary) -> str:
    if not summary.identities:
        return "The samples have no identities yet: the run was not completed."
    rows = [
        (name, f"{side.samples:,}", f"{side.identities:,}") for name, side in summary.sides.items()
    ]
    check = (
        f"**{summary.divided:,} identities are on both sides of the split.** Run `python -m "
        "pipelines.cli lint OUT`."
        if summary.divided
        else "No identity is on both sides. The side depends on the identity only, so it doesn't "
        "change when the identity gets more samples."
    )
    table = _table(("split", "samples", "identities"), rows)
    method = "Samples are grouped into identities by the similarity of their identity embeddings."
    if summary.with_person:
        method = (
            f"The source states the person of {summary.with_person:,} samples: those of one person "
            f"are an identity. The others are grouped by the similarity of their identity "
            f"embeddings, among themselves."
        )
    return f"{method}\n\n{table}\n\n{check}"


def _provenance(summary: Summary) -> str:
    text = ["Numbers of samples, with the texts that the source states:"]
    titles = {"license": "licence"}
    for name in PROVENANCE:
        rows = _most_common(summary.provenance[name], f"others, see `{name}` in the sidecars")
        text.append(_table((titles.get(name, name), "samples"), rows))
    return "\n\n".join(text)


def _most_common(counts: Counter[str], others: str) -> list[tuple[str, str]]:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rows = [(text or "not stated", f"{count:,}") for text, count in ordered[:_MAX_ROWS]]
    if rest := ordered[_MAX_ROWS:]:
        rows.append((f"{len(rest):,} {others}", f"{sum(count for _, count in rest):,}"))
    return rows


def _takedowns(summary: Summary) -> str:
    if not summary.takedowns:
        return "Nothing was taken down so far."
    rows = [(by, f"{times:,}", f"{inputs:,}") for by, (times, inputs) in summary.takedowns.items()]
    return f"Taken down so far:\n\n{_table(('by', 'times', 'images'), rows)}"


def _limits(summary: Summary) -> str:
    limits = [BIASES, *LIMITS]
    if summary.untrainable:
        share = summary.untrainable / summary.reviewed
        limits.append(
            f"{summary.untrainable:,} of {summary.reviewed:,} samples ({share:.1%}) are not "
            "trainable: their captions name no region that is shown, or are too long (`trainable` "
            "in the sidecars)."
        )
    return _list(limits)


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [tuple(map(_cell, row)) for row in rows]
    if not lines:
        return f"No {head[0]} was recorded."
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ("---",) * len(head), *lines))


def _cell(text: str) -> str:
    """Text as one cell of a table, without Markdown, HTML or line breaks. Some readers show an
    address in it as a link."""
    plain = "".join(" " if unicodedata.category(letter)[0] in "CZ" else letter for letter in text)
    plain = " ".join(plain.split())
    plain = plain if len(plain) <= _MAX_CELL else f"{plain[: _MAX_CELL - 1]}…"
    escaped = "".join(
        letter if letter.isalnum() or letter in _LITERAL else f"&#{ord(letter)};"
        for letter in plain
    )
    # An underscore inside a word is not Markdown.
    return re.sub(r"(?<=[a-z0-9])&#95;(?=[a-z0-9])", "_", escaped)
