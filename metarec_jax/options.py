"""Options of a run as fields of plain dataclasses: default, help and bounds; bad values are refused, with a remedy."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import operator
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Mapping
from dataclasses import field
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple

_LARGEST = 2**31 - 1
"""Whole numbers count steps, rows and seeds, which are int32 on the device."""


def option(
    default: Any, help: str, *, flag: str | None = None, low: float | None = None, high: float | None = None
) -> Any:
    """A field: its default, its help, its name on the command line, and bounds for each number in it."""
    return field(default=default, metadata={"help": help, "flag": flag, "low": low, "high": high})


F = typing.TypeVar("F", bound=Callable[..., Any])


class Bounds(NamedTuple):
    """Bounds of the numbers of an argument, in a signature: ``size: Annotated[int, Bounds(1)] = 16``.

    Attributes:
      low, high: the smallest and the largest value that is allowed; None for no bound.
    """

    low: float | None = None
    high: float | None = None


POSITIVE = Bounds(1e-12, 1e12)
"""For numbers whose logarithm is learned, or by which a closed form divides: 0 would give NaN."""


def bounded(factory: F) -> F:
    """A factory that refuses arguments outside of the `Bounds` and the ``Literal`` choices in its signature.

    >>> @bounded
    ... def steps(count: Annotated[int, Bounds(1)] = 5, kind: Literal["short", "long"] = "short"):
    ...     return count
    >>> steps(0)
    Traceback (most recent call last):
    metarec_jax.core.MetarecError: steps: count must be 1 or more, got 0; correct it
    >>> steps(kind="lang")
    Traceback (most recent call last):
    metarec_jax.core.MetarecError: steps: kind: 'lang' is not known; perhaps you meant 'long'
    """
    signature = inspect.signature(factory)

    @functools.wraps(factory)
    def build(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        bounds, choices = _limits_of(factory)
        for name, value in arguments.items():
            if name in bounds and isinstance(value, int | float | tuple):
                _check_numbers(f"{factory.__name__}: {name}", value, *bounds[name])
            if name in choices:
                _check_choice(f"{factory.__name__}: {name}", value, choices[name])
        return factory(*args, **kwargs)

    return typing.cast("F", build)


@functools.cache
def _limits_of(factory: Callable[..., Any]) -> tuple[dict[str, Bounds], dict[str, tuple[Any, ...]]]:
    """The bounds and the choices of the arguments of a factory, by name."""
    hints = typing.get_type_hints(factory, include_extras=True)
    marks = {
        name: [mark for mark in typing.get_args(hint)[1:] if isinstance(mark, Bounds)]
        for name, hint in hints.items()
        if typing.get_origin(hint) is Annotated
    }
    choices = {name: typing.get_args(hint) for name, hint in hints.items() if typing.get_origin(hint) is Literal}
    return {name: bounds[0] for name, bounds in marks.items() if bounds}, choices


class Checked:
    """A dataclass whose fields are made by `option`; a value of the wrong type or out of bounds is refused."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            if "help" in f.metadata:
                _check(f"{_section(type(self))}.{f.name}", getattr(self, f.name), hints[f.name], f.metadata)


