"""From a configuration to values: data, split, tasks, model, learner, start, optimisers. Heavy imports are lazy."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metarec_jax.experiment.config import (
    SUPPORT,
    Config,
    DataConfig,
    LearnerConfig,
    ModelConfig,
    SplitConfig,
    TaskConfig,
)
from metarec_jax.learners import registry
from metarec_jax.options import error

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from metarec_jax.core import Array, Learner, Method, Model, Params
    from metarec_jax.data.draw import TaskSource
    from metarec_jax.data.interactions import Interactions
    from metarec_jax.data.splits import Split
    from metarec_jax.data.store.held_out import Held
    from metarec_jax.data.store.opened import Store
    from metarec_jax.training.step import Optimizers


_SCORED, _FEWEST = 4_000_000, 250
"""Steps of a member that scores all items: as many as make 4 million scores per task in all, 250 or more."""
_WHOLE = 118
"""Most support examples of a training task that holds a whole history."""


def build_data(config: DataConfig, *, data_dir: str | Path | None = None) -> Interactions:
    """Read the data set or the file that ``config`` names. ``data_dir`` is the cache of named data sets."""
    from metarec_jax.core import MetarecWarning
    from metarec_jax.data.io import datasets, readers

    columns = {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(config)
        if f.name not in ("name", "implicit", "tasks_of")
    }
    path = Path(config.name).expanduser()
    if path.exists() and config.name not in datasets.DATASETS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MetarecWarning)  # the command prints the notes
            return _sides(config, readers.read(path, implicit=config.implicit, **columns))
    given = [f.name for f in dataclasses.fields(config) if f.name in columns and columns[f.name] != f.default]
    data = datasets.load(config.name, data_dir=data_dir)
    if given:
        raise error(f"{given[0]} is for files, and {config.name!r} is a named data set; leave it out")
    return _sides(config, dataclasses.replace(data, rating=None) if config.implicit else data)


def _sides(config: DataConfig, data: Interactions) -> Interactions:
    from metarec_jax.data.item_tasks import exchanged

    if config.tasks_of == "users":
        return data
    note = "tasks are of items: what is called a user from here on is an item, and what is called an item a user"
    turned = exchanged(data)
    return dataclasses.replace(turned, notes=(*turned.notes, note))


def open_store(config: DataConfig) -> Store | None:
    """The task store that ``config`` names; None where it names something else."""
    from metarec_jax.data.store import opened as store

    path = Path(config.name).expanduser()
    if not store.is_store(path):
        return None
    told = ("name", "implicit", "user_features", "item_features")
    given = [f.name for f in dataclasses.fields(config) if f.name not in told and getattr(config, f.name) != f.default]
    if given:
        raise error(f"{given[0]} was settled when the store {path} was prepared; leave it out, or prepare it again")
    found = store.open_store(path, user_features=config.user_features, item_features=config.item_features)
    if config.implicit and not found.implicit:
        raise error(f"the store {path} holds ratings; prepare it with --implicit, or leave --implicit out")
    return found


def build_stream(config: Config, store: Store, held: Held) -> TaskSource:
    """Tasks streamed from a store, of the users and items that are not held out."""
    from metarec_jax.data.store.stream import stream_source

    if registry.row(config.learner.name).start == "counts":
        raise error(
            f"{config.learner.name} counts all ratings in memory, and {store.path} is streamed; take --learner ridge"
        )
    if build_learner(config, held.data).user_rows == "own" and config.tasks.user_rows != "own":
        raise error(
            f"{config.learner.name} learns from rows of the users, and {store.path} is streamed with rows of a few; "
            "give --user-rows own"
        )
    given = _drawing(config.tasks, held.data, store.longest)
    return stream_source(store, held.users, held.items, **given, seed=config.train.seed)


def build_split(config: SplitConfig, data: Interactions) -> Split:
    """Part the data as ``config`` says."""
    from metarec_jax.data import splits

    if config.partition is not None:
        from metarec_jax.data.io import published

        return published.read_partition(config.partition, data, validation=config.validation, seed=config.seed)
    return splits.split(
        data, config.scenarios, by=config.by, test=config.test, validation=config.validation, seed=config.seed
    )


def build_mesh(sizes: Mapping[str, int]) -> Mesh | None:
    """The mesh of these sizes, by default of all devices that there are; None for a single one."""
    import jax

    from metarec_jax.training.devices import sharding

    mesh = sharding.make_mesh(**sizes) if sizes or jax.device_count() > 1 else None
    return None if mesh is None or mesh.size == 1 else mesh


def negatives(config: TaskConfig, data: Interactions) -> int:
    """Negatives for each positive: as configured, or by the kind of feedback."""
    from metarec_jax.data.draw import negatives_of

    return negatives_of(config.negatives, data.implicit)


def support(config: TaskConfig, longest: int) -> tuple[int, int]:
    """Fewest and most support examples: as configured, or 3 to 64, or what histories of at most ``longest`` hold.

    >>> support(TaskConfig(), 20), support(TaskConfig(), 3), support(TaskConfig(support=(2, 8)), 3)
    ((3, 64), (1, 2), (2, 8))
    """
    if config.support is not None:
        return config.support
    return SUPPORT if longest > SUPPORT[0] else (min(1, longest - 1), max(1, longest - 1))


def _drawing(config: TaskConfig, data: Interactions, longest: int) -> dict[str, Any]:
    """How tasks are drawn for training, from histories of at most ``longest``."""
    given = dataclasses.asdict(config) | {"negatives": negatives(config, data), "support": support(config, longest)}
    return {name: value for name, value in given.items() if name not in ("max_history", "liked_from")}


def _longest(train: Interactions) -> int:
    """Interactions of the user with the most of them, 1 or more."""
    import numpy as np

    return int(np.bincount(train.user).max(initial=1))


def settled(config: Config, train: Interactions) -> tuple[str, ...]:
    """Where small data decides otherwise than the options or their defaults do, one line each."""
    notes = []
    longest = _longest(train)
    low, high = support(config.tasks, longest)
    if config.tasks.support is None and (low, high) != SUPPORT:
        notes.append(
            f"the longest history to train on has {longest} interactions: --support is {low} {high}, not "
            f"{SUPPORT[0]} {SUPPORT[1]}"
        )
    items = train.items.num_rows - 1
    size = config.learner.options.get("size", 0)
    if registry.row(config.learner.name).built_from == "items" and size > items:
        notes.append(f"there are {items} items: {config.learner.name} has vectors of {items}, not of size={size}")
    return tuple(notes)


def build_source(config: Config, train: Interactions) -> TaskSource:
    """Tasks drawn from the training part, of users with rows of their own where the learner's loss reads these rows."""
    from metarec_jax.data.draw import task_source

    given = _drawing(config.tasks, train, _longest(train))
    own = {"user_rows": "own", "user_drop": 0.0} if build_learner(config, train).user_rows == "own" else {}
    if registry.row(config.learner.name).whole:
        own |= {"whole": True, "item_drop": 0.0, "cold_tasks": 0.0, "negatives": 0}
        if config.tasks.support is None:
            low, high = given["support"]
            own["support"] = (low, max(high, min(_WHOLE, _longest(train) - 1)))
    return task_source(train, **given | own)


