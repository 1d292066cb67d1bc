"""The configuration of a run, and the ONE place where a string becomes a value.

Plain frozen dataclasses; every default, bound and line of help stands here and nowhere else (the command line is made
from them). Nothing heavy is imported until something is built.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from metarec_jax.learners import registry
from metarec_jax.options import Checked, entries, error, known, meant, option, spelled

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from metarec_jax.core import Array, Learner, Model, Params
    from metarec_jax.data.held_out import Held
    from metarec_jax.data.interactions import Interactions
    from metarec_jax.data.splits import Split
    from metarec_jax.data.store import Store
    from metarec_jax.data.tasks import TaskSource
    from metarec_jax.training.step import Optimizers


_SUPPORT = (3, 64)
"""Fewest and most support examples, where no option and no short history decides."""


@dataclass(frozen=True)
class DataConfig(Checked):
    """What to learn from: a named data set, or a file or folder and the columns in it."""

    name: str = option("ml-1m", "a data set (ml-1m, ml-100k, synthetic) or the path of a file or folder", flag="data")
    user_col: str | None = option(None, "column of user ids; found by its usual names if not given")
    item_col: str | None = option(None, "column of item ids")
    rating_col: str | None = option(None, "column of ratings; '' reads clicks, not ratings")
    timestamp_col: str | None = option(None, "column of times; '' reads without times")
    title_col: str | None = option(None, "column of display names of items")
    implicit: bool = option(False, "take no notice of ratings: every row is a positive")
    user_features: str | None = option(None, "file with one row a user")
    item_features: str | None = option(None, "file with one row an item")
    unrated_items: bool = option(False, "recommend also items that only the file of item features names")
    duplicates: Literal["last", "first", "mean", "error"] = option("last", "which rating of a repeated pair to keep")
    tasks_of: Literal["users", "items"] = option(
        "users",
        "a task is a user with some items, or (items) an item with some users: users are recommended to new items",
    )


@dataclass(frozen=True)
class SplitConfig(Checked):
    """Which users and items are held out."""

    scenarios: tuple[str, ...] | None = option(
        None, "what to test: warm, user_cold, item_cold, both_cold; by default all that there is enough data for"
    )
    by: Literal["random", "time"] = option("random", "hold out at random, or those who came last")
    test: float = option(0.1, "share of users, and of items, for the test", low=0.0, high=0.9)
    validation: float = option(0.1, "share of users, and of items, for validation", low=0.0, high=0.9)
    seed: int = option(0, "seed of the split", flag="split_seed", low=0)
    partition: str | None = option(None, "file of a published partition, in place of all of the above")


@dataclass(frozen=True)
class TaskConfig(Checked):
    """How a user becomes a task."""

    tasks: int = option(64, "tasks (users) a step", low=1)
    support: tuple[int, int] | None = option(
        None, "fewest and most ratings to adapt on; by default 3 64, or what short histories hold", low=0
    )
    query: int = option(10, "ratings to predict", low=1)
    order: Literal["random", "time"] = option("random", "support and query at random, or past and future")
    user_rows: Literal["prior", "own"] = option("prior", "users enter as new ones, or with a row of their own")
    user_drop: float = option(0.0, "chance that a user's id is hidden", low=0.0, high=1.0)
    item_drop: float = option(0.1, "chance that an item's id is hidden, so that content is learned", low=0.0, high=1.0)
    cold_tasks: float = option(0.3, "chance that all item ids of a task are hidden", low=0.0, high=1.0)
    negatives: int | None = option(
        None, "items never had, for each one had; by default 4 for clicks, 0 for ratings", low=0
    )


@dataclass(frozen=True)
class ModelConfig(Checked):
    """The scoring function."""

    name: Literal["content", "meta_recommender"] = option(
        "content", "ids and features of both sides, or two embeddings and a linear layer", flag="model"
    )
    size: int = option(16, "length of the vectors", low=1, high=4096)
    head: Literal["dot", "mlp"] = option("dot", "of the content model: dot product, or dense layers")
    hidden: tuple[int, ...] = option((64, 64), "units of the dense layers", low=1)


@dataclass(frozen=True)
class LearnerConfig:
    """The meta-learner: its name in the registry, and options of its own.

    Raises:
      MetarecError: a name that is not in the registry, or options that the learner does not have or that do not fit.

    >>> LearnerConfig("leo", {"latent": 4}).options["latent"], str(LearnerConfig("leo", {"latent": 4}))
    (4, 'leo:latent=4')
    """

    name: str = "ridge"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        registry.row(self.name)
        options = entries(self.options, f"options of learner {self.name!r}")
        object.__setattr__(self, "options", registry.complete(self.name, options))

    def __str__(self) -> str:
        """As it is written on the command line, without the options that have their default."""
        own = registry.options(self.name)
        given = [f"{key}={spelled(value)}" for key, value in self.options.items() if value != own[key][1].default]
        return ":".join([self.name, *given])


@dataclass(frozen=True)
class LearnerFlags(Checked):
    """The meta-learner. Options of it follow its name, as leo:latent=8:inner_steps=3; metarec learners lists them.

    The flags below are other names of such options, for learners that have them.
    """

    name: str = option("ridge", "one of: LEARNERS", flag="learner")
    inner_lr: float | None = option(None, "inner rate")
    inner_steps: int | None = option(None, "inner gradient steps")
    rule: str | None = option(None, f"inner rule: {', '.join(registry.RULES)}")
    only: tuple[str, ...] = option((), "parameters that take inner steps, such as 'net', or 'all'")
    first_order: bool = option(False, "treat inner gradients as constants")
    per_step_losses: bool = option(False, "mean of the losses after every inner step")
    remat: bool | None = option(None, "recompute inner steps: less memory, up to a third more time")
    proximal: float | None = option(None, "imaml: how strongly parameters are held at their start")
    context: int | None = option(None, "cavia:size, leo:latent")
    loss: str | None = option(None, f"loss of the query: {', '.join(registry.LOSSES)}")
    precision: float | None = option(None, "ridge, logistic: initial precision of the user's vector")
    classes: int | None = option(None, "protonet: levels of liking")
    similarity: str | None = option(None, "matching: cosine, dot, euclidean or relation")
    latent: bool = option(False, "neural_process: a distribution of users, not one vector")
    clusters: int | None = option(None, "neural_process: tasks in the pool of TaNP")
    written: int | None = option(None, "hypernetwork:hidden")
    slots: int | None = option(None, "memory: slots of the memories")


_FLAG_OF = {("cavia", "size"): "context", ("leo", "latent"): "context", ("hypernetwork", "hidden"): "written"}
"""Options whose flag has another name; `--latent` is not leo's, which takes a number."""


