"""Plain models trained by gradient descent and tuned as carefully as a meta-learner.

Each is trained on all interactions, with a row per user, and then serves a new user in the way that is best on
validation tasks: unchanged; after gradient steps on the user's row, or on all parameters; or with the user's vector in
closed form. They take minutes, so `metarec fit` omits them; `metarec compare` runs them if named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metarec_jax import losses, tree
from metarec_jax.baselines.closed_form import BASELINES, LISTS
from metarec_jax.baselines.tuning import Held, check_settings, fit_baselines, on_device, quality, some_users, tune
from metarec_jax.core import Array, Column, Learner, MetarecError, Method, Model, Params
from metarec_jax.data.catalogue import Catalogue
from metarec_jax.data.draw import task_source
from metarec_jax.data.interactions import Interactions
from metarec_jax.data.tasks import TaskSet
from metarec_jax.learners._starts import warm_start
from metarec_jax.learners.fine_tune import fine_tune
from metarec_jax.learners.logistic import logistic
from metarec_jax.learners.ridge import ridge
from metarec_jax.learners.rules import meta_sgd
from metarec_jax.models.ctr import deepfm, factorization_machine, two_tower
from metarec_jax.training.loop import fit, run_keys
from metarec_jax.training.row_optimizers import lazy_adam
from metarec_jax.training.validation import validator

Settings = dict[str, Any]


class Plain(NamedTuple):
    """A plain model and its training.

    Attributes:
      build: builds the model from the columns of the data.
      warm: whether it starts from a matrix factorisation (`learners._starts`), like a meta-learner.
      lr: learning rate: small from a warm start; else large, since a user's row is in few batches.
    """

    build: Callable[[Mapping[str, Column]], Model]
    warm: bool = False
    lr: float = 0.03


TRAINED: Mapping[str, Plain] = MappingProxyType(
    {
        "sgd_mf": Plain(lambda columns: factorization_machine({n: columns[n] for n in ("user_id", "item_id")})),
        "factorization_machine": Plain(factorization_machine),
        "two_tower": Plain(two_tower, warm=True, lr=1e-3),
        "deepfm": Plain(deepfm),
    }
)
"""Models by name. ``sgd_mf``, matrix factorisation with biases, uses only the ids."""

_DECAYS = (0.3, 1.0, 3.0)
_CLOSED: Sequence[Settings] = (
    {"way": "nothing", "strength": 0.0},
    *({"way": "fold_in", "strength": precision} for precision in (0.3, 1.0, 3.0, 10.0, 30.0)),
)
_STEPPED: Sequence[Settings] = tuple(
    {"way": way, "strength": rate, "fine_steps": count}
    for way in ("row", "all")
    for count in (1, 10)
    for rate in (0.03, 0.1, 0.3, 1.0)
)
_CLICK_TASKS = 256
"""Number of tasks per scenario on which the ways are tried for clicks, since each scores all items."""
_ROW = ("tables/user_id",)
_STEPS = ("row", "all")
_WAYS = ("nothing", *_STEPS, "fold_in")
DEFAULTS: Mapping[str, Any] = MappingProxyType({"weight_decay": 1.0, "way": "fold_in", "strength": 3.0})
"""Settings without validation tasks; ``lr`` replaces the rate of the model.

