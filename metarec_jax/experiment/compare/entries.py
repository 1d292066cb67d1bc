"""The rows of a comparison: methods with their settings, parsed from the command line, in order of simplicity."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from metarec_jax.baselines.closed_form import BASELINES, LISTS
from metarec_jax.baselines.trained import TRAINED
from metarec_jax.baselines.tuning import suitable
from metarec_jax.core import MetarecError
from metarec_jax.data.interactions import Interactions
from metarec_jax.experiment import config as configs
from metarec_jax.learners import registry
from metarec_jax.learners.gaussian_process import DENSE_LIMIT
from metarec_jax.options import meant

TRIVIAL = ("random", "popularity", "item_mean", "user_mean", "bias")
"""Baselines in every table, if they suit the data."""


class Entry(NamedTuple):
    """A row of the table: its name, its kind, and the settings it is trained with."""

    name: str
    kind: Literal["learner", "baseline", "trained"]
    config: configs.Config


def default_learners(data: Interactions) -> tuple[str, ...]:
    """The learners of the registry that are compared by default and suit the kind of feedback and the data's size."""
    kind = "clicks" if data.implicit else "ratings"
    fits = {"gaussian_process": data.items.num_rows <= DENSE_LIMIT}
    return tuple(
        name
        for name, row in registry.ROWS.items()
        if row.compared and row.feedback in ("any", kind) and fits.get(name, True)
    )


def names_of(texts: Sequence[str]) -> list[str]:
    """The names in texts separated by commas, each once.

    >>> names_of(["ridge,maml", "maml:inner_steps=1"])
    ['ridge', 'maml', 'maml:inner_steps=1']
    """
    return list(dict.fromkeys(name.strip() for text in texts for name in text.split(",") if name.strip()))


def learners_of(config: configs.Config, names: Sequence[str], flags: Mapping[str, Any]) -> list[Entry]:
    """Learners by name and options, as ``maml:inner_steps=1``; each of ``flags`` applies to the learners that have it.

    Raises:
      MetarecError: a name or an option is unknown, or none of the learners has a flag.
    """
    for flag in flags:
        if not any(flag in configs.flags_of(registry.parse(text)[0]) for text in names):
            raise MetarecError(
                f"--{flag.replace('_', '-')} is not an option of {', '.join(names)}; omit it, or add a learner that "
                "has it (metarec learners lists them)"
            )
    return [_learner(config, text, flags) for text in names]


def _learner(config: configs.Config, text: str, flags: Mapping[str, Any]) -> Entry:
    own = configs.flags_of(registry.parse(text)[0])
    chosen = configs.learner_of(text, {flag: value for flag, value in flags.items() if flag in own})
    return Entry(text, "learner", dataclasses.replace(config, learner=chosen))


def baseline_of(config: configs.Config, name: str) -> Entry:
    closed = [*BASELINES, *LISTS]
    if name not in closed and name not in TRAINED:
        raise MetarecError(f"--baselines: {name!r} is not known; {meant(name, [*closed, *TRAINED])}")
    return Entry(name, "baseline" if name in closed else "trained", config)


def all_entries(
    config: configs.Config,
    data: Interactions,
    ours: Sequence[Entry],
    plain: Sequence[Entry] | None,
    liked_from: float | None = None,
) -> list[Entry]:
    """The rows of the table, simplest first; trivial baselines are always included.

    Args:
      liked_from: as in `tuning.suitable`.
    """
    suit = suitable(data, liked_from)
    quick = suit if plain is None else [n for n in TRIVIAL if n in suit]
    every = {e.name: e for e in [*(baseline_of(config, n) for n in quick), *(plain or ()), *ours]}
    if repeated := {e.name for e in ours} & {e.name for e in plain or ()}:
        raise MetarecError(f"{sorted(repeated)[0]!r} is named as a learner and as a baseline; remove one of them")
    return sorted(every.values(), key=_simplicity)


def _simplicity(entry: Entry) -> tuple[int, int]:
    """Sort key: statistics and closed forms, then trained plain models, then learners in the order of the registry."""
    if entry.kind != "learner":
        return (0, [*BASELINES, *LISTS].index(entry.name)) if entry.kind == "baseline" else (1, 0)
    return 2, list(registry.ROWS).index(entry.config.learner.name)