def flags_given(flags: LearnerFlags) -> dict[str, Any]:
    """The flags that were given, without the name of the learner."""
    given = {f.name: getattr(flags, f.name) for f in dataclasses.fields(flags) if f.name != "name"}
    return {name: value for name, value in given.items() if value not in (None, False, ())}


def learner_of(text: str, flags: Mapping[str, Any]) -> LearnerConfig:
    """The learner of ``NAME:option=value``, with the ``flags`` that it has as options.

    Raises:
      MetarecError: as `learners.registry.parse`; a flag that the learner does not have.
    """
    name, values = registry.parse(text)
    mine = flags_of(name)
    for flag, value in flags.items():
        if flag not in mine:
            raise error(
                f"--{flag.replace('_', '-')} is not an option of {name}; its options are: "
                f"{', '.join(registry.options(name)) or 'none'}"
            )
        values = {mine[flag]: value, **values}
    if values.get("only") == ("all",):
        values["only"] = None
    return LearnerConfig(name, values)


def flags_of(name: str) -> dict[str, str]:
    """The flags that a learner has, and which option of it each sets."""
    flags = {f.name for f in dataclasses.fields(LearnerFlags)} - {"name"}
    own = {_FLAG_OF.get((name, key), key): key for key in registry.options(name)}
    return {flag: key for flag, key in own.items() if flag in flags}


@dataclass(frozen=True)
class TrainConfig(Checked):
    """Meta-training."""

    steps: int = option(1000, "outer steps", low=1)
    lr: float | None = option(
        None,
        "outer rate, decayed to a tenth; by default 0.0005 from a warm start, else 0.003; gaussian_process 0.05",
        low=0.0,
    )
    seed: int = option(0, "seed of parameters and tasks", low=0)
    warm_start: bool = option(True, "start item vectors from a matrix factorisation")
    validate_every: int = option(250, "steps between validations", low=1)
    patience: int = option(8, "validations without a better one before stopping early", low=1)
    save_every: int = option(250, "steps between checkpoints", low=1)
    micro_batches: int | None = option(
        None, "parts of a step's tasks that adapt one after the other, for less memory; by default what is fast", low=1
    )
    dtype: Literal["float32", "bfloat16"] = option(
        "float32", "precision of the computation; parameters and optimisers stay float32"
    )