def build_model(config: ModelConfig, data: Interactions) -> Model:
    """The model for the columns of ``data``."""
    from metarec_jax import models

    if config.name == "meta_recommender":
        return models.meta_recommender(data.users.num_rows, data.items.num_rows, size=config.size)
    return models.content_model(data.columns, size=config.size, head=config.head, hidden=config.hidden)


def build_loss(config: LearnerConfig, data: Interactions) -> Callable[..., Array]:
    """The loss of the query, as configured or by the learner's row and the kind of feedback."""
    from metarec_jax import losses

    usual = registry.row(config.name).loss[int(data.implicit)]
    name = config.options.get("loss", "auto")
    return losses.LOSSES[usual if name == "auto" else name]


def predicts_ratings(config: Config, data: Interactions) -> bool:
    """Whether scores are ratings: of a mixture on ratings, or of a learner trained by an error of ratings."""
    if config.learner.name == "mixture":
        return not data.implicit
    return not data.implicit and build_loss(config.learner, data).__name__ in ("mse", "mae")


def resolved(config: Config, data: Interactions, *, streamed: bool = False) -> Config:
    """The configuration with the members of a mixture named, where they are chosen by the data.

    For ratings `ridge`, and the `autoencoder` for lists where it can score all items in each step; for clicks the
    `autoencoder`, or `item_map` on larger catalogues. Of a store that is streamed: one learner that needs no counts.
    """
    from metarec_jax.learners.autoencoder import DENSE_LIMIT

    if config.learner.name != "mixture" or config.learner.options["members"]:
        return config
    lists = ("autoencoder",) if data.items.num_rows <= DENSE_LIMIT and not streamed else ()
    names = (lists or ("item_map",)) if data.implicit else ("ridge", *lists)
    return dataclasses.replace(config, learner=LearnerConfig("mixture", {"members": names}))


