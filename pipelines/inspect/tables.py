"""Describe: everything known of one input as tables for people.

Names, captions and details come from outside: none is read as markup, and no control character
reaches the terminal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from model.prompt import named_regions
from model.spec import TOKEN_LIMIT
from pipelines.inspect.find import Inspection, printable
from pipelines.inspect.pictures import half_blocks, panes
from pipelines.report.palette import PALETTE
from stages.reasons import explain
from stages.record import Status
from stages.regions import LABELS, REGION_LABELS
from stages.storage.commit import is_quarantined
from stages.storage.sidecar import Row

Line = tuple[Text, ...]

_WIDEST: Final = 60  # columns of each picture
_TALLEST: Final = 64  # pixels of height, two to a line
_PLAIN_WIDTH: Final = 110  # columns, where there is no terminal to ask
_STATUS: Final = {Status.OK: "bold green", Status.DROPPED: "bold yellow", Status.FAILED: "bold red"}
# and 0, of all
_OFF: Final = {
    "max_clipped": 1,
    "max_occlusion": 1,
    "max_yaw": 180,
    "max_pitch": 180,
    "max_roll": 180,
}

Figure = Callable[[Row], float | None]


def _column(name: str) -> Figure:
    return lambda row: row[name]


def _turned(name: str) -> Figure:
    """Turned left is as bad as turned right."""
    return lambda row: None if row[name] is None else abs(row[name])


# name, what is judged, column, rules
_FIGURES: Final[tuple[tuple[str, Figure, str, tuple[str, ...]], ...]] = (
    (
        "source's short side",
        lambda row: min(row["source_width"], row["source_height"]) or None,
        "",
        ("min_side",),
    ),
    ("faces", lambda row: row["face_count"] or None, "", ("min_faces", "max_faces")),
    ("face's short side", _column("face_side"), "", ("min_face",)),
    ("detection score", _column("score"), "", ("min_score",)),
    ("sharpness", _column("sharpness"), "", ("min_sharpness",)),
    ("brightness", _column("brightness"), "", ("min_brightness", "max_brightness")),
    ("clipped", _column("clipped"), "", ("max_clipped",)),
    ("yaw, degrees", _turned("yaw"), "yaw", ("max_yaw",)),
    ("pitch, degrees", _turned("pitch"), "pitch", ("max_pitch",)),
    ("roll, degrees", _turned("roll"), "roll", ("max_roll",)),
    ("occlusion", _column("occlusion"), "", ("max_occlusion",)),
    ("identity norm", _column("identity_norm"), "", ("min_identity_norm",)),
)


def show(found: Inspection, console: Console, picture: bool = True) -> None:
    """Print it. The picture only where the console is a terminal."""
    if found.taken_down:
        console.print(Text(f"{found.row['key']} was taken down."))
        return
    if picture and console.is_terminal:
        row = found.row
        share = row["height"] / row["width"] if row["width"] else 1.0
        width = min(_WIDEST, (console.width - 1) // 2, round(_TALLEST / share))
        if shown := panes(found, max(2, width)):
            console.print(half_blocks(shown), crop=True)
    for title, lines in _sections(found):
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(style="dim", min_width=19, no_wrap=True)
        for line in lines:
            table.add_row(*line)
        if table.row_count:
            console.print(Text(title, "bold cyan"))
            console.print(table)


def console_of(width: int = 0) -> Console:
    """For standard output; wide enough for a table where that is no terminal."""
    plain = Console(markup=False, highlight=False, emoji=False, soft_wrap=False)
    if plain.is_terminal and not width:
        return plain
    return Console(markup=False, highlight=False, emoji=False, width=width or _PLAIN_WIDTH)


def _sections(found: Inspection) -> Iterable[tuple[str, Iterable[Line]]]:
    row = found.row
    yield "Input", _input(row)
    yield "Provenance", _provenance(found)
    yield "Faces", _faces(row)
    stale = "" if found.current else ", of a configuration that the shard wasn't made by"
    yield f"Figures, and the rules{stale}", _figures(row, found.config.get("rules", {}))
    yield "Regions", _regions(row)
    yield "Identity", _identity(found)
    yield "Texts", _texts(row)
    yield "Training", _training(row)


def _input(row: Row) -> Iterable[Line]:
    status = Text(row["status"], _STATUS[Status(row["status"])])
    if row["reason"]:
        status.append(f"  {printable(row['reason'])}  (stage {printable(row['stage'])})", "default")
    yield Text("status"), status
    yield from _said("detail", row["detail"])
    if known := explain(row["reason"]):
        yield Text("what to do"), Text(known.action)


def _provenance(found: Inspection) -> Iterable[Line]:
    row = found.row
    yield Text("key"), Text(row["key"])
    for name in ("source", "sha256", "license", "author", "consent"):
        yield Text(name), _text(row[name]) if row[name] else Text("not stated", "dim")
    kind = "held" if is_quarantined(row) else "tar"
    where = f"{found.shard}, in no tar"
    if row[f"{kind}_offset"] >= 0:
        ending = "held.tar" if kind == "held" else "tar"
        where = (
            f"{found.shard}.{ending}, {row[f'{kind}_size']:,} bytes from "
            f"{row[f'{kind}_offset']:,} on"
        )
    yield Text("shard"), Text(where)
    for name, width, height in (
        ("source", "source_width", "source_height"),
        ("resized", "width", "height"),
    ):
        if row[width]:
            yield Text(f"{name} size"), Text(f"{row[width]} × {row[height]}")
    yield from _said("perceptual hash", row["hash"])


def _faces(row: Row) -> Iterable[Line]:
    for index, face in enumerate(row["faces"]):
        x1, y1, x2, y2 = face["box"]
        chosen = index == row["face"]
        where = f"{x2 - x1:.0f} × {y2 - y1:.0f} at ({x1:.0f}, {y1:.0f}), score {face['score']:.3f}"
        yield Text("chosen" if chosen else "another"), Text(where, "green" if chosen else "")


def _figures(row: Row, rules: dict[str, Any]) -> Iterable[Line]:
    for name, judged, column, settings in _FIGURES:
        figure = judged(row)
        if figure is None:
            continue
        shown = row[column] if column else figure
        limits = [(setting, rules[setting]) for setting in settings if setting in rules]
        on = [(setting, limit) for setting, limit in limits if limit not in (0, _OFF.get(setting))]
        broken = any(
            figure < limit if setting.startswith("min_") else figure > limit
            for setting, limit in on
        )
        words = [
            f"at {'least' if setting.startswith('min_') else 'most'} {limit:g}"
            for setting, limit in on
        ]
        text = Text(
            f"{shown:g}" if isinstance(shown, int) else f"{shown:.3f}", "bold red" if broken else ""
        )
        text.justify = "right"
        yield Text(name), text, Text(", ".join(words) or "no rule", "red" if broken else "dim")


def _regions(row: Row) -> Iterable[Line]:
    areas: list[float] = row["label_areas"]
    if not areas:
        return
    for word, labels in REGION_LABELS.items():
        share = sum(areas[LABELS.index(label)] for label in labels)
        seen = Text(f"{share:.2%}") if share else Text("missing", "bold red")
        seen.justify = "right"
        parts = Text()
        for label in labels:
            number = LABELS.index(label)
            parts.append("■ " if areas[number] else "□ ", PALETTE[number])
            parts.append(f"{label.replace('_', ' ')}  ", "" if areas[number] else "dim")
        yield Text(word), seen, parts
    regions = {label for labels in REGION_LABELS.values() for label in labels}
    others = Text()
    for number, label in enumerate(LABELS):
        if label not in regions and number and areas[number]:
            others.append("■ ", PALETTE[number]).append(
                f"{label.replace('_', ' ')} {areas[number]:.1%}  "
            )
    yield Text("besides"), Text(""), others


def _identity(found: Inspection) -> Iterable[Line]:
    row, person = found.row, found.person
    if row["identity_norm"] is not None:
        yield Text("norm"), Text(f"{row['identity_norm']:.2f}")
    if person is None:
        return
    count = person["identity_size"]
    yield (
        Text("identity"),
        Text(f"{person['identity_id']}, {count} sample{'s' if count > 1 else ''}"),
    )
    yield Text("split"), Text(person["split"])
    for key, cosine in zip(person["nearest"], person["similarity"], strict=True):
        yield (
            Text("nearest" if key == person["nearest"][0] else ""),
            Text(f"{key}  cosine {cosine:.3f}"),
        )


def _texts(row: Row) -> Iterable[Line]:
    for name in ("caption", "face_caption"):
        if row[name]:
            yield Text(name.replace("_", " ")), _highlighted(row[name])


def _highlighted(caption: str) -> Text:
    """The words that name a region, in its colour."""
    text = Text()
    for part in re.split(r"(\w+)", caption):
        named = named_regions(part)
        text.append(printable(part), f"bold underline {_color(named[0])}" if named else "")
    return text


def _color(word: str) -> str:
    labels = REGION_LABELS[word]
    return PALETTE[LABELS.index(labels[-1] if word == "mouth" else labels[0])]


def _training(row: Row) -> Iterable[Line]:
    if row["text_tokens"] is None:
        return
    yield (
        Text("CLIP tokens"),
        Text(
            f"caption {row['caption_tokens']} + face caption {row['face_caption_tokens']} → "
            "training text "
            f"{row['text_tokens']} of {TOKEN_LIMIT - 2}; {row['cut']:.0%} cut"
        ),
    )
    yield (
        Text("fused"),
        Text(
            ", ".join(row["fused"]) or "nothing: trains nothing of the face",
            _good(row["trainable"]),
        ),
    )
    for entry in row["unfused"]:
        yield Text("not fused"), _text(f"{entry['region']}: {entry['reason'].replace('_', ' ')}")
    if row["absent"]:
        yield Text("named, not there"), Text(", ".join(row["absent"]), "yellow")


def _good(fine: bool) -> str:
    return "green" if fine else "bold red"


def _said(name: str, text: str) -> Iterable[Line]:
    if text:
        yield Text(name), _text(text)


def _text(text: str) -> Text:
    return Text(printable(text), overflow="fold")