@dataclass(frozen=True)
class Config:
    """A run. ``Config()`` is what ``metarec fit`` does.

    >>> Config(learner=LearnerConfig("maml", {"inner_steps": 1})).train.steps
    1000
    >>> from_dict(to_dict(Config())) == Config()
    True
    """

    data: DataConfig = field(default_factory=DataConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    tasks: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        scenarios = ("warm", "user_cold", "item_cold", "both_cold")
        for name in self.split.scenarios or ():
            if name not in scenarios:
                raise error(f"split.scenarios: {name!r} is not known; {meant(name, scenarios)}")
        low, high = self.tasks.support or _SUPPORT
        if low > high:
            raise error(f"tasks.support: the fewest, {low}, is more than the most, {high}; swap them")
        if registry.row(self.learner.name).built_from == "vectors" and self.model.name == "meta_recommender":
            raise error(
                f"learner {self.learner.name!r} requires model 'content'; give --model content, or --learner maml"
            )


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain dicts and lists, for JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(part) for key, part in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(config))


def from_dict(values: Mapping[str, Mapping[str, Any]]) -> Config:
    """The configuration of nested dicts; what is not given has its default.

    Raises:
      MetarecError: an unknown name, or a value of the wrong type or out of bounds.
    """
    sections = typing.get_type_hints(Config)
    parts = {}
    for name, given in entries(values, "the configuration").items():
        known(name, sections, "the configuration")
        entries(given, f"section {name!r}")
        names = [f.name for f in dataclasses.fields(sections[name])]
        for key in given:
            known(key, names, f"section {name!r}")
        parts[name] = sections[name](**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    return Config(**parts)


def build_data(config: DataConfig, *, data_dir: str | Path | None = None) -> Interactions:
    """Read the data set or the file that ``config`` names. ``data_dir`` is the cache of named data sets."""
    from metarec_jax.core import MetarecWarning
    from metarec_jax.data import datasets, readers

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

    return exchanged(data) if config.tasks_of == "items" else data


def open_store(config: DataConfig) -> Store | None:
    """The task store that ``config`` names; None where it names something else."""
    from metarec_jax.data import store

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
    from metarec_jax.data.stream import stream_source

    if registry.row(config.learner.name).start == "counts":
        raise error(
            f"{config.learner.name} counts all ratings in memory, and {store.path} is streamed; take --learner ridge"
        )
    given = dataclasses.asdict(config.tasks) | {
        "negatives": negatives(config.tasks, held.data),
        "support": support(config.tasks, store.longest),
    }
    return stream_source(store, held.users, held.items, **given, seed=config.train.seed)


def build_split(config: SplitConfig, data: Interactions) -> Split:
    """Part the data as ``config`` says."""
    from metarec_jax.data import splits

    if config.partition is not None:
        return splits.read_partition(config.partition, data, validation=config.validation, seed=config.seed)
    return splits.split(
        data, config.scenarios, by=config.by, test=config.test, validation=config.validation, seed=config.seed
    )


def build_mesh(sizes: Mapping[str, int]) -> Mesh | None:
    """The mesh of these sizes, by default of all devices that there are; None for a single one."""
    import jax

    from metarec_jax.training import sharding

    mesh = sharding.make_mesh(**sizes) if sizes or jax.device_count() > 1 else None
    return None if mesh is None or mesh.size == 1 else mesh


def negatives(config: TaskConfig, data: Interactions) -> int:
    """Negatives for each positive: as configured, or by the kind of feedback."""
    return config.negatives if config.negatives is not None else 4 if data.implicit else 0


def support(config: TaskConfig, longest: int) -> tuple[int, int]:
    """Fewest and most support examples: as configured, or 3 to 64, or what histories of at most ``longest`` hold.

    >>> support(TaskConfig(), 20), support(TaskConfig(), 3), support(TaskConfig(support=(2, 8)), 3)
    ((3, 64), (1, 2), (2, 8))
    """
    if config.support is not None:
        return config.support
    return _SUPPORT if longest > _SUPPORT[0] else (min(1, longest - 1), max(1, longest - 1))


def _longest(train: Interactions) -> int:
    """Interactions of the user with the most of them, 1 or more."""
    import numpy as np

    return int(np.bincount(train.user).max(initial=1))


def settled(config: Config, train: Interactions) -> tuple[str, ...]:
    """Where small data decides otherwise than the options or their defaults do, one line each."""
    notes = []
    longest = _longest(train)
    low, high = support(config.tasks, longest)
    if config.tasks.support is None and (low, high) != _SUPPORT:
        notes.append(
            f"the longest history to train on has {longest} interactions: --support is {low} {high}, not "
            f"{_SUPPORT[0]} {_SUPPORT[1]}"
        )
    items = train.items.num_rows - 1
    size = config.learner.options.get("size", 0)
    if registry.row(config.learner.name).built_from == "items" and size > items:
        notes.append(f"there are {items} items: {config.learner.name} has vectors of {items}, not of size={size}")
    return tuple(notes)


def build_source(config: Config, train: Interactions) -> TaskSource:
    """Tasks drawn from the training part; a Gaussian process must know whom it counted."""
    from metarec_jax.data.tasks import task_source

    given = dataclasses.asdict(config.tasks) | {
        "negatives": negatives(config.tasks, train),
        "support": support(config.tasks, _longest(train)),
    }
    counts = registry.row(config.learner.name).start == "counts"
    counted = {"user_rows": "own", "user_drop": 0.0} if counts else {}
    return task_source(train, **given | counted)


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


def build_learner(config: Config, data: Interactions) -> Learner:
    """The meta-learner over the model, for the columns of ``data``.

    Raises:
      MetarecError: a learner of ratings on clicks, or of clicks on ratings; what its factory refuses.
    """
    import jax

    from metarec_jax.learners.rules import RULES

    given, row = config.learner, registry.row(config.learner.name)
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
    if row.family == "cold rows":
        sides = {"column": "user_id", "other": "item_id"}
        values |= {key: sides[key] for key in inspect.signature(make).parameters.keys() & sides}
    if row.built_from == "columns":
        return make(data.columns, **values)
    if row.built_from == "items":
        values["size"] = min(values["size"], data.items.num_rows - 1)  # `settled` says so
        return make(data.items.num_rows, **values)
    model = build_model(config.model, data)
    return (
        make(model, _content_of_tasks(given.name, data), **values)
        if row.built_from == "content"
        else make(model, **values)
    )


def _content_of_tasks(name: str, data: Interactions) -> Model:
    """A model of what is known of a task beside its feedback: the user's features (an item's, with sides exchanged)."""
    from metarec_jax import models

    columns = {key: column for key, column in data.columns.items() if key.startswith("user_") and key != "user_id"}
    if not columns:
        raise error(
            f"learner {name!r} makes a row of a new user's features, and the data has none; give --user-features, or "
            "--tasks-of items for new items"
        )
    return models.content_model(columns, head="mlp")


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
    from metarec_jax import learners
    from metarec_jax.training.loop import run_keys

    if not warm_starts(config, train):
        return None
    params = learner.init(run_keys(config.train.seed)[0])
    if registry.row(config.learner.name).start != "factorisation":
        return registry.start(config.learner.name)(params, train, seed=config.train.seed)
    return learners.warm_start(params, train, seed=config.train.seed)


def warm_starts(config: Config, train: Interactions) -> bool:
    """Whether this run starts from a factorisation (ratings, the content model, dot-product head) or from counts."""
    start = registry.row(config.learner.name).start
    if start == "counts":
        return True
    if start == "closed form":
        return config.train.warm_start and train.items.num_rows <= 20_000 and _longest(train) > 1
    dot = (config.model.name, config.model.head) == ("content", "dot")
    return config.train.warm_start and dot and not train.implicit


def build_optimizers(config: Config, train: Interactions) -> Optimizers:
    """Adam for the dense parameters, lazy Adam for rows, both decayed to a tenth by a cosine.

    From a warm start rows move slowly and are pulled to 0 (AdamW), and the few dense parameters move fast: chosen on
    validation users of ML-1M (docs/decisions.md).
    """
    import optax

    from metarec_jax.training.row_optimizers import lazy_adam
    from metarec_jax.training.step import Optimizers

    warm, given = warm_starts(config, train), config.train.lr
    decayed = lambda lr: optax.cosine_decay_schedule(lr, max(config.train.steps, 1), 0.1)  # noqa: E731
    row = registry.row(config.learner.name)
    usual = row.lr if row.lr is not None else 5e-4 if warm else 3e-3
    lr = given if given is not None else usual
    dense = row.dense_rate * lr if warm else lr
    return Optimizers(optax.adam(decayed(dense)), lazy_adam(decayed(lr), weight_decay=0.1 if warm else 0.0))
