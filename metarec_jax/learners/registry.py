"""One row per learner: what it is built from, what it learns from, and how it is trained by default.

A learner is one file of this package with a factory of the same name, and one row here. Its options, their defaults and
bounds are the factory's signature; the command line, ``mr.train``, ``compare``, the tests' contract, the help and the
reference pages are generated from the two. JAX is imported only with a factory.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from metarec_jax.options import arguments_of, checked, error, meant, parsed

Family = Literal["mixture", "closed form", "nearest", "gradient", "reader", "cold rows", "plain"]
FAMILIES: Mapping[Family, str] = MappingProxyType(
    {
        "mixture": "learners and plain methods together, weighted on validation tasks; the default",
        "closed form": "solved on learned vectors or on counts",
        "nearest": "similarity to the items of the support",
        "gradient": "gradient steps on the support",
        "reader": "networks that read the support",
        "cold rows": "an embedding of a new id, computed from its content",
        "plain": "plain training, then fine-tuning",
    }
)
"""What the learners of a family have in common, the simplest family first."""
LOSSES = ("auto", "mse", "mae", "bce", "bpr", "sampled_softmax")
"""Names of the losses; auto is that of the learner's row."""
RULES = ("auto", "sgd", "meta_sgd", "lslr", "meta_curvature", "lstm", "adam")
"""Names of the inner rules; auto is the learner's own choice."""
_NAMED = (("loss", LOSSES), ("rule", RULES))
_FROM_DATA = ("column", "other", "table", "rating_range", "new_items")
"""Text arguments of factories that follow from the data and are not options of a user."""


class Row(NamedTuple):
    """A learner of the registry.

    Attributes:
      family: see `FAMILIES`; in a comparison the simplest come first.
      paper: the source, short.
      feedback: what it can learn from: "any", "ratings" or "clicks".
      built_from: first argument of the factory: a "model" (any), "vectors" (a model with ``features``), a model and a
        "content" model of the task's own columns, the data's "columns", its number of "items", or fitted "methods".
      start: initial parameters: "factorisation" (`warm_start`, for models that it fits), "base" (the same for clicks
        too: the learner expects a trained model and leaves it as it is), "counts" (always), "closed form" (for
        catalogues that it can hold). A module's own start, if it has one, replaces `warm_start`.
      loss: default loss of the query, for ratings and for clicks.
      whole: whether training tasks hold whole histories, which the learner's loss divides itself.
      lr: default outer rate; None for the usual one.
      dense_rate: rate of dense parameters from a warm start, as a multiple of that of rows.
      adapts_like: the learner, with options, that adapts in the same way by any number of inner steps, for diagnosis
        and serving; None for learners without inner steps.
      alone: whether the inner steps move only small parameters of the task itself, such as a context or a head.
      compared: whether a comparison includes it by default.
      small: options for small data (the tests' contract).
    """

    family: Family
    paper: str
    feedback: Literal["any", "ratings", "clicks"] = "any"
    built_from: Literal["model", "vectors", "content", "columns", "items", "methods"] = "model"
    start: Literal["factorisation", "base", "counts", "closed form"] = "factorisation"
    loss: tuple[str, str] = ("mse", "bce")
    whole: bool = False
    lr: float | None = None
    dense_rate: float = 1.0
    adapts_like: tuple[str, Mapping[str, Any]] | None = None
    alone: bool = False
    compared: bool = False
    small: Mapping[str, Any] = MappingProxyType({})


_STEPS = MappingProxyType({"inner_lr": 0.05, "inner_steps": 2})
_READ = ("mae", "bce")

