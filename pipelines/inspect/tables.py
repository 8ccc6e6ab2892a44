"""Tables: everything that is recorded of one input, for a terminal.

Names, captions and details are text from outside the program: they are not read as markup, and
control characters are escaped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

import pyarrow as pa
from rich.console import Console
from rich.table import Table
from rich.text import Text

from model.prompt import named_regions
from model.spec import TOKEN_LIMIT
from pipelines.inspect.find import Inspection, printable
from pipelines.inspect.panes import half_blocks, panes
from pipelines.report.metrics import AREA, WORDS, columns_of, shown_metrics
from pipelines.report.palette import PALETTE
from stages.annotations import Measures, Review, absent_words, fused_words, unfused_words
from stages.quality_filter import RULES, Rule
from stages.reasons import explain
from stages.record import PROVENANCE, Status
from stages.regions import LABELS, REGION_LABELS
from stages.storage.sidecar import Row, is_quarantined, row_to_record

Line = tuple[Text, ...]

_MAX_WIDTH: Final = 60  # columns of each pane
_MAX_HEIGHT: Final = 64  # pixels of each pane; a line shows two
_PLAIN_WIDTH: Final = 110  # columns, where the output is no terminal
_STATUS: Final = {Status.OK: "bold green", Status.DROPPED: "bold yellow", Status.FAILED: "bold red"}
# Limits that no value can break: as with a limit of 0, such a rule is off.
_NO_LIMIT: Final = {
    **dict.fromkeys(("max_clipped", "max_occlusion"), 1),
    **dict.fromkeys(("max_yaw", "max_pitch", "max_roll"), 180),
}


def show(inspection: Inspection, console: Console, image: bool = True) -> None:
    """Prints the input's tables, and its image where the console is a terminal."""
    row = inspection.row
    if inspection.taken_down:
        console.print(Text(f"{row['key']} was taken down."))
        return
    if image and console.is_terminal:
        ratio = row["height"] / row["width"] if row["width"] else 1.0
        width = min(_MAX_WIDTH, (console.width - 1) // 2, round(_MAX_HEIGHT / ratio))
        if shown := panes(inspection, max(2, width)):
            console.print(half_blocks(shown), crop=True)
    for title, lines in _sections(inspection):
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(style="dim", min_width=19, no_wrap=True)
        for line in lines:
            table.add_row(*line)
        if table.row_count:
            console.print(Text(title, "bold cyan"))
            console.print(table)


def console_of(width: int = 0) -> Console:
    """A console for standard output. width: columns; 0 for those of the terminal, or enough for a
    table where the output is none."""
    plain = Console(markup=False, highlight=False, emoji=False, soft_wrap=False)
    if plain.is_terminal and not width:
        return plain
    return Console(markup=False, highlight=False, emoji=False, width=width or _PLAIN_WIDTH)


def _sections(inspection: Inspection) -> Iterable[tuple[str, Iterable[Line]]]:
    row = inspection.row
    yield "Input", _input(row)
    yield "Provenance", _provenance(inspection)
    yield "Faces", _faces(row)
    stale = "" if inspection.current else " of a configuration that the shard wasn't made with"
    title = f"Metrics, and the rules{stale}"
    yield title, _metrics(inspection, inspection.config.get("rules", {}))
    yield "Annotations", _annotations(inspection)
    yield "Regions", _regions(row)
    yield "Identity", _identity(inspection)
    yield "Captions", _captions(row)
    yield "Training", _training(row)


def _input(row: Row) -> Iterable[Line]:
    status = Text(row["status"], _STATUS[Status(row["status"])])
    if row["reason"]:
        status.append(f"  {printable(row['reason'])}  (stage {printable(row['stage'])})", "default")
    yield Text("status"), status
    yield from _optional("detail", row["detail"])
    if explanation := explain(row["reason"]):
        yield Text("what to do"), Text(explanation.action)


def _provenance(inspection: Inspection) -> Iterable[Line]:
    row = inspection.row
    yield Text("key"), Text(row["key"])
    for name in ("source", "sha256", *PROVENANCE):
        # a shard that an older program wrote has no column `person`
        yield Text(name), _text(row[name]) if row.get(name) else Text("not stated", "dim")
    place = f"{inspection.shard}, in no tar"
    if inspection.tar:
        kind = "quarantine" if is_quarantined(row) else "tar"
        size, offset = row[f"{kind}_size"], row[f"{kind}_offset"]
        place = f"{inspection.tar}, {size:,} bytes at {offset:,}"
    yield Text("shard"), Text(place)
    for name, width, height in (
        ("source", "source_width", "source_height"),
        ("resized", "width", "height"),
    ):
        if row[width]:
            yield Text(f"{name} size"), Text(f"{row[width]} × {row[height]}")
    yield from _optional("perceptual hash", row["hash"] or "")


def _faces(row: Row) -> Iterable[Line]:
    for index, face in enumerate(row["faces"]):
        x1, y1, x2, y2 = face["box"]
        is_main = index == row["face"]
        box = f"{x2 - x1:.0f} × {y2 - y1:.0f} at ({x1:.0f}, {y1:.0f}), score {face['score']:.3f}"
        name, style = ("main face", "green") if is_main else ("other face", "")
        yield Text(name), Text(box, style)


def _metrics(inspection: Inspection, limits: Mapping[str, Any]) -> Iterable[Line]:
    """Each metric of the row, and the rules on it."""
    metrics = shown_metrics(inspection.columns.values())
    columns = columns_of(metrics, inspection.columns)
    schema = pa.schema([(column.name, column.type) for column in columns])
    row = {column.name: inspection.row.get(column.name) for column in columns}
    table = pa.Table.from_pylist([row], schema=schema)
    own_columns = {n: column for n, column in inspection.columns.items() if n in inspection.row}
    record = row_to_record(inspection.row, own_columns)
    for shown in metrics:
        value = float(shown.values(table)[0])
        if shown.metric.group in (AREA, WORDS) or math.isnan(value):
            continue
        rules = [
            (rule, limits[rule.setting])
            for rule in RULES
            if rule.metric == shown.name and limits.get(rule.setting) and _is_on(rule, limits)
        ]
        # Not the number shown: rules ignore the sign of angles, and small faces in the background.
        values = [(rule.value(record), rule, limit) for rule, limit in rules]
        broken = any(v is not None and rule.broken_by(v, limit) for v, rule, limit in values)
        texts = [f"at {'least' if rule.is_minimum else 'most'} {limit:g}" for rule, limit in rules]
        number = Text(f"{value:g}" if shown.metric.whole else f"{value:.3f}")
        number.stylize("bold red" if broken else "")
        number.justify = "right"
        label = shown.metric.title.lower()
        if shown.metric.unit and shown.metric.scale == 1:
            label += f", {shown.metric.unit}"
        yield Text(label), number, Text(", ".join(texts) or "no rule", "red" if broken else "dim")


def _annotations(inspection: Inspection) -> Iterable[Line]:
    """The fields without a metric of annotations that have no section of their own."""
    for name, column in inspection.columns.items():
        own_section = column.annotation in ("", Measures.name, Review.name)
        if not own_section and column.metric is None and inspection.row.get(name) is not None:
            yield Text(name.replace("_", " ")), _text(str(inspection.row[name]))


def _is_on(rule: Rule, limits: Mapping[str, Any]) -> bool:
    return bool(limits[rule.setting] != _NO_LIMIT.get(rule.setting))


def _regions(row: Row) -> Iterable[Line]:
    """The area of each region and the labels in it, and the labels of no region."""
    areas: list[float] = row["label_areas"]
    if not areas:
        return
    for word, labels in REGION_LABELS.items():
        area = sum(areas[LABELS.index(label)] for label in labels)
        shown_area = Text(f"{area:.2%}") if area else Text("missing", "bold red")
        shown_area.justify = "right"
        parts = Text()
        for label in labels:
            number = LABELS.index(label)
            parts.append("■ " if areas[number] else "□ ", PALETTE[number])
            parts.append(f"{label.replace('_', ' ')}  ", "" if areas[number] else "dim")
        yield Text(word), shown_area, parts
    regions = {label for labels in REGION_LABELS.values() for label in labels}
    others = Text()
    for number, label in enumerate(LABELS):
        if label not in regions and number and areas[number]:
            others.append("■ ", PALETTE[number]).append(
                f"{label.replace('_', ' ')} {areas[number]:.1%}  "
            )
    yield Text("other labels"), Text(""), others


def _identity(inspection: Inspection) -> Iterable[Line]:
    row, identity = inspection.row, inspection.identity
    if row["identity_norm"] is not None:
        yield Text("norm"), Text(f"{row['identity_norm']:.2f}")
    if identity is None:
        return
    count = identity["identity_size"]
    samples = f"{count} sample{'s' if count > 1 else ''}"
    yield Text("identity"), Text(f"{identity['identity_id']}, {samples}")
    yield Text("split"), Text(identity["split"])
    for place, key in enumerate(identity["nearest"]):
        cosine = identity["similarity"][place]
        yield Text("" if place else "nearest"), Text(f"{key}  cosine {cosine:.3f}")


def _captions(row: Row) -> Iterable[Line]:
    for name in ("caption", "face_caption"):
        if row[name]:
            yield Text(name.replace("_", " ")), _highlighted(row[name])


def _highlighted(caption: str) -> Text:
    """A caption with the words that name a region in the region's colour."""
    text = Text()
    for part in re.split(r"(\w+)", caption):
        named = named_regions(part)
        text.append(printable(part), f"bold underline {_color(named[0])}" if named else "")
    return text


def _color(word: str) -> str:
    """The colour of a region."""
    labels = REGION_LABELS[word]
    return PALETTE[LABELS.index(labels[-1] if word == "mouth" else labels[0])]


def _training(row: Row) -> Iterable[Line]:
    if row.get("text_tokens") is None:
        return
    regions = row["regions"] or []
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
            ", ".join(fused_words(regions)) or "no region: not trainable",
            "green" if row["trainable"] else "bold red",
        ),
    )
    for word, reason in unfused_words(regions):
        yield Text("not fused"), _text(f"{word}: {reason.replace('_', ' ')}")
    if absent := absent_words(regions):
        yield Text("named, not shown"), Text(", ".join(absent), "yellow")


def _optional(name: str, text: str) -> Iterable[Line]:
    """A line, unless the text is empty."""
    if text:
        yield Text(name), _text(text)


def _text(text: str) -> Text:
    return Text(printable(text), overflow="fold")
