"""The configuration of a run, and the ONE place where a string becomes a value.

Plain frozen dataclasses; every default, bound and line of help stands here and nowhere else (the command line is made
from them). Nothing heavy is imported until something is built.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from metarec_jax.config_gradients import build_gradient
from metarec_jax.config_readers import READERS, build_reader
from metarec_jax.options import Checked, entries, error, known, meant, option

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from metarec_jax.core import Array, Learner, Model, Params
    from metarec_jax.data.held_out import Held
    from metarec_jax.data.interactions import Interactions
    from metarec_jax.data.splits import Split
    from metarec_jax.data.store import Store
    from metarec_jax.data.tasks import TaskSource
    from metarec_jax.training.step import Optimizers


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


@dataclass(frozen=True)
class SplitConfig(Checked):
    """Which users and items are held out."""

    scenarios: tuple[str, ...] = option(
        ("warm", "user_cold", "item_cold", "both_cold"), "what to test: warm, user_cold, item_cold, both_cold"
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
    support: tuple[int, int] = option((3, 64), "fewest and most ratings to adapt on", low=0)
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
class LearnerConfig(Checked):
    """The meta-learner."""

    name: Literal[
        "ridge", "logistic", "maml", "maml_plus_plus", "reptile", "imaml", "cavia", "protomaml", "memory",
        "protonet", "matching", "neural_process", "in_context", "hypernetwork", "leo", "gaussian_process",
        "item_map"
    ] = option(
        "ridge",
        "closed form on learned vectors (ridge; logistic: of clicks); gradient steps (maml to memory); nearness to "
        "what was liked (protonet, matching); networks that read the support; gaussian_process: kernels counted on all "
        "ratings, their weights learned; item_map: a map from clicked items to all items, which starts at its best",
        flag="learner",
    )  # fmt: skip
    inner_lr: float | None = option(
        None,
        "inner rate; by default 0.3 where a user's row, context or head adapts alone (there a step on n ratings is "
        "n / (n + 30) as long), else 0.1",
        low=0.0,
    )
    inner_steps: int = option(5, "inner steps of learners that take gradient steps", low=0)
    rule: Literal["auto", "sgd", "meta_sgd", "lslr", "meta_curvature", "lstm", "adam"] = option(
        "auto",
        "maml, reptile, cavia, protomaml: inner rule; all but sgd and adam are learned; auto: meta_sgd for a user's "
        "row, context or head alone, else sgd",
    )
    only: tuple[str, ...] = option(
        (),
        "parameters that take inner steps, such as 'net', or 'all'; by default all, or a dot product's user row; "
        "protomaml: beside the head",
    )
    first_order: bool = option(False, "take inner gradients for constants; maml_plus_plus: in the first 30% of steps")
    per_step_losses: bool = option(False, "maml: mean of the losses after every inner step")
    remat: bool = option(False, "maml: memory for sqrt(inner steps) steps alone, up to a third more time")
    proximal: float = option(1.0, "imaml: how strongly parameters are held at their start", low=1e-6)
    context: int = option(16, "cavia, leo: numbers that a user adapts", low=1)
    loss: Literal["auto", "mse", "mae", "bce", "bpr", "sampled_softmax"] = option(
        "auto",
        "of the query (and of inner steps); auto: ratings mse (mae without inner steps), clicks bce (ridge mse)",
    )
    precision: float | None = option(
        None, "first precision of the user's vector; by default ridge 8 ratings, logistic 1", low=1e-6
    )
    classes: int = option(5, "protonet: levels of liking that have a prototype", low=1)
    similarity: Literal["cosine", "dot", "euclidean", "relation"] = option(
        "cosine", "matching: how alike two items are; relation: by a learned network"
    )
    latent: bool = option(False, "neural_process: a distribution of users, not one vector")
    clusters: int = option(0, "neural_process: tasks in the pool that modulates the decoder (TaNP); 0: none", low=0)
    written: int = option(0, "hypernetwork: units of the user's layer; 0: a vector alone is written", low=0)
    slots: int = option(8, "memory: slots of the memories", low=1)


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
    warm_start: bool = option(True, "start item vectors from a matrix factorisation; on by default")
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

    >>> Config(learner=LearnerConfig(name="maml", inner_steps=1)).train.steps
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
        for name in self.split.scenarios:
            if name not in scenarios:
                raise error(f"split.scenarios: {name!r} is not known; {meant(name, scenarios)}")
        low, high = self.tasks.support
        if low > high:
            raise error(f"tasks.support: the fewest, {low}, is more than the most, {high}; swap them")
        readers = ("ridge", "logistic", *READERS, "memory", "protomaml")
        if self.learner.name in readers and (self.model.name, self.model.head) == ("meta_recommender", "dot"):
            raise error(f"learner {self.learner.name!r} wants model 'content'; give --model content, or --learner maml")


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain dicts and lists, for JSON."""
    return {
        name: {k: list(v) if isinstance(v, tuple) else v for k, v in part.items()}
        for name, part in dataclasses.asdict(config).items()
    }


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
    from metarec_jax.data import datasets, readers

    columns = {
        f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in ("name", "implicit")
    }
    path = Path(config.name).expanduser()
    if path.exists() and config.name not in datasets.DATASETS:
        return readers.read(path, implicit=config.implicit, **columns)
    given = [f.name for f in dataclasses.fields(config) if f.name in columns and columns[f.name] != f.default]
    data = datasets.load(config.name, data_dir=data_dir)
    if given:
        raise error(f"{given[0]} is for files, and {config.name!r} is a named data set; leave it out")
    return dataclasses.replace(data, rating=None) if config.implicit else data


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

    if config.learner.name == "gaussian_process":
        raise error(
            f"gaussian_process counts all ratings in memory, and {store.path} is streamed; take --learner ridge"
        )
    given = {f.name: getattr(config.tasks, f.name) for f in dataclasses.fields(config.tasks) if f.name != "negatives"}
    count = negatives(config.tasks, held.data)
    return stream_source(store, held.users, held.items, **given, negatives=count, seed=config.train.seed)


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