ROWS: Mapping[str, Row] = MappingProxyType(
    {
        "mixture": Row("mixture", "Wolpert 1992; Breiman 1996", built_from="methods"),
        "ridge": Row(
            "closed form", "Bertinetto et al. 2019 (R2-D2)", built_from="vectors", loss=("mae", "mse"), dense_rate=20,
            compared=True,
        ),
        "logistic": Row(
            "closed form", "Bertinetto et al. 2019 (LR-D2)", "clicks", built_from="vectors", small={"newton_steps": 4},
        ),
        "item_map": Row(
            "closed form", "Paterek 2007; Steck 2020", "clicks", built_from="items", start="closed form",
            loss=("mse", "sampled_softmax"), compared=True, small={"size": 3},
        ),
        "gaussian_process": Row(
            "closed form", "kernels counted from all users, meta-learned weights", "ratings", built_from="columns",
            start="counts", loss=_READ, lr=0.05, compared=True,
        ),
        "protonet": Row(
            "nearest", "Snell et al. 2017; Vartak et al. 2017", built_from="vectors", loss=_READ, dense_rate=20,
            compared=True,
        ),
        "matching": Row("nearest", "Vinyals et al. 2016", built_from="vectors", loss=_READ, dense_rate=20),
        "maml": Row("gradient", "Finn et al. 2017", adapts_like=("maml", {}), compared=True, small=_STEPS),
        "reptile": Row("gradient", "Nichol et al. 2018", adapts_like=("maml", {}), small=_STEPS),
        "imaml": Row(
            "gradient", "Rajeswaran et al. 2019", adapts_like=("imaml", {}),
            small={"inner_lr": 0.05, "inner_steps": 8, "cg_steps": 4},
        ),
        "cavia": Row(
            "gradient", "Zintgraf et al. 2019", adapts_like=("cavia", {}), alone=True,
            small={**_STEPS, "size": 2},
        ),
        "protomaml": Row(
            "gradient", "Triantafillou et al. 2020", built_from="vectors", adapts_like=("protomaml", {}), alone=True,
            small=_STEPS,
        ),
        "maml_plus_plus": Row("gradient", "Antoniou et al. 2019", adapts_like=("maml", {"rule": "lslr"}), small=_STEPS),
        "memory": Row(
            "gradient", "Dong et al. 2020 (MAMO)", built_from="vectors", small={"slots": 2, "inner_steps": 2},
        ),
        "neural_process": Row(
            "reader", "Garnelo et al. 2018; Lin et al. 2021 (TaNP)", built_from="vectors", loss=_READ, dense_rate=20,
            compared=True, small={"size": 2, "width": 4, "hidden": (4,)},
        ),
        "autoencoder": Row(
            "reader", "Liang et al. 2018", built_from="columns", start="counts", whole=True, lr=3e-3,
            loss=("sampled_softmax", "sampled_softmax"), small={"size": 3, "hide": 0.2},
        ),
        "in_context": Row(
            "reader", "Müller et al. 2022; Fang et al. 2024 (HIRE)", built_from="vectors", loss=_READ, dense_rate=20,
            small={"width": 4, "heads": 2},
        ),
        "hypernetwork": Row(
            "reader", "Ha et al. 2016; Requeima et al. 2019", built_from="vectors", loss=_READ, dense_rate=20,
            small={"width": 4},
        ),
        "leo": Row(
            "reader", "Rusu et al. 2019", built_from="vectors", loss=_READ, dense_rate=20,
            small={**_STEPS, "latent": 2, "width": 4},
        ),
        "meta_embedding": Row(
            "cold rows", "Pan et al. 2019", built_from="content", start="base", small={"inner_lr": 0.05},
        ),
        "mwuf": Row(
            "cold rows", "Zhu et al. 2021", built_from="content", start="base", small={"hidden": 4, "inner_lr": 0.05},
        ),
        "cvar": Row("cold rows", "Zhao et al. 2022", built_from="content", start="base", small={"latent": 2}),
        "dropout_net": Row("cold rows", "Volkovs et al. 2017", small={"inner_lr": 0.05}),
        "fine_tune": Row(
            "plain", "Chen et al. 2019", adapts_like=("maml", {"rule": "sgd", "prior": 0.0}), small=_STEPS,
        ),
    }
)  # fmt: skip
"""The learners by name, the simplest family first."""


def row(name: str) -> Row:
    """The row of a learner.

    Raises:
      MetarecError: a name that is not in the registry.
    """
    if name not in ROWS:
        raise error(f"learner {name!r} is not known; {meant(name, ROWS)}")
    return ROWS[name]


def factory(name: str) -> Callable[..., Any]:
    """The function that builds the learner: ``metarec_jax.learners.NAME.NAME``."""
    row(name)
    return getattr(importlib.import_module(f"metarec_jax.learners.{name}"), name)


def start(name: str) -> Callable[..., Any]:
    """``start(params, train, seed=...) -> params``: ``NAME_start`` of the learner's module, else `warm_start`."""
    module = importlib.import_module(f"metarec_jax.learners.{name}")
    return getattr(module, f"{name}_start", None) or importlib.import_module("metarec_jax.learners._starts").warm_start


def options(name: str) -> dict[str, Any]:
    """The options of a learner that can be written as text: ``{name: (type, dataclasses.Field)}``."""
    return {key: kind for key, kind in arguments_of(factory(name), _NAMED).items() if key not in _FROM_DATA}


def complete(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a learner: ``values``, and its defaults for the others.

    Raises:
      MetarecError: an option that the learner does not have (the message lists its own), or a value out of bounds.
    """
    return checked(name, options(name), values)


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """The name and options of ``NAME:option=value:option=value``.

    "auto" is the `mixture` with members chosen by the data.

    Raises:
      MetarecError: an unknown name, or an option that the learner does not have.

    >>> parse("leo:latent=8:inner_steps=3")
    ('leo', {'latent': 8, 'inner_steps': 3})
    """
    name, *parts = text.split(":")
    name = "mixture" if name == "auto" else name
    row(name)
    own = options(name) if parts else {}
    values: dict[str, Any] = {}
    for option in parts:
        key, equals, value = option.partition("=")
        if not equals or not key:
            raise error(f"learner {text!r}: {option!r} is not option=value; its options are: {', '.join(own)}")
        values[key] = parsed(value, own[key][0]) if key in own else value
    complete(name, values)
    return name, values
