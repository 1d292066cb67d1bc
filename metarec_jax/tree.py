"""Pytree arithmetic shared by two or more learners."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from metarec_jax.core import Array, MetarecError


def path_name(path: tuple[Any, ...]) -> str:
    """``("net", "params", "Dense_0")`` as ``"net/params/Dense_0"``."""
    return "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)


def partition(tree: Any, prefixes: Sequence[str] | None) -> tuple[dict[str, Array], dict[str, Array]]:
    """Leaves by path name: those under any of ``prefixes`` (None: all), and the others.

    Raises:
      MetarecError: no leaf is under a prefix.

    >>> moving, fixed = partition({"net": {"w": 1, "b": 2}, "tables": {"item_id": 3}}, ["net"])
    >>> sorted(moving), sorted(fixed)
    (['net/b', 'net/w'], ['tables/item_id'])
    """
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
    if prefixes is None:
        return leaves, {}
    under = lambda name, prefix: name == prefix or name.startswith(prefix + "/")  # noqa: E731
    for prefix in prefixes:
        if not any(under(name, prefix) for name in leaves):
            raise MetarecError(f"no parameter is under {prefix!r}; choose from {', '.join(sorted(leaves))}")
    moving = {name: leaf for name, leaf in leaves.items() if any(under(name, p) for p in prefixes)}
    return moving, {name: leaf for name, leaf in leaves.items() if name not in moving}


def merge(like: Any, *parts: dict[str, Array]) -> Any:
    """The tree ``like``, with the leaves that are in ``parts`` by path name replaced.

    >>> merge({"net": {"w": 1, "b": 2}}, {"net/w": 10})
    {'net': {'b': 2, 'w': 10}}
    """
    named = {name: leaf for part in parts for name, leaf in part.items()}
    return jax.tree_util.tree_map_with_path(lambda path, leaf: named.get(path_name(path), leaf), like)
