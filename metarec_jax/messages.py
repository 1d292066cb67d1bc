"""How messages show values, names and errors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def printable(text: str) -> str:
    """Text with what would move a terminal escaped: control characters, line ends, half characters."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shown(value: Any, most: int = 60) -> str:
    """A value as a message shows it: text in quotes; what would move a terminal escaped, what is long cut.

    >>> print(shown("caf\u00e9\x1b[31m"), shown("a" * 100, 6), shown(10**5000))
    'café\\x1b[31m' 'aaaaa... a number of 16610 bits
    """
    if type(value).__module__ == "numpy" and hasattr(value, "dtype") and not getattr(value, "ndim", 1):
        value = value.item()
    if isinstance(value, str):
        value = value[: most + 1]
    elif isinstance(value, int) and value.bit_length() > 4096:  # Python refuses to spell it
        return f"a number of {value.bit_length()} bits"
    text = printable(repr(value))
    return text if len(text) <= most + 2 else f"{text[:most]}..."


def listed(names: Iterable[Any], most: int = 12) -> str:
    """Names as a message lists them: without quotes, else as `shown`, and not more than a few.

    >>> listed(["user", "item", *"xyz"], 3)
    'user, item, x and 2 more'
    """
    every = [str(name) for name in names]
    few = ", ".join(shown(name)[1:].removesuffix(shown(name)[0]) for name in every[:most])
    return few if len(every) <= most else f"{few} and {len(every) - most} more"


def one_line(error: BaseException) -> str:
    """The first line of what an exception says, fit for a message."""
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    return printable(said[:200])


def first_line(error: BaseException) -> str:
    """What an error says, cut in the middle where it is long: TensorStore puts the reason last.

    >>> first_line(OSError(28, "No space left on device")), first_line(TimeoutError())
    ('[Errno 28] No space left on device', 'TimeoutError')
    """
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 200 else f"{line[:80]} ... {line[-110:]}"