@functools.cache
def arguments_of(function: Callable[..., Any], named: tuple[tuple[str, tuple[str, ...]], ...] = ()) -> dict[str, Any]:
    """The keyword arguments of a factory that can be written as text, as fields with default, help and bounds.

    They are defined only in the factory: defaults are those of its signature, bounds are its `Bounds`, the help is the
    entry in ``Args:`` of its docstring. An argument that takes an object (a function, an array) is left out.

    Args:
      named: arguments that take an object in Python and one of these names here, as pairs of name and choices; the
        default is the first choice.

    Returns:
      For each argument ``(type, dataclasses.Field)``.

    >>> def steps(model, *, lr: Annotated[float, Bounds(0.0)] = 0.1, loss=None):
    ...     '''Steps.
    ...
    ...     Args:
    ...       model: any; lr: size of a step.
    ...       loss: of a step.
    ...     '''
    >>> kind, lr = arguments_of(steps)["lr"]
    >>> kind, lr.default, lr.metadata["help"], list(arguments_of(steps))
    (<class 'float'>, 0.1, 'size of a step', ['lr'])
    """
    hints = typing.get_type_hints(function, include_extras=True)
    choices, helps = dict(named), _described(function.__doc__ or "")
    fields: dict[str, Any] = {}
    for p in inspect.signature(function).parameters.values():
        if p.kind is not p.KEYWORD_ONLY:
            continue
        hint, bounds, default = hints.get(p.name, object), Bounds(), p.default
        if typing.get_origin(hint) is Annotated:
            hint, *marks = typing.get_args(hint)
            bounds = next((m for m in marks if isinstance(m, Bounds)), bounds)
        if p.name in choices:
            hint, default = Literal[choices[p.name]], choices[p.name][0]
        if isinstance(hint, UnionType):
            parts = [part for part in typing.get_args(hint) if _is_text(part)]
            hint = functools.reduce(operator.or_, parts) if set(parts) - {NoneType} else object
        if _is_text(hint):
            metadata = {"help": helps.get(p.name, ""), "flag": None, **bounds._asdict()}
            fields[p.name] = (hint, field(default=default, metadata=metadata))
    return fields


