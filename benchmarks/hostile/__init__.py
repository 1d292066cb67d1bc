"""What is fuzzed: every way into the library, a good input for each, how it is spoilt, and what must hold of the answer.

A family lays files into a folder and enters there, as a caller would. What it gives back is checked in full; what it refuses, it
must refuse with one readable message. An entry of tests/corpus is a few files that once failed, to lie over the good ones.
"""

from __future__ import annotations

from functools import cache
from random import Random

from benchmarks.hostile import stored, tables
from benchmarks.hostile.checks import Family, Files, Wrong, entered, lay

__all__ = ["FAMILIES", "Family", "Files", "Wrong", "entered", "lay", "spoilt"]

FAMILIES: dict[str, Family] = tables.FAMILIES | stored.FAMILIES


def spoilt(name: str, seed: int, index: int) -> Files:
    """Input ``index`` of a family."""
    rng = Random(f"{seed}/{name}/{index}")
    return FAMILIES[name].spoil(rng, rng.choice(_good(name)))


@cache
def _good(name: str) -> list[Files]:
    return FAMILIES[name].good()
