"""Weights files: reading them without running code, comparing their keys, writing them whole."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from configs.errors import WeightsError

_SHOWN: Final = 4  # names in a message


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads a .safetensors or PyTorch file, flat or nested by prefix, as tensors by dotted key.

    The tensors are mapped from the file where its format allows that. Only tensors are unpickled.
    Raises WeightsError for a file that can't be read, and for values other than tensors.
    """
    try:
        if path.suffix.lower() == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except pickle.UnpicklingError as error:  # also raised for bytes that aren't a pickle
        raise WeightsError(
            f"{path}: it is no PyTorch file, or holds objects other than tensors, which are not "
            "loaded because they can run code. Expected tensors alone; get the file from its "
            "author again."
        ) from error
    except Exception as error:  # of a damaged file, torch raises nearly every type
        kind = "" if isinstance(error, SafetensorError) else f"{type(error).__name__}: "
        reason = next(iter(str(error).splitlines()), "")[:200]
        raise WeightsError(
            f"{path}: not a readable weights file ({kind}{reason}). Expected .safetensors, or a "
            "PyTorch file of tensors; download or copy it again."
        ) from error
    return _flat(content, path)


def _flat(content: object, path: Path) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise WeightsError(
            f"{path}: holds one {type(content).__name__}, expected tensors by key. Name an adapter."
        )
    flat: dict[str, Tensor] = {}
    for key, value in content.items():
        inner = value.items() if isinstance(value, Mapping) else [("", value)]
        for rest, tensor in inner:
            name = f"{key}.{rest}" if isinstance(value, Mapping) else str(key)
            if not isinstance(tensor, Tensor):
                raise WeightsError(
                    f"{path}: {name!r} is of type {type(tensor).__name__}, expected a tensor. Name "
                    "a file with the weights of an adapter."
                )
            if name in flat:
                raise WeightsError(f"{path}: {name!r} is in it twice; get the file again.")
            flat[name] = tensor
    return flat


def check_fit(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Compares keys and shapes; returns "" if they are equal, else a description.

    It names the first wrong key in the order of `in_order`, with what was given and what was
    expected of it, then the number of faults of each kind. expected: may be on the meta device.
    """
    faults: dict[str, list[str]] = {"missing": [], "unexpected": [], "mis-shaped": []}
    first = ""
    for key in in_order({**state, **expected}):
        if key not in state:
            kind, fault = "missing", f"not given, expected {_described(expected[key])}"
        elif key not in expected:
            kind, fault = "unexpected", f"given {_described(state[key])}, expected no such key"
        elif state[key].shape != expected[key].shape or not state[key].is_floating_point():
            kind = "mis-shaped"
            fault = f"given {_described(state[key])}, expected {_described(expected[key])}"
        else:
            continue
        faults[kind].append(key)
        first = first or f"the first wrong key is {key}: {fault}"
    counts = [f"{len(keys)} {kind}" for kind, keys in faults.items() if keys]
    return f"{first} (of {len(expected)} keys, {', '.join(counts)})" if first else ""


def _described(tensor: Tensor) -> str:
    kind = "" if tensor.is_floating_point() else f"{tensor.dtype} ".removeprefix("torch.")
    return f"{kind}{tuple(tensor.shape)}"


def in_order(state: Mapping[str, Tensor]) -> list[str]:
    """Returns the keys, with the parts of the adapter in their order, and numbers by value."""
    heads = ("image_proj_model", "FacialEncoder", "adapter_modules")

    def place(key: str) -> tuple[int, list[tuple[int, str]]]:
        head = key.partition(".")[0]
        parts = [
            (int(part), "") if part.isdecimal() and len(part) < 10 else (-1, part)
            for part in key.split(".")
        ]
        return (heads.index(head) if head in heads else len(heads), parts)

    return sorted(state, key=place)


def summary_of(names: Sequence[str]) -> str:
    """Returns the first four names, and how many more there are; "nothing" for none."""
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    shown = ", ".join(re.sub(r"[^ -~]", "?", name)[:60] for name in names[:_SHOWN])
    return f"{shown}{more}" if names else "nothing"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` write a file beside `path`, then renames it to `path`."""
    with beside(path) as partial:
        write(partial)
        partial.replace(path)


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Gives a name in the folder of `path`; a file that is left there is removed."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)
