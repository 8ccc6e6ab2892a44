"""Card: OUT/README.md, a data card in Hugging Face's form, and OUT/croissant.json beside it.

Licences, authors and reasons come from outside: in the front matter YAML quotes them, in tables
every character that Markdown or HTML could take for more than itself is written as an entity. No
picture's name and nobody shown is named.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import yaml

from pipelines.report.card import fields
from pipelines.report.card.croissant import (
    BIASES,
    CROISSANT,
    DESCRIPTION,
    KEYWORDS,
    LIMITS,
    PERSONAL,
    SIDECARS,
    TARS,
    USES,
)
from pipelines.report.card.croissant import croissant as describe
from pipelines.report.card.summary import Facts, read_facts
from stages.backends.weights import WEIGHTS
from stages.storage.commit import FOLDER
from stages.storage.exclusions import IDENTITIES
from stages.storage.store import Store

CARD: Final = "README.md"

_MOST: Final = 50  # rows of what the source states; the sidecars have them all
_LONGEST: Final = 120  # characters of a cell
_PLAIN: Final = frozenset(" ,.:;/()'\"?=%-…")  # mean nothing inside a cell
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
_RULES: Final = {
    "rights": "",
    "resize": "m(in|ax)_",
    "detect": "m(in|ax)_",
    "rules": "",
    "global_pass": "",
}

_READ: Final = """\
```python
from glob import glob
import pyarrow.parquet as pq
import webdataset as wds

people = pq.read_table("identities.parquet", columns=["key", "split"]).to_pydict()
side = dict(zip(people["key"], people["split"]))
shards = sorted(glob("shards/fgid-??????.tar"))
samples = wds.WebDataset(shards, shardshuffle=False).select(lambda sample: side[sample["__key__"]] == "train")
```

Or `load_dataset("webdataset", data_files="shards/fgid-??????.tar")` with Hugging Face's `datasets`, which takes both
sides of the split: choose by `identities.parquet` there too. Read the label map as it is (`wds.decode("pil")` turns it
into RGB). Leave the `.held.tar` files out: rules dropped what they hold. `croissant.json` says the same to machines."""

_AGAIN: Final = """\
The same pictures, settings and weights give the same bytes, wherever they are made:

    python -m pipelines.cli run --config config.yaml source.path=PICTURES output=OUT

`python -m pipelines.cli lint OUT` holds every file against its digest."""

_DOWN: Final = """\
Whoever is shown, or made the picture, can have it taken down. Whoever keeps this data set runs one of

    python -m pipelines.cli takedown OUT --photo PHOTOGRAPH   # everybody who looks like this person
    python -m pipelines.cli takedown OUT --hash SHA256        # a picture, by its digest or a copy of it
    python -m pipelines.cli takedown OUT --source NAME        # a picture, by its name at the source

which writes the shards that hold it again without it and refuses it under any name from then on. Copies that were
passed on are beyond its reach: pass the request on too."""


def write_card(store: Store) -> None:
    """Write OUT/README.md and OUT/croissant.json from what the output says of itself."""
    facts = read_facts(store)
    store.write_if_changed(CARD, card(facts))
    store.write_if_changed(CROISSANT, describe(facts))


def card(facts: Facts) -> str:
    """README.md's text."""
    sections = {
        "How it was made": _made(facts),
        "Inputs": _ledger(facts),
        "Rules in force": _rules(facts),
        "Fields": _fields(),
        "Identities and split": _people(facts),
        "Licences, authors, consent": _stated(facts),
        "Personal data": f"{PERSONAL}\n\n{_DOWN}\n\n{_takedowns(facts)}",
        "What it is for": _list(USES),
        "Known limits": _limits(facts),
        "How to read it": _READ,
        "How to make it again": _AGAIN,
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    head = (
        f"{facts.written:,} samples in {len(facts.manifests):,} shards, made from "
        f"{facts.inputs:,} inputs by the "
        "ConsistentID pipeline."
    )
    return (
        f"---\n{_front_matter(facts)}---\n\n# FGID data set\n\n{DESCRIPTION}\n\n{head}\n\n{body}\n"
    )


def _front_matter(facts: Facts) -> str:
    licenses = [name for name, count in facts.stated["license"].items() if count]
    known = sorted({_license(name) for name in licenses}) or ["unknown"]
    others = sorted(name for name in licenses if _license(name) == "other")
    told: dict[str, Any] = {
        "pretty_name": "FGID data set",
        "license": known if len(known) > 1 else known[0],
        **(
            {"license_name": others[0] if len(others) == 1 else "several, see below"}
            if others
            else {}
        ),
        "size_categories": [
            next((name for limit, name in _SIZES if facts.written < limit), "n>10M")
        ],
        "task_categories": ["text-to-image", "image-to-image", "image-segmentation"],
        "annotations_creators": ["machine-generated"],
        "tags": list(KEYWORDS),
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": "mixed", "path": f"{FOLDER}/{TARS}"}],
            },
        ],
    }
    return yaml.safe_dump(told, sort_keys=False, allow_unicode=False, width=120)


def _license(stated: str) -> str:
    """The identifier that Hugging Face has for a licence."""
    name = re.sub(r"[\s_]+", "-", stated.strip().lower())
    return "unknown" if not name else name if _LICENSES.fullmatch(name) else "other"


# --------------------------------------------------------------------------------------------------


