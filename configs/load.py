"""Builds a configuration dataclass from a YAML preset and `key=value` overrides, and writes it.

The error for an unknown key names the closest existing one; that for a value of the wrong type says
what was expected. Renamed keys are read under their old names too (configs/aliases.py).
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import yaml

from configs.aliases import rename_keys
from configs.common import alone, subsection
from configs.errors import ConfigError

T = TypeVar("T")

# libyaml's classes are ten times faster; PyYAML is rarely built without it
_LOADER: Final[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DUMPER: Final[Any] = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class _Text(str):
    """The value of an override, not yet parsed as YAML: for a field of type str it stays as it is,
    so that a path may be named 007 or [a]. Where a text may stand for a section, it is parsed if it
    is a list or a section.
    """

    def parse(self, hint: Any) -> Any:
        if hint is str:
            return str(self)
        try:
            value = _parse(str(self))
        except yaml.YAMLError:
            return str(self)
        item = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint
        is_text = is_dataclass(item) and alone(item) and not isinstance(value, list | dict)
        return str(self) if is_text else value


def load(kind: type[T], path: str | Path | None = None, overrides: Iterable[str] = ()) -> T:
    """Returns a `kind`, from the YAML file at `path` (None: defaults only) and `a.b=value`
    overrides.

    An override replaces the file's value, also if one of the two uses the setting's old name.
    Raises ConfigError for a missing file, an unknown key, or a value of the wrong type or range. A
    text that begins with ~/ gets the path of the home folder.
    """
    if path is None:
        return _resolve(kind, {}, overrides)
    file = Path(path)
    if not file.is_file():
        raise ConfigError(
            f"no configuration at {file}. Presets are in configs/: give one with --config FILE."
        )
    return load_text(kind, file.read_text(encoding="utf-8"), overrides, name=str(file))


def load_text(
    kind: type[T], text: str, overrides: Iterable[str] = (), *, name: str = "the configuration"
) -> T:
    """Returns a `kind` from YAML text, as `to_yaml` writes it, with `a.b=value` overrides. Raises
    what `load` does. name: of the text, in errors.
    """
    try:
        loaded = _parse(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is not valid YAML: {error}") from error
    if loaded is not None and not isinstance(loaded, dict):
        raise ConfigError(f"{name} contains a {type(loaded).__name__}; expected keys and values.")
    return _resolve(kind, loaded or {}, overrides)


def dump(config: Any, path: str | Path) -> None:
    """Writes all settings to a YAML file, in the order of the fields."""
    Path(path).write_text(to_yaml(config), encoding="utf-8")


def to_yaml(config: Any) -> str:
    """Returns all settings as YAML, in the order of the fields."""
    text: str = yaml.dump(
        _plain(asdict(config)), Dumper=_DUMPER, sort_keys=False, allow_unicode=True, width=120
    )
    return text


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_LOADER)  # noqa: S506 - both loaders are safe ones


def _resolve(kind: type[T], values: dict[str, Any], overrides: Iterable[str]) -> T:
    rename_keys(kind, values)
    _merge(values, rename_keys(kind, _parse_overrides(overrides)), "")
    return cast(T, _build(kind, values, ""))


def _parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """Returns a nested mapping with a _Text for each `a.b=value`."""
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(
                f"override {override!r}: expected key=value, for example shard_size=100 or "
                "detect.min_score=0.6"
            )
        *parents, last = key.split(".")
        section = values
        for parent in parents:
            section = subsection(section, parent, f"override {key}")
        section[last] = _Text(text)
    return values


def _merge(values: dict[str, Any], overrides: Mapping[str, Any], prefix: str) -> None:
    """Replaces values in place by overrides. prefix: the keys of the sections around them."""
    for name, value in overrides.items():
        if isinstance(value, dict):
            key = f"{prefix}{name}"
            _merge(subsection(values, name, f"override {key}.…"), value, f"{key}.")
        else:
            values[name] = value


def _build(kind: type[Any], values: Mapping[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(kind)
    names = {f.name for f in fields(kind)}
    for key in values:
        if key not in names:
            close = difflib.get_close_matches(str(key), names, 1)
            hint = (
                f" Did you mean {prefix}{close[0]}?"
                if close
                else f" Known: {', '.join(sorted(names))}."
            )
            raise ConfigError(f"unknown key {prefix}{key}.{hint}")
    settings = {
        name: _convert(hints[name], value, f"{prefix}{name}") for name, value in values.items()
    }
    return kind(**settings)


def _convert(hint: Any, value: Any, name: str) -> Any:
    """Returns the value as the type `hint`. Raises ConfigError, which names the setting `name`."""
    origin = typing.get_origin(hint)
    value = value.parse(hint) if isinstance(value, _Text) else value
    if is_dataclass(hint):
        if (setting := alone(hint)) and not isinstance(value, Mapping):
            value = {setting: value}
        if not isinstance(value, Mapping):
            raise _mismatch(name, value, "a section of keys and values")
        return _build(cast(type[Any], hint), value, f"{name}.")
    if origin is typing.Literal:
        options = typing.get_args(hint)
        if isinstance(value, bool):  # YAML reads no and off, yes and on as booleans
            words = ("yes", "on", "true") if value else ("no", "off", "false")
            value = next((word for word in words if word in options), value)
        if value not in options:
            raise _mismatch(name, value, "one of " + ", ".join(map(str, options)))
        return value
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(
            _convert(typing.get_args(hint)[0], item, f"{name}[{i}]") for i, item in enumerate(items)
        )
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        inner = next(arg for arg in typing.get_args(hint) if arg is not type(None))
        return _convert(inner, value, name)
    return _scalar(hint, value, name)


def _scalar(hint: Any, value: Any, name: str) -> Any:
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML reads 1e-4 as text
        except ValueError:
            raise _mismatch(name, value, "a number") from None
        if not math.isfinite(number):
            raise _mismatch(name, value, "a finite number")
        return number
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and value is not None and not isinstance(value, list | dict):
        text = str(value)
        # shells don't expand the ~ of output=~/data
        return str(Path(text).expanduser()) if text.startswith("~/") else text
    raise _mismatch(
        name,
        value,
        {int: "a whole number", bool: "true or false", str: "text"}.get(hint, str(hint)),
    )


def _mismatch(name: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(f"{name}={value!r}: expected {expected}.")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
