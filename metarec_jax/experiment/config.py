"""The configuration of a run.

Plain frozen dataclasses. Every default, bound and help text of a run's options is defined here only, and the command
line is made from them. Importing this module does not import jax.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from metarec_jax.learners import registry
from metarec_jax.options import Checked, entries, error, known, meant, option, spelled

SUPPORT = (3, 64)
"""Minimum and maximum number of support examples, unless an option or short histories decide."""


@dataclass(frozen=True)
class DataConfig(Checked):
    """The data: a named data set, or a file or folder and its columns."""

    name: str = option("ml-1m", "a data set (ml-1m, ml-100k, synthetic), or the path of a file or folder", flag="data")
    user_col: str | None = option(None, "column of user ids; default: detected by its usual names")
    item_col: str | None = option(None, "column of item ids")
    rating_col: str | None = option(None, "column of ratings; '' for clicks, without ratings")
    timestamp_col: str | None = option(None, "column of timestamps; '' for data without times")
    title_col: str | None = option(None, "column of item titles")
    implicit: bool = option(False, "ignore ratings: every row is a positive")
    user_features: str | None = option(None, "file of user features, one row per user")
    item_features: str | None = option(None, "file of item features, one row per item")
    unrated_items: bool = option(False, "also recommend items that appear only in the file of item features")
    duplicates: Literal["last", "first", "mean", "error"] = option(
        "last", "which rating to keep of a user and item that occur together more than once"
    )
    tasks_of: Literal["users", "items"] = option(
        "users",
        "a task is a user with their items or, for items, an item with its users: it finds users for a new item",
    )


@dataclass(frozen=True)
class SplitConfig(Checked):
    """Which users and items are held out."""

    scenarios: tuple[str, ...] | None = option(
        None, "scenarios to test: warm, user_cold, item_cold, both_cold; default: all with enough data"
    )
    by: Literal["random", "time"] = option("random", "hold out users and items at random, or the latest by time")
    test: float = option(0.1, "fraction of users, and of items, held out for the test", low=0.0, high=0.9)
    validation: float = option(0.1, "fraction of users, and of items, held out for validation", low=0.0, high=0.9)
    seed: int = option(0, "seed of the split", flag="split_seed", low=0)
    partition: str | None = option(None, "file of a published partition; it replaces all of the above")


@dataclass(frozen=True)
class TaskConfig(Checked):
    """How a user becomes a task."""

    tasks: int = option(64, "tasks (users) per step", low=1)
    support: tuple[int, int] | None = option(
        None, "minimum and maximum number of support ratings; default: 3 64, or less where histories are short", low=0
    )
    query: int = option(10, "query ratings per task", low=1)
    order: Literal["random", "time"] = option(
        "random", "split a history into support and query at random, or into past and future"
    )
    user_rows: Literal["prior", "own"] = option(
        "prior", "treat every user as new (prior), or give training users an embedding of their own"
    )
    user_drop: float = option(0.0, "probability of hiding a user's id", low=0.0, high=1.0)
    item_drop: float = option(0.1, "probability of hiding an item's id, so that content is learned", low=0.0, high=1.0)
    cold_tasks: float = option(0.3, "probability of hiding all item ids of a task", low=0.0, high=1.0)
    negatives: int | None = option(None, "sampled negatives per positive; default: 4 for clicks, 0 for ratings", low=0)
    liked_from: float | None = option(
        None,
        "rating from which an item counts as liked, in the lists that are learned and in the report; default: three "
        "quarters of the scale, or, where that suits few ratings or nearly all, what a quarter of them reach",
    )
    max_history: int = option(
        100,
        "validation and test: maximum number of ratings to adapt on per user; rankings of the catalogue exclude the "
        "whole history of a known user all the same",
        low=1,
    )


@dataclass(frozen=True)
class ModelConfig(Checked):
    """The model that scores a user and an item."""

    name: Literal["content", "meta_recommender"] = option(
        "content", "ids and features of users and items, or two embeddings and a linear layer", flag="model"
    )
    size: int = option(16, "embedding dimension", low=1, high=4096)
    head: Literal["dot", "mlp"] = option("dot", "head of the content model: dot product, or dense layers")
    hidden: tuple[int, ...] = option((64, 64), "widths of the dense layers", low=1)


@dataclass(frozen=True)
class LearnerConfig:
    """The meta-learner: its name in the registry, and its options.

    Raises:
      MetarecError: the name is not in the registry, or an option is unknown or invalid.

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
        """The learner as written on the command line; options at their defaults are omitted."""
        own = registry.options(self.name)
        changed = [f"{key}={spelled(value)}" for key, value in self.options.items() if value != own[key][1].default]
        return ":".join([self.name, *changed])