def checked(owner: str, fields: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """All of ``fields`` (from `arguments_of`) by name: ``values``, each checked, and the defaults of the others.

    Raises:
      MetarecError: a name that is not among the fields (the message lists them), or a value that does not fit.
    """
    for name in values:
        if name not in fields:
            own = ", ".join(fields) or "none"
            raise error(f"{owner} has no option {shown(name)}; {_close(name, fields)}its options are: {own}")
    complete = {}
    for name, (hint, f) in fields.items():
        value = values.get(name, f.default)
        value = tuple(value) if isinstance(value, list) else value
        _check(f"{owner}:{name}", value, hint, f.metadata)
        complete[name] = value
    return complete


def parsed(text: str, hint: Any) -> Any:
    """A value written as text; text that does not fit the type is returned as it is, for `checked` to refuse.

    >>> parsed("3", int), parsed("none", float | None), parsed("true", bool), parsed("net+tables", tuple[str, ...])
    (3, None, True, ('net', 'tables'))
    """
    if isinstance(hint, UnionType):
        if text.lower() == "none" and NoneType in typing.get_args(hint):
            return None
        values = (parsed(text, part) for part in typing.get_args(hint) if part is not NoneType)
        return next((v for v in values if not isinstance(v, str)), text)
    if typing.get_origin(hint) is tuple:
        parts = [part for part in text.split("+") if part]
        return tuple(parsed(part, typing.get_args(hint)[0]) for part in parts)
    if hint is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            return text
    return text


def spelled(value: Any) -> str:
    """A value as text that `parsed` reads.

    >>> spelled(("net", "tables")), spelled(True), spelled(0.5)
    ('net+tables', 'true', '0.5')
    """
    if isinstance(value, tuple):
        return "+".join(map(spelled, value))
    return str(value).lower() if isinstance(value, bool | NoneType) else str(value)


def _described(doc: str) -> dict[str, str]:
    """The help of each argument in the ``Args:`` of a docstring; several may share an entry or a line."""
    section = re.search(r"^Args:\n((?:  .*\n|\n)*)", inspect.cleandoc(doc) + "\n", re.MULTILINE)
    if section is None:
        return {}
    entries = re.split(r"\n(?=\S)", textwrap.dedent(section[1]).strip("\n"))
    pieces = [p for entry in entries for p in re.split(r"; (?=(?:\w+, )*\w+: )", " ".join(entry.split()))]
    helps: dict[str, str] = {}
    for piece in pieces:
        if match := re.match(r"((?:\w+, )*\w+): (.*)", piece):
            helps |= dict.fromkeys(match[1].split(", "), match[2].rstrip(".").replace("`", ""))
    return helps


def _is_text(hint: Any) -> bool:
    if isinstance(hint, UnionType) or typing.get_origin(hint) is tuple:
        return all(_is_text(part) for part in typing.get_args(hint) if part is not Ellipsis)
    return hint in (int, float, str, bool, NoneType) or typing.get_origin(hint) is Literal


def error(message: str) -> Exception:
    from metarec_jax.core import MetarecError  # imports jax, which --help must not

    return MetarecError(message)


def shown(value: Any) -> str:
    """A value for a message: on one line, and cut where it is long."""
    if isinstance(value, int) and value.bit_length() > 256:  # Python refuses to print the longest
        return f"a number of {value.bit_length()} bits"
    text = repr(value[:100] if isinstance(value, str | list | tuple | bytes) else value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _section(kind: type) -> str:
    return {"TaskConfig": "tasks"}.get(kind.__name__, kind.__name__.removesuffix("Config").lower())


def _check(name: str, value: Any, hint: Any, metadata: Mapping[str, Any]) -> None:
    if typing.get_origin(hint) is Literal:
        _check_choice(name, value, typing.get_args(hint))
        return
    if not _fits(value, hint):
        raise error(f"{name} expected {_described_type(hint)}, got {shown(value)}; correct it")
    if isinstance(value, str) and "\0" in value:
        raise error(f"{name} has a zero byte in it: {shown(value)}; correct it")
    _check_numbers(name, value, metadata["low"], metadata["high"])


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise error(f"{name}: {shown(value)} is not known; {meant(value, choices)}")


def _check_numbers(name: str, value: Any, low: float | None, high: float | None) -> None:
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, bool | str | NoneType):
            continue
        if not (-math.inf if low is None else low) <= number <= (math.inf if high is None else high):
            least, most = (f"{bound:g}" if isinstance(bound, float) else bound for bound in (low, high))
            bounds = f"{least} or more" if high is None else f"between {least} and {most}"
            raise error(f"{name} must be {bounds}, got {shown(number)}; correct it")
        if not abs(number) <= (_LARGEST if isinstance(number, int) else sys.float_info.max):
            raise error(f"{name} must fit into 32 bits (a fraction: into 64), got {shown(number)}; correct it")


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


def _described_type(hint: Any) -> str:
    """
    >>> _described_type(tuple[int, int]), _described_type(str | None)
    ('a list of 2 whole numbers', 'text or nothing')
    """
    if isinstance(hint, UnionType):
        return " or ".join(_described_type(part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        plural = {int: "whole numbers", float: "numbers", str: "texts"}[parts[0]]
        return f"a list of {plural}" if parts[-1] is Ellipsis else f"a list of {len(parts)} {plural}"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "nothing"}[hint]


def entries(value: Any, owner: str) -> Mapping[str, Any]:
    """The value, which must be a mapping.

    Raises:
      MetarecError: it is not one; the message names ``owner``.
    """
    if not isinstance(value, Mapping):
        raise error(f"{owner} expected names with values, got {shown(value)}; correct it")
    return value


def known(name: Any, names: Any, owner: str) -> None:
    """Raise MetarecError where ``name`` is not among the ``names`` of ``owner``."""
    if name not in names:
        raise error(f"{owner} has no {shown(name)}; {meant(name, names)}")


def meant(name: Any, names: Any) -> str:
    return _close(name, names).removesuffix("; ") or f"choose from {', '.join(str(n) for n in names)}"


def _close(name: Any, names: Any) -> str:
    close = difflib.get_close_matches(shown(name).strip("'").lower(), [str(n) for n in names], n=1, cutoff=0.5)
    return f"perhaps you meant {close[0]!r}; " if close else ""


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
            raise error(f"--mesh cannot be read at {part.strip()!r}, got {text!r}; write it like --mesh data=4,model=2")
        sizes[name] = int(number)
    return sizes
