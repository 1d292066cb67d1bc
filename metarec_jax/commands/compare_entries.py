"""The rows of a comparison: from what was typed to methods with their settings, in order of simplicity."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from metarec_jax import config as configs
from metarec_jax.baselines import BASELINES
from metarec_jax.config_gradients import STEPPERS
from metarec_jax.core import MetarecError
from metarec_jax.data.interactions import Interactions
from metarec_jax.learners.gaussian_process import DENSE_LIMIT
from metarec_jax.options import meant
from metarec_jax.plain import TRAINED
from metarec_jax.tuning import suitable

TRIVIAL = ("random", "popularity", "item_mean", "user_mean", "bias")
"""Baselines that stand in every table, where they suit the data."""


class Entry(NamedTuple):
    """A row of the table: what it is called, what it is, and the settings that it is trained with."""

    name: str
    kind: Literal["learner", "baseline", "trained"]
    config: configs.Config


def default_learners(data: Interactions) -> tuple[str, ...]:
    """One of each family, and the closed form that is made for the kind of feedback."""
    counted = () if data.items.num_rows > DENSE_LIMIT else ("gaussian_process",)
    return ("ridge", *(("item_map",) if data.implicit else counted), "maml", "protonet", "neural_process")


def names_of(given: Sequence[str]) -> list[str]:
    """Names given apart or joined by commas, each once.

    >>> names_of(["ridge,maml", "maml:inner_steps=1"])
    ['ridge', 'maml', 'maml:inner_steps=1']
    """
    return list(dict.fromkeys(name.strip() for part in given for name in part.split(",") if name.strip()))


def learner_of(config: configs.Config, text: str) -> Entry:
    """A learner by its name, with options of its own after colons: ``maml:inner_steps=1:first_order=true``."""
    name, *options = text.split(":")
    hints = typing.get_type_hints(configs.LearnerConfig)
    names = typing.get_args(hints["name"])
    if name not in names:
        raise MetarecError(f"--learners has {name!r}, which is not known; {meant(name, names)}")
    given: dict[str, Any] = {"name": name}
    for option in options:
        key, equals, value = option.partition("=")
        if key not in hints or key == "name" or not equals:
            raise MetarecError(
                f"--learners: {option!r} of {name!r} is no option=value of a learner; {meant(key, sorted(hints))}"
            )
        try:
            given[key] = json.loads(value)
        except ValueError:
            given[key] = value
        if hints[key] == tuple[str, ...]:
            given[key] = tuple(value.split("+"))
    return Entry(text, "learner", dataclasses.replace(config, learner=dataclasses.replace(config.learner, **given)))


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
    """Statistics and closed forms without training; plain models trained; closed forms on trained vectors; nearness;
    gradient steps; networks that read the support."""
    if entry.kind != "learner":
        return (0, list(BASELINES).index(entry.name)) if entry.kind == "baseline" else (1, 0)
    name = entry.config.learner.name
    families = (
        ("ridge", "logistic", "item_map", "gaussian_process"),
        ("protonet", "matching"),
        STEPPERS,
        ("maml_plus_plus", "memory"),
    )
    places = ((k, family.index(name)) for k, family in enumerate(families, 2) if name in family)
    return next(places, (2 + len(families), 0))
