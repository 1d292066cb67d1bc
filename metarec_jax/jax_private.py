"""The only module that uses private names of JAX, one function for each use.

Releases from `OLDEST` to `NEWEST` have them and are tested; pyproject.toml limits pip to those.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

OLDEST, NEWEST = (0, 10), (0, 12)


def is_tested(package: str = "jaxlib") -> bool:
    """Whether this release of JAX is one whose private names and XLA flags are tested."""
    try:
        major, minor = (int(part) for part in version(package).split(".")[:2])
    except (PackageNotFoundError, ValueError):
        return False
    return OLDEST <= (major, minor) <= NEWEST


def backends_are_initialized() -> bool:
    """Whether JAX has begun to compute, after which it does not read flags."""
    return bool(_private("jax._src.xla_bridge", "backends_are_initialized")())


def key_value_client() -> Any:
    """The client of the key-value store of `jax.distributed`."""
    return _private("jax._src.distributed", "global_state").client


def coordinator_address() -> str:
    """HOST:PORT of process 0, as detected by JAX; "" for a single process."""
    return _private("jax._src.distributed", "global_state").coordinator_address or ""


def is_literal(atom: Any) -> bool:
    """Whether an operand of a jaxpr's equation is an inline constant."""
    return isinstance(atom, _private("jax.extend.core", "Literal"))


def evaluated(eqn: Any, arguments: list[Any]) -> list[Any]:
    """The outputs of an equation of a jaxpr for these arguments."""
    result = eqn.primitive.bind(*arguments, **eqn.primitive.get_bind_params(eqn.params))
    return list(result) if eqn.primitive.multiple_results else [result]


def _private(module: str, name: str) -> Any:
    """A name of JAX's inside.

    Raises:
      MetarecError: this release of JAX lacks it.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        from metarec_jax.core import MetarecError  # imports jax, which `is_tested` must not

        oldest, newest = (".".join(map(str, release)) for release in (OLDEST, NEWEST))
        raise MetarecError(
            f"JAX {version('jax')} lacks {module}.{name}; metarec_jax is tested with JAX {oldest} to {newest}: "
            f"pip install 'jax>={oldest},<{NEWEST[0]}.{NEWEST[1] + 1}'"
        ) from error
