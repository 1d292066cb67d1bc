"""A state as a flat list of arrays, each with its path, shape, dtype and digest; and back, bit for bit.

The arrays are on the host, except those that are sharded over the devices of several processes: of these each process
has only its own part, and passes that on as it is.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax.core import MetarecError


class Leaf(NamedTuple):
    """A leaf to be stored. ``dtype`` is that of the leaf: "key<fry>" where ``value`` is the data of a PRNG key."""

    path: str
    value: np.ndarray | jax.Array
    dtype: str


def flatten(state: Any) -> list[Leaf]:
    """The leaves of a pytree of arrays, PRNG keys and numbers, copied to the host, so that the state may be donated.

    Arrays that are sharded over the devices of several processes are not copied.
    """

    def leaf(path: Any, x: Any) -> Leaf:
        value = jax.random.key_data(x) if is_key(x) else x
        value = value if is_spread(value) else np.array(value, copy=True)
        return Leaf(jax.tree_util.keystr(path), value, str(x.dtype if is_key(x) else value.dtype))

    return [leaf(path, x) for path, x in jax.tree_util.tree_leaves_with_path(state)]


def unflatten(values: list[Any], like: Any) -> Any:
    """The pytree ``like`` with these values as its leaves, each of the type and sharding of the one it replaces."""
    placed = [_place(v, leaf) for v, leaf in zip(values, jax.tree.leaves(like), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(like), placed)


def describe(leaf: Leaf) -> dict[str, Any]:
    """Path, shape, dtype and, for an array on the host, sha256 of a leaf; JSON-able."""
    described = {"path": leaf.path, "shape": list(leaf.value.shape), "dtype": leaf.dtype}
    return described | {"sha256": digest(leaf.value)} if isinstance(leaf.value, np.ndarray) else described


def digest(value: np.ndarray) -> str:
    """sha256 of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data).hexdigest()


def target(described: dict[str, Any], like: Any) -> np.ndarray | jax.ShapeDtypeStruct:
    """The target of reading a stored leaf: sharded as ``like`` where that spans several processes, else on the host."""
    shape, dtype = tuple(described["shape"]), host_dtype(described["dtype"])
    if is_spread(like):  # a key's data has more axes than the key, which a partition by name does not divide
        return jax.ShapeDtypeStruct(shape, dtype, sharding=like.sharding)
    return np.empty(shape, dtype)


def empty(target: np.ndarray | jax.ShapeDtypeStruct) -> np.ndarray | jax.Array:
    """The array of a `target` without elements."""
    if isinstance(target, np.ndarray):
        return target
    assert target.sharding is not None
    return jax.make_array_from_callback(target.shape, target.sharding, np.zeros(target.shape, target.dtype).__getitem__)


def host_dtype(name: str) -> np.dtype:
    """The dtype of ``Leaf.value`` for a leaf of dtype ``name``."""
    return np.dtype(np.uint32) if name.startswith("key<") else jnp.dtype(name)


def mismatch(descriptions: Iterable[dict[str, Any]], like: Any, *, precision: bool = True) -> str | None:
    """The first leaf in which descriptions and the pytree ``like`` differ, as text; None where they agree.

    Args:
      descriptions: of `describe`.
      like: the expected pytree, of arrays or shapes.
      precision: whether float32 and float64, or int32 and int64, are different. If not, a leaf is refused only where
        JAX cannot hold it as it was saved.

    >>> mismatch([describe(leaf) for leaf in flatten({"w": jnp.zeros(3)})], {"w": jnp.zeros(4)})
    "['w'] is float32[3] in the checkpoint and float32[4] here"
    """
    expected = {path: _expected(leaf) for path, leaf in by_path(like).items()}
    stored = {d["path"]: (d["shape"], d["dtype"]) for d in descriptions}
    for path in [*expected, *stored]:
        old, new = stored.get(path), expected.get(path)
        x64 = None if old is None or new is None else _x64(old[1], new[1])
        if (
            old is None
            or new is None
            or (old[1] != new[1] and (precision or x64 is not True))
            or (new[0] is not None and old[0] != new[0])
        ):
            there, here = ("absent" if leaf is None else f"{leaf[1]}{leaf[0] or ''}" for leaf in (old, new))
            hint = {
                None: "",
                True: " (JAX_ENABLE_X64 is on here, and was off in training; unset it)",
                False: " (JAX_ENABLE_X64 was on in training, and is off here; set JAX_ENABLE_X64=1)",
            }[x64]
            return f"{path} is {there} in the checkpoint and {here} here{hint}"
    return None


