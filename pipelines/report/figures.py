"""Figures: stats → what the template draws. Bars are plain SVG and HTML, so the page needs no script and no library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_MOST_ROWS = 8  # of a bar list; the rest is summed up


@dataclass(frozen=True, slots=True)
class Bar:
    """share: length, in parts of the longest. tip: what the bar says when pointed at."""

    label: str
    value: str
    share: float
    tip: str = ""


@dataclass(frozen=True, slots=True)
class Histogram:
    """bars in order of their edges; ticks: labels of the first and the last edge; peak: the largest count."""

    title: str
    unit: str
    bars: tuple[Bar, ...]
    ticks: tuple[str, str]
    peak: int
    figures: tuple[tuple[str, str], ...]  # name, value
    note: str = ""

    @property
    def spoken(self) -> str:
        """For those who can't see the bars."""
        return f"{self.title}: " + (", ".join(f"{name} {value}" for name, value in self.figures) or "no samples")


@dataclass(frozen=True, slots=True)
class BarList:
    title: str
    bars: tuple[Bar, ...]
    note: str = ""


def histogram(title: str, spread: Mapping[str, Any], *, unit: str = "", scale: float = 1, note: str = "") -> Histogram:
    """scale: values are shown multiplied by it, as in shares of a picture shown in percent."""
    edges = [number(edge * scale) for edge in spread["edges"]]
    peak = max(spread["counts"], default=0)
    suffix = f" {unit}" if unit else ""
    bars = tuple(
        Bar(left, str(count), count / peak, f"{left} to {right}{suffix}: {count:,}")
        for left, right, count in zip(edges, edges[1:], spread["counts"], strict=False)
    )
    figures = tuple(
        (name, number(spread[name] * scale)) for name in ("min", "median", "mean", "max") if spread["count"]
    )
    return Histogram(title, unit, bars, (edges[0], edges[-1]) if edges else ("", ""), peak, figures, note)


def bar_list(title: str, counts: Sequence[tuple[str, float]], *, total: float, note: str = "") -> BarList:
    """A row for each (label, count), with its share of `total`; from the ninth on they become one row."""
    rows = list(counts[:_MOST_ROWS])
    if rest := counts[_MOST_ROWS:]:
        rows.append((f"{len(rest):,} others", sum(count for _, count in rest)))
    longest = max((count for _, count in rows), default=0) or 1
    bars = (Bar(label, number(count), count / longest, percent(count / total if total else 0)) for label, count in rows)
    return BarList(title, tuple(bars), note)


def charts(data: Mapping[str, Any]) -> list[Histogram]:
    return [
        histogram("Detection score", data["detection_score"], note="of the chosen face"),
        histogram("Face size", data["face_size"], unit="px", note="short side of the chosen face's box"),
        histogram("Caption length", data["caption"]["words"], unit="words", note="coarse description"),
        histogram("Face caption length", data["face_caption"]["words"], unit="words", note="fine description"),
    ]


def bar_lists(data: Mapping[str, Any]) -> list[BarList]:
    faces = [(f"{n} face{'s' if n != '1' else ''}", count) for n, count in data["faces_per_image"].items()]
    sizes = [(f"{size['width']} × {size['height']}", size["count"]) for size in data["image_sizes"]]
    return [
        bar_list("Faces per image", faces, total=data["written"], note="written samples, all faces found"),
        bar_list("Image size", sizes, total=data["written"], note="as written, pixels"),
    ]


def stage_times(runs: Mapping[str, Any]) -> BarList:
    """Seconds by stage, in the order of the chain; `tip` is the share."""
    seconds = runs["stage_seconds"]
    longest = max(seconds.values(), default=0) or 1
    bars = (
        Bar(stage, duration(value), value / longest, percent(runs["stage_share"][stage]))
        for stage, value in seconds.items()
    )
    return BarList("Time per stage", tuple(bars))


# --------------------------------------------------------------------------------------------- values as text


def number(value: float) -> str:
    """At most three digits behind the point, and none that say nothing."""
    if float(value).is_integer():
        return f"{int(value):,}"
    digits = 3 if abs(value) < 1 else 2 if abs(value) < 10 else 1
    return f"{value:,.{digits}f}".rstrip("0").rstrip(".")


def percent(share: float | None) -> str:
    if share is None:
        return "–"
    if 0 < share < 0.001:
        return "< 0.1 %"
    return f"{number(round(100 * share, 1))} %"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds >= 0.1 or seconds == 0 else f"{1000 * seconds:.0f} ms"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def size(count: int) -> str:
    """Bytes, in powers of ten."""
    if count < 1000:
        return f"{count} B"
    power = min((len(str(count)) - 1) // 3, 4)
    return f"{count / 1000**power:,.1f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"