def _made(facts: Facts) -> str:
    told = facts.dataset
    backends: Mapping[str, str] = told.get("backends", {})
    signatures: Sequence[str] = told.get("signatures", [])
    stages = zip(told.get("stages", []), signatures, strict=False)
    text = [
        _table(
            ("stage", "signature", "backend"),
            [(s, sign, backends.get(s, "")) for s, sign in stages],
        )
    ]
    captions = facts.config.get("caption", {})
    model = str(captions.get(backends.get("caption", ""), {}).get("model", ""))
    if model:
        text.append(f"Captions are by {_cell(_public(model))}, under its own licence.")
    older = sum(manifest["signatures"] != signatures for manifest in facts.manifests)
    if older:
        text.append(
            f"{older:,} shards were made with other signatures, which their manifests name."
        )
    weights = [
        (
            w["file"],
            w["sha256"],
            w["license"],
            _commercial(w["name"]),
        )
        for w in told.get("weights", [])
    ]
    text.append(_table(("weights", "sha256", "licence", "commercial use"), weights))
    return "\n\n".join(text)


def _commercial(name: str) -> str:
    if name not in WEIGHTS:
        return "not known"
    return "yes" if WEIGHTS[name].commercial else "no"


def _public(model: str) -> str:
    """A model's name on the hub; of one that lies in a folder or behind an address, not where."""
    return model if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) else "a model of the maker's own"


def _ledger(facts: Facts) -> str:
    rows = [("written", "", f"{facts.written:,}")]
    for status in ("dropped", "failed"):
        ended = sorted(
            (-count, reason) for (how, reason), count in facts.ended.items() if how == status
        )
        rows += [(status, reason, f"{-count:,}") for count, reason in ended]
    total = (
        f"{facts.inputs:,} = {facts.written:,} written + {sum(facts.ended.values()):,} "
        "dropped or failed."
    )
    return f"{_table(('status', 'reason', 'inputs'), rows)}\n\n{total}"


def _rules(facts: Facts) -> str:
    rows = [
        (
            f"{section}.{name}",
            (", ".join(map(str, value)) or "any") if isinstance(value, list) else str(value),
        )
        for section, pattern in _RULES.items()
        for name, value in facts.config.get(section, {}).items()
        if name != "placement" and re.match(pattern, name)
    ]
    return f"{_table(('setting', 'value'), rows)}\n\nThe whole configuration is in `config.yaml`."


def _fields() -> str:
    return "\n\n".join(
        (
            f"A sample is the files `KEY.*` of a tar, `{FOLDER}/{TARS}`:",
            _table(
                ("file", "holds"), [(f"KEY.{name}", what) for name, what in fields.MEMBERS.items()]
            ),
            f"Beside each tar, `{FOLDER}/{SIDECARS}` has a row for every input, samples or not:",
            _table(("column", "holds"), fields.SIDECAR.items()),
            f"`{IDENTITIES}` has a row for every sample:",
            _table(("column", "holds"), fields.IDENTITIES.items()),
        )
    )


def _people(facts: Facts) -> str:
    if not facts.identities:
        return "The samples have no identities yet: run the pipeline to its end."
    rows = [
        (name, f"{side.samples:,}", f"{side.identities:,}") for name, side in facts.sides.items()
    ]
    promise = (
        f"**{facts.torn:,} identities are on both sides of the split.** Run `python -m "
        "pipelines.cli lint OUT`."
        if facts.torn
        else "No identity is on both sides. Its side follows from the identity alone: one that "
        "grows stays where it is."
    )
    table = _table(("split", "samples", "identities"), rows)
    return f"Samples are grouped by how alike their faces' embeddings are.\n\n{table}\n\n{promise}"


def _stated(facts: Facts) -> str:
    text = ["Of the samples, in the source's own words:"]
    for name, title in (("license", "licence"), ("author", "author"), ("consent", "consent")):
        text.append(
            _table(
                (title, "samples"), _most(facts.stated[name], f"more, see `{name}` in the sidecars")
            )
        )
    return "\n\n".join(text)


def _most(counts: Counter[str], more: str) -> list[tuple[str, str]]:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rows = [(text or "not stated", f"{count:,}") for text, count in ordered[:_MOST]]
    rest = ordered[_MOST:]
    return rows + (
        [(f"{len(rest):,} {more}", f"{sum(count for _, count in rest):,}")] if rest else []
    )


def _takedowns(facts: Facts) -> str:
    if not facts.takedowns:
        return "Nothing was taken down so far."
    rows = [(by, f"{times:,}", f"{inputs:,}") for by, (times, inputs) in facts.takedowns.items()]
    return f"Taken down so far:\n\n{_table(('by', 'times', 'pictures'), rows)}"


def _limits(facts: Facts) -> str:
    told = [BIASES, *LIMITS]
    if facts.untrainable:
        share = facts.untrainable / facts.reviewed
        told.append(
            f"{facts.untrainable:,} of {facts.reviewed:,} samples ({share:.1%}) train nothing of "
            "the face: their "
            "captions name no region that is seen, or are too long (`trainable` in the sidecars)."
        )
    return _list(told)


# --------------------------------------------------------------------------------------------------


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [tuple(map(_cell, row)) for row in rows]
    if not lines:
        return f"No {head[0]} is recorded."
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ("---",) * len(head), *lines))


def _cell(text: str) -> str:
    """Text from outside as one cell: nothing in it is Markdown, HTML or a new line; an address may
    become a link.
    """
    seen = "".join(" " if unicodedata.category(letter)[0] in "CZ" else letter for letter in text)
    seen = " ".join(seen.split())
    seen = seen if len(seen) <= _LONGEST else f"{seen[: _LONGEST - 1]}…"
    escaped = "".join(
        letter if letter.isalnum() or letter in _PLAIN else f"&#{ord(letter)};" for letter in seen
    )
    return re.sub(r"(?<=[a-z0-9])&#95;(?=[a-z0-9])", "_", escaped)  # inside a word it means nothing