@dataclass(frozen=True)
class LearnerFlags(Checked):
    """The meta-learner. Its options follow its name, as in leo:latent=8:inner_steps=3; metarec learners lists them.

    The flags below set the same options, for the learners that have them.
    """

    name: str = option("auto", "one of: LEARNERS; auto is the mixture, with members chosen by the data", flag="learner")
    inner_lr: float | None = option(None, "inner learning rate")
    inner_steps: int | None = option(None, "inner gradient steps")
    rule: str | None = option(None, f"inner update rule: {', '.join(registry.RULES)}")
    only: tuple[str, ...] = option((), "parameters that the inner loop adapts, such as 'net', or 'all'")
    first_order: bool = option(False, "treat inner gradients as constants (first-order approximation)")
    per_step_losses: bool = option(False, "outer loss: mean of the query losses after each inner step")
    remat: bool | None = option(
        None, "recompute inner steps in the backward pass: less memory, up to a third more time"
    )
    proximal: float | None = option(None, "imaml: strength of the proximal term")
    context: int | None = option(None, "cavia: size of the context; leo: size of the latent code")
    loss: str | None = option(None, f"query loss: {', '.join(registry.LOSSES)}")
    precision: float | None = option(None, "ridge, logistic: initial prior precision of the user's vector")
    classes: int | None = option(None, "protonet: number of classes (levels of preference)")
    similarity: str | None = option(None, "matching: cosine, dot, euclidean or relation similarity")
    latent: bool = option(False, "neural_process: encode a user as a distribution instead of a vector")
    clusters: int | None = option(None, "neural_process: clusters in the task pool of TaNP")
    written: int | None = option(None, "hypernetwork: hidden units of the head")
    slots: int | None = option(None, "memory: number of memory slots")


_FLAG_OF = {("cavia", "size"): "context", ("leo", "latent"): "context", ("hypernetwork", "hidden"): "written"}
"""Options whose flag has another name; `--latent` does not set the option of leo, which is a number."""


_FLAGS = {f.name for f in dataclasses.fields(LearnerFlags)} - {"name"}
"""Also the options that stood beside the learner's name in configurations of earlier versions."""


def flags_given(flags: LearnerFlags) -> dict[str, Any]:
    """The flags that are set, without the name of the learner."""
    values = {f.name: getattr(flags, f.name) for f in dataclasses.fields(flags) if f.name != "name"}
    return {name: value for name, value in values.items() if value not in (None, False, ())}


def learner_of(text: str, flags: Mapping[str, Any]) -> LearnerConfig:
    """The learner of ``NAME:option=value``; ``flags`` add options.

    Raises:
      MetarecError: as `learners.registry.parse`, or the learner does not have an option of ``flags``.
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
    """The flags that apply to a learner, each with the option that it sets."""
    own = {_FLAG_OF.get((name, key), key): key for key in registry.options(name)}
    return {flag: key for flag, key in own.items() if flag in _FLAGS}


@dataclass(frozen=True)
class TrainConfig(Checked):
    """Meta-training."""

    steps: int = option(1000, "outer steps", low=1)
    lr: float | None = option(
        None,
        "outer learning rate, decayed to a tenth; default: 0.0005 from a warm start, else 0.003 (gaussian_process: "
        "0.05)",
        low=0.0,
    )
    seed: int = option(0, "seed of the initial parameters and of the tasks drawn", low=0)
    warm_start: bool = option(True, "initialise item embeddings by matrix factorisation")
    validate_every: int = option(250, "steps between validations", low=1)
    patience: int = option(8, "validations without improvement before training stops early", low=1)
    save_every: int = option(250, "steps between checkpoints", low=1)
    micro_batches: int | None = option(
        None,
        "micro-batches of tasks per step, one after the other, which saves memory; default: chosen for speed",
        low=1,
    )
    dtype: Literal["float32", "bfloat16"] = option(
        "float32", "precision of the computation; parameters and optimiser state stay float32"
    )


@dataclass(frozen=True)
class Config:
    """All options of a run; the defaults are those of ``metarec fit --learner ridge``.

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
            raise error(f"tasks.support: the minimum, {low}, is more than the maximum, {high}; swap them")
        row, dot = registry.row(self.learner.name), (self.model.name, self.model.head) == ("content", "dot")
        if row.start == "base" and self.learner.options.get("freeze", True) and not (dot and self.train.warm_start):
            raise error(
                f"learner {self.learner.name!r} makes rows for a model that a factorisation has trained: it requires "
                "--model content, --head dot and a warm start; leave out the options that contradict this"
            )
        if row.built_from == "vectors" and self.model.name == "meta_recommender":
            raise error(
                f"learner {self.learner.name!r} requires the model 'content'; use --model content or --learner maml"
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
    """The configuration as nested plain dicts and lists, for JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(part) for key, part in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(config))


def from_dict(values: Mapping[str, Mapping[str, Any]]) -> Config:
    """The configuration from nested dicts; a missing option has its default.

    Raises:
      MetarecError: a name is unknown, or a value is of the wrong type or out of bounds.
    """
    sections = typing.get_type_hints(Config)
    parts = {}
    for name, section in entries(values, "the configuration").items():
        known(name, sections, "the configuration")
        entries(section, f"section {name!r}")
        names = [f.name for f in dataclasses.fields(sections[name])]
        if name == "learner" and "options" not in section and section.keys() & _FLAGS:
            raise error(
                "the run was trained by an earlier version, whose options were stored otherwise; train it again with "
                "metarec fit ... --fresh"
            )
        for key in section:
            known(key, names, f"section {name!r}")
        parts[name] = sections[name](**{k: tuple(v) if isinstance(v, list) else v for k, v in section.items()})
    return Config(**parts)
