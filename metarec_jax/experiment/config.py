"""The configuration of a run, and the ONE place where a string becomes a value.

Plain frozen dataclasses; every default, bound and line of help stands here and nowhere else (the command line is made
from them). Nothing heavy is imported until something is built.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from metarec_jax.learners import registry
from metarec_jax.options import Checked, entries, error, known, meant, option, spelled

if TYPE_CHECKING:
    pass


SUPPORT = (3, 64)
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
    max_history: int = option(
        100, "validation and test: most ratings of a user to adapt on; all that a known user had leaves lists", low=1
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
        low, high = self.tasks.support or SUPPORT
        if low > high:
            raise error(f"tasks.support: the fewest, {low}, is more than the most, {high}; swap them")
        if registry.row(self.learner.name).built_from == "vectors" and self.model.name == "meta_recommender":
            raise error(
                f"learner {self.learner.name!r} requires model 'content'; give --model content, or --learner maml"
            )


def configure(learner: str | LearnerConfig, data: str | None, settings: Mapping[str, Any]) -> Config:
    """The configuration of a learner, a data set or file (None: data in memory) and settings by their flags.

    Raises:
      MetarecError: a setting that is not known, or a value that does not fit.

    >>> configure("ridge", None, {"steps": 5, "split_seed": 1}).split.seed
    1
    """
    sections = {name: kind for name, kind in typing.get_type_hints(Config).items() if name != "learner"}
    places = {
        f.metadata["flag"] or f.name: (name, f.name)
        for name, kind in sections.items()
        for f in dataclasses.fields(kind)
        if (name, f.name) != ("data", "name")
    }
    values: dict[str, dict[str, Any]] = {name: {} for name in sections}
    for flag, value in settings.items():
        known(flag, places, "the settings of a run")
        section, field_name = places[flag]
        values[section][field_name] = tuple(value) if isinstance(value, list) else value
    if data is not None:
        values["data"]["name"] = data
    parts = {name: kind(**values[name]) for name, kind in sections.items()}
    chosen = learner if isinstance(learner, LearnerConfig) else LearnerConfig(*registry.parse(learner))
    return Config(**parts, learner=chosen)


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
