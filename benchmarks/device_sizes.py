"""What a run takes of each device and of the links between them, from the formulas that the code follows.

Nothing is made or compiled, so that sizes can be asked which no machine at hand holds. The bytes of a state are exact
(`sharding.state_shardings` applied to shapes); those over the links are the payload of the collectives of a step, as
`exchange` and `sharding` issue them, where an owner is not asked for more than its capacity.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from metarec_jax.core import Table
from metarec_jax.rows import LARGE, rounded
from metarec_jax.training.devices.exchange import PAYS_FROM, capacity

_FLOAT = _INT = 4


class Sizes(NamedTuple):
    """Bytes.

    Attributes:
      state: on a device: tables, lazy Adam's moments and counts, and the scratch that finds repeated ids.
      links: that a device receives in a step from the others.
      rows: that a device reads and writes of its tables and moments in a step, each once.
    """

    state: int
    links: int
    rows: int


def sizes(
    tables: Mapping[str, Table],
    slots: Mapping[str, int],
    *,
    tasks: int,
    data: int = 1,
    model: int = 1,
    dense: int = 0,
) -> Sizes:
    """A run with lazy Adam on a mesh of ``data x model`` devices.

    Args:
      tables: of the learner.
      slots: ids that a task has of each table: L, one for row 0 and one for each support and query example and value.
      tasks: T of a batch, over all devices.
      dense: numbers in the dense parameters.

    A table of 2^20 rows of 8 in 8 parts: 131,072 rows of 8 numbers, 16 moments, a count and a scratch on each device,
    which asks 8 owners for up to 16 ids each, and 7 of them are others: ids, rows back, gradients.

    >>> table = {"item_id": Table(1 << 20, 8, ("item_id",))}
    >>> found = sizes(table, {"item_id": 10}, tasks=16, model=8)
    >>> found.state == 131_072 * (8 + 16 + 2) * 4, found.links == 7 * 16 * (4 + 32 + 32)
    (True, True)
    """
    devices = data * model
    state = 3 * dense * _FLOAT
    links = 2 * dense * _FLOAT * (devices > 1)
    moved = 0
    for name, table in tables.items():
        there, ids = rounded(table.num_rows), slots[name] * tasks // devices  # ids of one device
        cut = model > 1 and there >= LARGE and there % model == 0
        row = table.size * _FLOAT
        state += there // (model if cut else 1) * (3 * row + 2 * _INT)
        if cut and model >= PAYS_FROM:
            sent = capacity(ids, model) * model  # places for ids, and rows, of all owners
            others = (model - 1) / model
            links += int(sent * (_INT + row) * others) + int(sent * row * others) + sent * (_INT + row) * (data - 1)
            stepped = sent * data
        else:
            links += (ids * (model - 1) * (_INT + row) if cut else 0) + ids * (devices - 1) * (_INT + row)
            stepped = ids * devices
        moved += stepped * (2 * 3 * row + 3 * _INT) + ids * row
    return Sizes(state, links, moved)
