"""A run of a `mixture`: its plain methods, its weights, and the method that its parameters make."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, MutableMapping
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import jax

from metarec_jax.baselines.fitted import fitted
from metarec_jax.baselines.tuning import fit_baselines
from metarec_jax.core import Method, Params
from metarec_jax.data.catalogue import Catalogue
from metarec_jax.data.interactions import Interactions
from metarec_jax.data.tasks import TaskSet
from metarec_jax.experiment import config as configs
from metarec_jax.experiment import directory as directories
from metarec_jax.experiment.build import build_learner, build_method, members
from metarec_jax.experiment.mixing import mix
from metarec_jax.experiment.protocol import lists_only, rating_range
from metarec_jax.learners.mixture import rebuilt


def plain(
    train: Interactions,
    known: Catalogue,
    validation: Mapping[str, TaskSet],
    tuned: MutableMapping[str, dict[str, Any]],
    liked_from: float,
    say: Callable[[str], None],
) -> dict[str, Method]:
    """The plain methods, tuned on validation tasks; their lists are of what is rated ``liked_from`` or more."""
    return fit_baselines(train, known, validation, say=say, kept=tuned, liked_from=liked_from)


def weighted(
    methods: Mapping[str, Method],
    baselines: Mapping[str, Method],
    configured: Mapping[str, configs.Config],
    data: Interactions,
    validation: Mapping[str, TaskSet],
    known: Catalogue,
    liked_from: float,
) -> Method:
    """The mixture of trained ``methods``, configured so, and of ``baselines``."""
    every = dict(methods) | {name: method for name, method in baselines.items() if name != "random"}
    listing = lists_only(data, every, configured)
    rates = [n for n in every if n not in listing]
    # A list scores the whole catalogue: by methods that do so by one product.
    ranks = [n for n in every if every[n].scores is not None and (n in listing or n in methods)]
    ranks = sorted(ranks or ["popularity"], key=lambda n: (n not in listing, n not in methods))
    return mix(
        every,
        validation,
        known,
        rates=rates,
        ranks=ranks,
        rating_range=rating_range(data),
        liked_from=liked_from,
    )


def rebuild(config: configs.Config, data: Interactions, params: Params) -> Method:
    """The method of a mixture with these parameters."""
    learned = members(config, data.items.num_rows)
    methods = {}
    for name, own in params["methods"].items():
        if name in learned:
            methods[name] = build_method(learned[name], build_learner(learned[name], data), own)
        else:
            methods[name] = fitted(name, own)
    return rebuilt(methods, params)


def shaped(config: configs.Config, data: Interactions, stored: Any) -> Params:
    """Parameters as a checkpoint holds them, in nested dicts, with each learner's in the structure of the learner."""
    learned = members(config, data.items.num_rows)
    methods = {}
    for name, own in stored["methods"].items():
        if name in learned:
            like = jax.eval_shape(build_learner(learned[name], data).init, jax.random.key(0))
            methods[name] = jax.tree_util.tree_map_with_path(lambda path, _, own=own: _at(own, path), like)
        else:
            methods[name] = own
    return {"ratings": {}, **stored, "methods": methods}


def _at(stored: Any, path: Any) -> Any:
    for key in path:
        name = next(getattr(key, field) for field in ("key", "idx", "name") if hasattr(key, field))
        stored = stored[str(name)] if isinstance(stored, dict) else stored[name]
    return stored


class Tuned(dict[str, dict[str, Any]]):
    """What tuning found, by baseline; ``tuned.json`` of a run in a directory keeps it for a measurement that ended."""

    def __init__(self, directory: Path | None, config: configs.Config, data: Interactions, liked_from: float) -> None:
        self._stopped = False
        self._path = None if directory is None else directory / "tuned.json"
        if self._path is None:
            return
        self._identity = json.loads(json.dumps(directories.identity(config, data) | {"liked_from": liked_from}))
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(self._path.read_text())
            if kept["identity"] == self._identity:
                super().__init__(kept["tuned"])

    def stop(self) -> None:
        """End a tuning that runs in another thread at its next baseline."""
        self._stopped = True

    def __contains__(self, name: object) -> bool:
        if self._stopped:
            raise CancelledError
        return super().__contains__(name)

    def __setitem__(self, name: str, settings: dict[str, Any]) -> None:
        super().__setitem__(name, settings)
        if self._path is not None:
            directories.write_json(self._path, {"identity": self._identity, "tuned": self})