def members(config: Config, items: int) -> dict[str, Config]:
    """The configurations of the learners that a mixture trains, by name, the one that rates first.

    Args:
      items: number of items, by which a member that scores all of them in each step takes fewer steps.

    Raises:
      MetarecError: a member that is unknown, or a mixture itself.
    """
    found = {}
    for name in config.learner.options["members"]:
        if registry.row(name).built_from == "methods":
            raise error(f"a mixture cannot have the member {name!r}; name learners that it should train")
        member = dataclasses.replace(config, learner=LearnerConfig(name))
        if registry.row(name).whole:  # each step scores all items
            most = max(_FEWEST, round(_SCORED / max(1, items)))
            steps = min(config.train.steps, most)
            member = dataclasses.replace(member, train=dataclasses.replace(config.train, steps=steps))
        found[name] = member
    return found


def build_method(config: Config, learner: Learner, params: Params) -> Method:
    """A learner of the registry with these parameters, for evaluation: with whole-catalogue scores if it has them."""
    from metarec_jax.core import Method

    name = config.learner.name
    scores = getattr(importlib.import_module(f"metarec_jax.learners.{name}"), f"{name}_scores", None)
    rank = learner.predict if scores is not None else None  # unknown items have content, which `scores` do not read
    return Method(params, learner.adapt, learner.predict, learner.tables, scores, rank)


def build_learner(config: Config, data: Interactions) -> Learner:
    """The meta-learner over the model, for the columns of ``data``.

    Raises:
      MetarecError: a learner of ratings on clicks, or of clicks on ratings; what its factory refuses.
    """
    import jax

    from metarec_jax.learners.rules import RULES

    given, row = config.learner, registry.row(config.learner.name)
    if row.built_from == "methods":
        raise error(f"{given.name!r} is made of fitted methods, not built alone; it is for metarec fit and mr.train")
    if row.feedback == "ratings" and data.implicit:
        raise error(f"learner {given.name!r} is for ratings, and the data has clicks; give --learner item_map")
    if row.feedback == "clicks" and not data.implicit:
        raise error(
            f"learner {given.name!r} is for clicks, and the data has ratings; give --implicit, or --learner ridge"
        )
    make, values = registry.factory(given.name), dict(given.options)
    loss = build_loss(given, data)
    if "loss" in values:
        values["loss"] = loss
    if (rule := values.pop("rule", "auto")) != "auto":
        values["rule"] = RULES[rule]
    if data.implicit and loss.__name__ not in ("mse", "mae") and "expected" in inspect.signature(make).parameters:
        values["expected"] = jax.nn.sigmoid  # scores are logits
    values |= _columns_of_tasks(make)
    if row.built_from == "columns":
        return make(data.columns, **values)
    if row.built_from == "items":
        values["size"] = min(values["size"], data.items.num_rows - 1)  # `settled` says so
        return make(data.items.num_rows, **values)
    model = build_model(config.model, data)
    return (
        make(model, _content_of_tasks(config, data), **values) if row.built_from == "content" else make(model, **values)
    )


def _columns_of_tasks(function: Callable[..., Any]) -> dict[str, str]:
    """The arguments of a learner, or of its start, that name the id of a task and the id of its examples."""
    columns = {"column": "user_id", "other": "item_id"}
    return {key: columns[key] for key in inspect.signature(function).parameters.keys() & columns}