def _x64(there: str, here: str) -> bool | None:
    """Whether JAX_ENABLE_X64 explains the difference of two dtypes: True if it is on here, False if there, else None.

    >>> _x64("float32", "float64"), _x64("int64", "int32"), _x64("float32", "bfloat16")
    (True, False, None)
    """
    if "32" in there and there.replace("32", "64") == here:
        return True
    return False if "64" in there and there.replace("64", "32") == here else None


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their paths.

    >>> by_path({"w": 1, "net": [2]})
    {"['net'][0]": 2, "['w']": 1}
    """
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def below(descriptions: list[dict[str, Any]], name: str) -> dict[int, dict[str, Any]]:
    """The leaves of the entry ``name`` nearest to the root, by position, with paths relative to that entry.

    >>> below([{"path": ".train.params['w']"}, {"path": ".train.step"}], "params")
    {0: {'path': "['w']"}}
    """
    entry = re.compile(rf"^.*?(?:\['{re.escape(name)}'\]|\.{re.escape(name)}(?![^\.\[]))")
    roots = {m.group() for d in descriptions if (m := entry.match(d["path"]))}
    root = min(roots, key=len, default=None)
    chosen = {k: d for k, d in enumerate(descriptions) if root is not None and d["path"].startswith(root)}
    return {k: d | {"path": d["path"].removeprefix(root or "")} for k, d in chosen.items()}


def nested(leaves: dict[str, np.ndarray]) -> Any:
    """Nested dicts of device arrays from key paths such as ``['tables']['item']`` or ``.net[0]``."""
    root: dict[str, Any] = {}
    for path, value in leaves.items():
        names = re.findall(r"\['?(.+?)'?\]|\.([^.\[]+)", path)
        if not names:
            return jnp.array(value)
        place = root
        for name in names[:-1]:
            place = place.setdefault("".join(name), {})
        place["".join(names[-1])] = jnp.array(value)
    return root


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed PRNG key array."""
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def is_spread(leaf: Any) -> bool:
    """Whether a leaf has a part on a device of another process."""
    sharding = getattr(leaf, "sharding", None)
    return sharding is not None and not sharding.is_fully_addressable


def _place(value: Any, like: Any) -> Any:
    if isinstance(like, bool | int | float):
        return type(like)(value.item())
    if isinstance(like, np.ndarray):
        return value
    if isinstance(like, np.generic):
        return value[()]
    if is_key(like):
        name = str(like.dtype).removeprefix("key<").removesuffix(">")
        impl = {"fry": "threefry2x32", "urbg": "unsafe_rbg"}.get(name, name)
        return jax.random.wrap_key_data(_on_devices(value, like), impl=impl)
    return _on_devices(value, like)


def _on_devices(value: Any, like: Any) -> jax.Array:
    if isinstance(value, jax.Array):  # sharded: it was read with the sharding of ``like``
        return value
    sharding = getattr(like, "sharding", None)
    if sharding is not None and getattr(like, "committed", True):
        return jax.device_put(value, sharding)
    return jnp.array(value, copy=True)  # a copy: the buffer may be donated to the next step


def _expected(like: Any) -> tuple[list[int] | None, str]:
    if is_key(like):  # the shape of a key's data depends on its implementation
        return None, str(like.dtype)
    if isinstance(like, bool | int | float):
        return [], str(np.asarray(like).dtype)
    return list(like.shape), str(like.dtype)


def metadata(folder: Path) -> dict[str, Any]:
    """The metadata of a checkpoint: the descriptions of its leaves, and metrics.

    Raises:
      MetarecError: this library did not write the file.
    """
    path = folder / "_CHECKPOINT_METADATA"
    try:
        stored = json.loads(path.read_bytes())["custom_metadata"]
        metrics, described = stored["metrics"], stored["leaves"]
        if all(map(_is_number, metrics.values())) and all(isinstance(d["path"], str) for d in described):
            return stored
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise MetarecError(f"{path} was not written by this library; delete the checkpoint, and the one before is used")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