``way`` is how a new user is served: "nothing"; "row" or "all", ``fine_steps`` gradient steps at rate ``strength``;
or "fold_in", closed form, of precision ``strength``.
"""


def fit_plain(
    name: str,
    train: Interactions,
    known: Catalogue,
    validation_tasks: Mapping[str, TaskSet] | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    steps: int = 1500,
    seed: int = 0,
    say: Callable[[str], None] | None = None,
    liked_from: float | None = None,
) -> Method:
    """Fit a plain model for new users, after tuning (`tune_plain`) if there are validation tasks.

    Args:
      name: a name of `TRAINED`; names of `BASELINES` and `LISTS` are passed to `tuning.fit_baselines`.
      train: interactions; known: the catalogue of the data, as for `evaluate`.
      validation_tasks: by scenario; None or empty: the defaults, and the last step of training.
      settings: settings from `tune_plain`, such as on another split of the data; disables tuning, and validation tasks
        only choose the step of training.
      steps: training steps, each a batch of 64 users.
      seed: seed of the initial parameters and of the batches.
      say: called with one line on the result of tuning.
      liked_from: of lists, as in `tuning.fit_baselines`.

    Returns:
      A method with its tables, for `evaluate` and `Recommender`.

    Raises:
      MetarecError: the name or a setting is unknown, or a value is invalid.
    """
    if name in BASELINES or name in LISTS:
        by_name = None if settings is None else {name: settings}
        fitted = fit_baselines(
            train, known, validation_tasks, names=[name], settings=by_name, say=say, liked_from=liked_from
        )
        return fitted[name]
    tasks = {scenario: some for scenario, some in (validation_tasks or {}).items() if len(some)}
    trained = _plain(name)
    if settings is not None:
        _check_settings(name, settings)
    elif tasks:
        settings = tune_plain(name, train, known, tasks, steps=steps, seed=seed, say=say)
    chosen = {**DEFAULTS, **(settings or {})}
    served = _Served(trained, train)
    params = _trained(served, train, known, tasks, chosen, steps, seed)
    return served.method(params, chosen)


def tune_plain(
    name: str,
    train: Interactions,
    known: Catalogue,
    validation_tasks: Mapping[str, TaskSet],
    *,
    steps: int = 1500,
    seed: int = 0,
    tuning_rows: int = 500_000,
    say: Callable[[str], None] | None = None,
    liked_from: float | None = None,
) -> Settings:
    """Settings for `fit_plain`: the weight decay of the rows, and the way to serve a new user, by validation tasks.

    A model is trained once per decay; the best with the user in closed form, or unchanged, is kept, and then gradient
    steps are tried on it. Selection is by the mean over scenarios of MAE (ratings) or of nDCG@10 over the training
    items (clicks).

    Args:
      tuning_rows: tuning uses the whole histories of random users, about this many interactions.
      others: as in `fit_plain`.
    """
    if name in BASELINES or name in LISTS:
        tuning = partial(tune, names=[name], tuning_rows=tuning_rows, say=say, liked_from=liked_from)
        return tuning(train, known, validation_tasks).get(name, {})
    tasks = {scenario: chosen for scenario, chosen in validation_tasks.items() if len(chosen)}
    if not tasks:
        raise MetarecError("tune_plain requires a validation task, got none; hold out users, or use the defaults")
    part = some_users(train, tuning_rows)
    served = _Served(_plain(name), train)
    names = {column for table in served.model.tables.values() for column in table.columns}
    columns = [c for c in train.columns if c in names or train.columns[c].kind == "numeric"]
    few = {s: t.take(np.arange(len(t)) < _CLICK_TASKS) if train.implicit else t for s, t in tasks.items()}
    held = [on_device(chosen, known, columns=columns) for chosen in few.values()]

    def tried(params: Params, settings: Settings, ways: Sequence[Settings]) -> list[tuple[float, Settings, Params]]:
        each = [{**settings, **way} for way in ways]
        return [(_mean_quality(served.method(params, one), held, known, train), one, params) for one in each]

    results: list[tuple[float, Settings, Params]] = []
    for decay in _DECAYS:
        settings = {**DEFAULTS, "weight_decay": decay}
        results += tried(_trained(served, part, known, tasks, settings, steps, seed), settings, _CLOSED)
    _, settings, params = min(results, key=lambda one: one[0])
    results += tried(params, settings, _STEPPED)
    best, settings, _ = min(results, key=lambda one: one[0])
    if say is not None:
        text = ", ".join(f"{k} {v if isinstance(v, str) else format(v, 'g')}" for k, v in settings.items())
        say(f"{name}: {text} (validation {'nDCG@10' if train.implicit else 'MAE'} {abs(best):.4f})")
    return settings


def _check_settings(name: str, settings: Mapping[str, Any]) -> None:
    """Refuse unknown settings, which the message lists, and invalid values."""
    check_settings(name, settings, [*DEFAULTS, "fine_steps", "lr"])
    chosen = {**DEFAULTS, **settings}
    way, steps, numbers = chosen["way"], chosen.get("fine_steps"), [chosen["weight_decay"], chosen["strength"]]
    if way not in _WAYS:
        raise MetarecError(f"{name}: way {way!r} is not known; use {', '.join(map(repr, _WAYS))}")
    if way in _STEPS and not (isinstance(steps, int) and steps >= 1):
        raise MetarecError(f"{name}: way {way!r} requires fine_steps, 1 or more, got {steps!r}; correct it")
    if way not in _STEPS and steps is not None:
        raise MetarecError(f"{name}: way {way!r} takes no gradient steps, got fine_steps {steps!r}; omit it")
    if not all(np.isfinite(n) and n >= 0 for n in (*numbers, chosen.get("lr", 0.0))):
        raise MetarecError(f"{name}: weight_decay, strength and lr must be numbers of at least 0, got {dict(settings)}")
    if way == "fold_in" and chosen["strength"] == 0:
        raise MetarecError(f"{name}: way 'fold_in' requires a strength above 0, the precision of the user's vector")


def _mean_quality(method: Method, held: list[Held], known: Catalogue, train: Interactions) -> float:
    """Mean over scenarios; infinite if scores are not finite (too high a rate)."""
    value = float(np.mean([quality(method, of_scenario, known, train) for of_scenario in held]))
    return value if np.isfinite(value) else float("inf")


def _plain(name: str) -> Plain:
    if name not in TRAINED:
        raise MetarecError(f"there is no plain model {name!r}; choose from {', '.join((*TRAINED, *BASELINES, *LISTS))}")
    return TRAINED[name]


class _Tuned(NamedTuple):
    """A way to serve a new user: its learner, and its own parameters at a strength."""

    learner: Learner
    own: Callable[[Params, float], dict[str, Any]]


class _Served:
    """A model with the ways to serve a new user; each is built once, so that all strengths share its compilation."""

    def __init__(self, plain: Plain, train: Interactions) -> None:
        self.plain, self.model, self.implicit = plain, plain.build(train.columns), train.implicit
        self.loss = losses.bce if self.implicit else losses.mse
        self._made: dict[tuple[str, int], _Tuned] = {}

    def tuned(self, way: str, steps: int) -> _Tuned:
        if (way, steps) not in self._made:
            self._made[way, steps] = self._make(way, steps)
        return self._made[way, steps]

    def _make(self, way: str, steps: int) -> _Tuned:
        if way == "nothing":
            return _Tuned(fine_tune(self.model, inner_steps=0, loss=self.loss), lambda params, strength: {"rule": {}})
        if way in _STEPS:
            only, rule = (_ROW if way == "row" else None), meta_sgd(1.0)
            learner = fine_tune(self.model, inner_steps=steps, rule=rule, loss=self.loss, only=only)

            def rates(params: Params, strength: float) -> dict[str, Any]:
                body = {name: part for name, part in params.items() if name != "rule"}
                return {"rule": meta_sgd(strength).init(tree.partition(body, only)[0])}

            return _Tuned(learner, rates)
        learner, key = (logistic(self.model), "logistic") if self.implicit else (ridge(self.model), "ridge")
        size = self.model.num_features + 1

        def precisions(params: Params, strength: float) -> dict[str, Any]:
            logs = jnp.full(size, np.log(strength), jnp.float32)
            return {key: {"log_precision": logs, "log_unknown_trust": jnp.zeros((), jnp.float32)}}

        return _Tuned(learner, precisions)

    def method(self, params: Params, settings: Mapping[str, Any]) -> Method:
        """The method of the trained parameters that serves new users as in ``settings``."""
        learner, own = self.tuned(settings["way"], int(settings.get("fine_steps", 0)))
        return Method({**params, **own(params, settings["strength"])}, learner.adapt, learner.predict, learner.tables)


def _trained(
    served: _Served,
    train: Interactions,
    known: Catalogue,
    validation_tasks: Mapping[str, TaskSet],
    settings: Mapping[str, Any],
    steps: int,
    seed: int,
) -> Params:
    """Parameters after pooled training, at the best step by validation with users served as in ``settings``."""
    longest = int(np.bincount(train.user).max(initial=0))
    content = len(served.model.tables) > 2
    source = task_source(
        train,
        support=(1, max(1, min(64, longest - 1))),
        user_rows="own",
        user_drop=0.1,
        item_drop=0.1 if content else 0.0,
        cold_tasks=0.3 if content else 0.0,
    )
    learner = served.tuned("nothing", 0).learner
    schedule = optax.cosine_decay_schedule(settings.get("lr", served.plain.lr), max(steps, 1), 0.1)
    validate = None
    if validation_tasks:
        way, fine_steps = settings["way"], int(settings.get("fine_steps", 0))
        serving, own = served.tuned(way, fine_steps)
        span = None if train.rating is None else (float(train.rating.min()), float(train.rating.max()))
        measure = validator(serving, validation_tasks, known, rating_range=span)

        def validate(params: Params) -> Mapping[str, float]:
            return measure({**params, **own(params, settings["strength"])})

    params: Params = fit(
        learner,
        source,
        steps=steps,
        params=_start(learner, train, served.plain.warm, seed),
        optimizer=optax.adam(schedule),
        rows=lazy_adam(schedule, weight_decay=settings["weight_decay"]),
        seed=seed,
        validate=validate,
        validate_every=max(1, steps // 6),
        monitor="error",
    ).params
    return params


def _start(learner: Learner, train: Interactions, warm: bool, seed: int) -> Params:
    """Initial parameters: from a matrix factorisation, or random with the mean of the targets."""
    params = jax.jit(learner.init)(run_keys(seed)[0])
    if warm:
        return warm_start(params, train, seed=seed)
    mean: Array = jnp.float32(0.0 if train.rating is None else train.rating.mean(dtype=np.float64))
    return {**params, "net": {**params["net"], "params": {**params["net"]["params"], "mean": mean}}}