def build_source(config: Config, train: Interactions) -> TaskSource:
    """Tasks drawn from the training part; a Gaussian process must know whom it counted."""
    from metarec_jax.data.tasks import task_source

    given = dataclasses.asdict(config.tasks) | {"negatives": negatives(config.tasks, train)}
    counted = {"user_rows": "own", "user_drop": 0.0} if config.learner.name == "gaussian_process" else {}
    return task_source(train, **given | counted)


def build_model(config: ModelConfig, data: Interactions) -> Model:
    """The model for the columns of ``data``."""
    from metarec_jax import models

    if config.name == "meta_recommender":
        return models.meta_recommender(data.users.num_rows, data.items.num_rows, size=config.size)
    return models.content_model(data.columns, size=config.size, head=config.head, hidden=config.hidden)


def build_loss(config: LearnerConfig, data: Interactions) -> Callable[..., Array]:
    """The loss, as configured or by the learner and the kind of feedback."""
    from metarec_jax import losses

    by_squares = config.name == "ridge"  # fits its support so, whatever the loss of the query
    of_query = by_squares or config.name in (*READERS, "gaussian_process")  # which may be measured as we report it
    fitting = ("mse" if by_squares else "bce") if data.implicit else ("mae" if of_query else "mse")
    fitting = "sampled_softmax" if config.name == "item_map" else fitting
    return losses.LOSSES[fitting if config.loss == "auto" else config.loss]


def build_learner(config: Config, data: Interactions) -> Learner:
    """The meta-learner over the model, for the columns of ``data``."""
    from metarec_jax import learners

    model, given, loss = build_model(config.model, data), config.learner, build_loss(config.learner, data)
    held: dict[str, Any] = {} if given.precision is None else {"precision": given.precision}
    if given.name == "ridge":
        return learners.ridge(model, loss=loss, **held)
    if given.name == "gaussian_process":
        if data.implicit:
            raise error("learner 'gaussian_process' is for ratings, and the data has clicks; give --learner item_map")
        return learners.gaussian_process(data.columns, loss=loss)
    if given.name in ("logistic", "item_map") and not data.implicit:
        raise error(
            f"learner {given.name!r} is for clicks, and the data has ratings; give --implicit, or --learner ridge"
        )
    if given.name == "logistic":
        return learners.logistic(model, loss=loss, **held)
    if given.name == "item_map":
        return learners.item_map(data.items.num_rows, size=config.model.size, loss=loss)
    if given.name in (*READERS, "memory"):
        return build_reader(given, model, loss, clicks=data.implicit)
    return build_gradient(given, model, loss, dot=(config.model.name, config.model.head) == ("content", "dot"))


def build_params(config: Config, learner: Learner, train: Interactions) -> Params | None:
    """Where training starts: tables from a quick matrix factorisation, or None for the learner's own start."""
    import jax

    from metarec_jax import learners

    if not warm_starts(config, train):
        return None
    params = learner.init(jax.random.key(config.train.seed))
    if config.learner.name == "gaussian_process":
        return learners.gaussian_process_start(params, train)
    if config.learner.name == "item_map":
        return learners.item_map_start(params, train, seed=config.train.seed)
    return learners.warm_start(params, train, seed=config.train.seed)


def warm_starts(config: Config, train: Interactions) -> bool:
    """Whether this run starts from a factorisation (ratings, the content model, dot-product head) or from counts."""
    if config.learner.name == "gaussian_process":
        return True
    if config.learner.name == "item_map":
        return config.train.warm_start and train.items.num_rows <= 20_000
    dot = (config.model.name, config.model.head) == ("content", "dot")
    return config.train.warm_start and dot and not train.implicit


def build_optimizers(config: Config, train: Interactions) -> Optimizers:
    """Adam for the dense parameters, lazy Adam for rows, both decayed to a tenth by a cosine.

    From a warm start rows move slowly and are pulled to 0 (AdamW), and the few dense parameters move fast: chosen on
    validation users of ML-1M (docs/decisions.md).
    """
    import optax

    from metarec_jax import learners
    from metarec_jax.training.row_optimizers import lazy_adam
    from metarec_jax.training.step import Optimizers

    warm, given = warm_starts(config, train), config.train.lr
    decayed = lambda lr: optax.cosine_decay_schedule(lr, max(config.train.steps, 1), 0.1)  # noqa: E731
    usual = 0.05 if config.learner.name == "gaussian_process" else 5e-4 if warm else 3e-3
    lr = given if given is not None else usual
    dense = 20 * lr if warm and config.learner.name in ("ridge", *READERS) else lr
    by = optax.adam(decayed(dense))
    by = learners.anneal(by, max(config.train.steps, 1)) if config.learner.name == "maml_plus_plus" else by
    return Optimizers(by, lazy_adam(decayed(lr), weight_decay=0.1 if warm else 0.0))