def _content_of_tasks(config: Config, data: Interactions) -> Model:
    """A model of what is known of a task beside its feedback: the user's features (an item's, with sides exchanged)."""
    from metarec_jax import models

    columns = {key: column for key, column in data.columns.items() if key.startswith("user_") and key != "user_id"}
    if not columns:
        side, other = ("user", "item") if config.data.tasks_of == "users" else ("item", "user")
        raise error(
            f"learner {config.learner.name!r} makes the row of a new {side} from its features, and the data has no "
            f"{side} features; give --{side}-features, or --tasks-of {other}s for new {other}s"
        )
    return models.content_model(columns, size=config.model.size, head="mlp")


def with_inner_steps(given: LearnerConfig, steps: int, *, first_order: bool = False) -> LearnerConfig | None:
    """A learner that adapts by ``steps`` inner steps from the parameters that ``given`` trains; None where none does.

    Parameters beyond those of that learner (`core.PROGRESS`) are to be left out.
    """
    like = registry.row(given.name).adapts_like
    if like is None:
        return None
    own = registry.options(like[0])
    values = {key: value for key, value in given.options.items() if key in own} | dict(like[1])
    changed = {"inner_steps": steps, "first_order": first_order, "per_step_losses": False}
    return LearnerConfig(like[0], values | {key: value for key, value in changed.items() if key in own})


def inner_rate(config: Config, data: Interactions) -> float | None:
    """The inner rate that a learner of gradient steps starts with; None for the others."""
    from metarec_jax.learners._inner import inner

    given, row = config.learner, registry.row(config.learner.name)
    if row.adapts_like is None:
        return None
    chosen = inner(
        build_model(config.model, data),
        lr=given.options["inner_lr"],
        steps=given.options["inner_steps"],
        only=given.options.get("only", ()),
        alone=row.alone,
    )
    return chosen.lr


def build_params(config: Config, learner: Learner, train: Interactions) -> Params | None:
    """Where training starts: tables from a quick matrix factorisation, or None for the learner's own start."""
    from metarec_jax.training.loop import run_keys

    if not warm_starts(config, train):
        return None
    params = learner.init(run_keys(config.train.seed)[0])
    start = registry.start(config.learner.name)
    of_lists = "liked_from" in inspect.signature(start).parameters
    threshold = {"liked_from": config.tasks.liked_from} if of_lists else {}
    return start(params, train, seed=config.train.seed, **threshold, **_columns_of_tasks(start))


def warm_starts(config: Config, train: Interactions) -> bool:
    """Whether this run starts from a factorisation (ratings, or a base model; content model, dot product) or counts."""
    start = registry.row(config.learner.name).start
    if start == "counts":
        return True
    if start == "closed form":
        return config.train.warm_start and train.items.num_rows <= 20_000 and _longest(train) > 1
    dot = (config.model.name, config.model.head) == ("content", "dot")
    return config.train.warm_start and dot and (start == "base" or not train.implicit)


def build_optimizers(config: Config, train: Interactions) -> Optimizers:
    """Adam for the dense parameters, lazy Adam for rows, both decayed to a tenth by a cosine.

    From a warm start rows move slowly and are pulled to 0 (AdamW), and the few dense parameters move fast: chosen on
    validation users of ML-1M (docs/decisions.md).
    """
    import optax

    from metarec_jax.training.row_optimizers import lazy_adam
    from metarec_jax.training.step import Optimizers

    row, given = registry.row(config.learner.name), config.train.lr
    warm = warm_starts(config, train) and row.start != "base"  # what is learned over a trained base starts cold
    decayed = lambda lr: optax.cosine_decay_schedule(lr, max(config.train.steps, 1), 0.1)  # noqa: E731
    usual = row.lr if row.lr is not None else 5e-4 if warm else 3e-3
    lr = given if given is not None else usual
    dense = row.dense_rate * lr if warm else lr
    return Optimizers(optax.adam(decayed(dense)), lazy_adam(decayed(lr), weight_decay=0.1 if warm else 0.0))
