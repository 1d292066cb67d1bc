"""The rows of a comparison: from what was typed to methods with their settings, in order of simplicity."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from metarec_jax.baselines.closed_form import BASELINES
from metarec_jax.baselines.trained import TRAINED
from metarec_jax.baselines.tuning import suitable
from metarec_jax.core import MetarecError
from metarec_jax.data.interactions import Interactions
from metarec_jax.experiment import config as configs
from metarec_jax.learners import registry
from metarec_jax.learners.gaussian_process import DENSE_LIMIT
from metarec_jax.options import meant

TRIVIAL = ("random", "popularity", "item_mean", "user_mean", "bias")
"""Baselines that stand in every table, where they suit the data."""


class Entry(NamedTuple):
    """A row of the table: what it is called, what it is, and the settings that it is trained with."""

    name: str
    kind: Literal["learner", "baseline", "trained"]
    config: configs.Config


def default_learners(data: Interactions) -> tuple[str, ...]:
    """One of each family, and the closed form that is made for the kind of feedback."""
    kind = "clicks" if data.implicit else "ratings"
    fits = {"gaussian_process": data.items.num_rows <= DENSE_LIMIT}
    return tuple(
        name
        for name, row in registry.ROWS.items()
        if row.compared and row.feedback in ("any", kind) and fits.get(name, True)
    )


def names_of(given: Sequence[str]) -> list[str]:
    """Names given apart or joined by commas, each once.

    >>> names_of(["ridge,maml", "maml:inner_steps=1"])
    ['ridge', 'maml', 'maml:inner_steps=1']
    """
    return list(dict.fromkeys(name.strip() for part in given for name in part.split(",") if name.strip()))


def learners_of(config: configs.Config, names: Sequence[str], flags: Mapping[str, Any]) -> list[Entry]:
    """Learners by their names and options, as ``maml:inner_steps=1``; ``flags`` are for those that have them.

    Raises:
      MetarecError: a name or an option that is not known, or a flag that none of them has.
    """
    for flag in flags:
        if not any(flag in configs.flags_of(registry.parse(text)[0]) for text in names):
            raise MetarecError(
                f"--{flag.replace('_', '-')} is not an option of {', '.join(names)}; leave it out, or name "
                "a learner that has it (metarec learners lists them)"
            )
    return [_learner(config, text, flags) for text in names]


def _learner(config: configs.Config, text: str, flags: Mapping[str, Any]) -> Entry:
    own = configs.flags_of(registry.parse(text)[0])
    chosen = configs.learner_of(text, {flag: value for flag, value in flags.items() if flag in own})
    return Entry(text, "learner", dataclasses.replace(config, learner=chosen))


def baseline_of(config: configs.Config, name: str) -> Entry:
    if name not in BASELINES and name not in TRAINED:
        raise MetarecError(f"--baselines has {name!r}, which is not known; {meant(name, [*BASELINES, *TRAINED])}")
    return Entry(name, "baseline" if name in BASELINES else "trained", config)


def all_entries(
    config: configs.Config, data: Interactions, ours: Sequence[Entry], plain: Sequence[Entry] | None
) -> list[Entry]:
    """The rows of the table, the simplest first: trivial rows are always there."""
    suit = suitable(data)
    quick = suit if plain is None else [n for n in TRIVIAL if n in suit]
    every = {e.name: e for e in [*(baseline_of(config, n) for n in quick), *(plain or ()), *ours]}
    if repeated := {e.name for e in ours} & {e.name for e in plain or ()}:
        raise MetarecError(f"{sorted(repeated)[0]!r} is both a learner and a baseline here; leave one out")
    return sorted(every.values(), key=_simplicity)


def _simplicity(entry: Entry) -> tuple[int, int]:
    """Statistics and closed forms without training, plain models that are trained, then learners as in the registry."""
    if entry.kind != "learner":
        return (0, list(BASELINES).index(entry.name)) if entry.kind == "baseline" else (1, 0)
    return 2, list(registry.ROWS).index(entry.config.learner.name)
