"""Options of a run as fields of plain dataclasses: default, help and bounds; a bad value is refused, with a remedy."""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
import typing
from collections.abc import Mapping
from dataclasses import field
from types import NoneType, UnionType
from typing import Any, Literal

_LARGEST = 2**31 - 1
"""Whole numbers count steps, rows and seeds, which are int32 on the device."""


def option(
    default: Any, help: str, *, flag: str | None = None, low: float | None = None, high: float | None = None
) -> Any:
    """A field: its default, its help, its name on the command line, and bounds for each number in it."""
    return field(default=default, metadata={"help": help, "flag": flag, "low": low, "high": high})


class Checked:
    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            if "help" in f.metadata:
                _check(f"{_section(type(self))}.{f.name}", getattr(self, f.name), hints[f.name], f.metadata)


def error(message: str) -> Exception:
    from metarec_jax.core import MetarecError  # imports jax, which --help must not

    return MetarecError(message)


def shown(value: Any) -> str:
    """A value as a message shows it: on one line, and not the whole of one that is long."""
    if isinstance(value, int) and value.bit_length() > 256:  # Python refuses to spell the longest
        return f"a number of {value.bit_length()} bits"
    text = repr(value[:100] if isinstance(value, str | list | tuple | bytes) else value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _section(kind: type) -> str:
    return {"TaskConfig": "tasks"}.get(kind.__name__, kind.__name__.removesuffix("Config").lower())


def _check(name: str, value: Any, hint: Any, metadata: Mapping[str, Any]) -> None:
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise error(f"{name}: {shown(value)} is not known; {meant(value, typing.get_args(hint))}")
        return
    if not _fits(value, hint):
        raise error(f"{name} wants {_spoken(hint)}, got {shown(value)}; correct it")
    if isinstance(value, str) and "\0" in value:
        raise error(f"{name} has a zero byte in it: {shown(value)}; correct it")
    numbers = value if isinstance(value, tuple) else (value,)
    for number in numbers:
        low, high = metadata["low"], metadata["high"]
        if isinstance(number, bool | str | NoneType):
            continue
        if not (-math.inf if low is None else low) <= number <= (math.inf if high is None else high):
            bounds = f"{low} or more" if high is None else f"between {low} and {high}"
            raise error(f"{name} must be {bounds}, got {shown(number)}; correct it")
        if not abs(number) <= (_LARGEST if isinstance(number, int) else sys.float_info.max):
            raise error(f"{name} is {shown(number)}, beyond what can be counted with; correct it")


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, UnionType):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        many = parts[-1] is Ellipsis
        return (
            isinstance(value, tuple) and (many or len(value) == len(parts)) and all(_fits(v, parts[0]) for v in value)
        )
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _spoken(hint: Any) -> str:
    """
    >>> _spoken(tuple[int, int]), _spoken(str | None)
    ('a list of 2 whole numbers', 'text or nothing')
    """
    if isinstance(hint, UnionType):
        return " or ".join(_spoken(part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        plural = {int: "whole numbers", float: "numbers", str: "texts"}[parts[0]]
        return f"a list of {plural}" if parts[-1] is Ellipsis else f"a list of {len(parts)} {plural}"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "nothing"}[hint]


def entries(value: Any, where: str) -> Mapping[str, Any]:
    """A mapping, and nothing else."""
    if not isinstance(value, Mapping):
        raise error(f"{where} wants names with values, got {shown(value)}; correct it")
    return value


def known(name: Any, names: Any, where: str) -> None:
    if name not in names:
        raise error(f"{where} has no {shown(name)}; {meant(name, names)}")


def meant(name: Any, names: Any) -> str:
    close = difflib.get_close_matches(shown(name).strip("'").lower(), [str(n) for n in names], n=1, cutoff=0.5)
    return f"perhaps you meant {close[0]!r}" if close else f"choose from {', '.join(str(n) for n in names)}"


def mesh_sizes(text: str | None) -> dict[str, int]:
    """Sizes by axis.

    Raises:
      MetarecError: text that is not like ``data=4,model=2``.

    >>> mesh_sizes("data=4,model=2"), mesh_sizes("model=8"), mesh_sizes(None)
    ({'data': 4, 'model': 2}, {'model': 8}, {})
    """
    sizes: dict[str, int] = {}
    for part in (text or "").split(",") if text is not None else []:
        name, _, number = part.strip().partition("=")
        if name not in ("data", "model") or name in sizes or not number.isdecimal() or not 1 <= int(number) < 2**31:
            raise error(f"mesh: {text!r} is not understood at {part.strip()!r}; write --mesh data=4,model=2")
        sizes[name] = int(number)
    return sizes
