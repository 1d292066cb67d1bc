"""``metarec learners``: the learners of the registry."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from typing import Any

from metarec_jax.learners import registry
from metarec_jax.options import spelled


def learners(names: Sequence[str], *, as_json: bool) -> int:
    """List the learners, or describe those in ``names``. Returns 0."""
    chosen = {name: registry.row(name) for name in names} if names else dict(registry.ROWS)
    if as_json:
        print(json.dumps({name: _facts(name) for name in chosen}))
        return 0
    for family, meaning in registry.FAMILIES.items():
        members = [name for name, row in chosen.items() if row.family == family]
        if members:
            print(f"{family}: {meaning}")
        for name in members:
            print("\n".join(_lines(name, whole=bool(names))))
    return 0


def _facts(name: str) -> dict[str, Any]:
    row = registry.row(name)
    options = {
        key: {"default": f.default, "help": f.metadata["help"]} for key, (_, f) in registry.options(name).items()
    }
    return {"family": row.family, "feedback": row.feedback, "paper": row.paper, "options": options}


def _lines(name: str, *, whole: bool) -> list[str]:
    row, options = registry.row(name), registry.options(name)
    kind = "" if row.feedback == "any" else f", {row.feedback} only"
    head = f"  {name}  {row.paper}{kind}"
    if not whole:
        listed = ", ".join(f"{key}={spelled(f.default)}" for key, (_, f) in options.items())
        return [head, textwrap.fill(listed, 110, initial_indent="      ", subsequent_indent="      ")]
    width = max((len(key) for key in options), default=0)
    return [
        head,
        *(
            textwrap.fill(
                f"{key.ljust(width)}  {f.metadata['help']} (default: {spelled(f.default)})",
                110,
                initial_indent="      ",
                subsequent_indent=" " * (width + 8),
            )
            for key, (_, f) in options.items()
        ),
    ]
