"""The sizes that the page promises are those of compiled programs."""

from __future__ import annotations

import re

import numpy as np
import pytest
from test_sharding import compiled_chunk

from benchmarks.device_sizes import sizes
from metarec_jax.core import Table
from metarec_jax.rows import rounded
from metarec_jax.training.devices import exchange, sharding

SIZE, ITEMS, USERS, TASKS = 8, 1_000_000, 2000, 16
TABLES = {"user_id": Table(USERS, SIZE, ("user_id",)), "item_id": Table(ITEMS, SIZE, ("item_id",))}
SLOTS = {"user_id": 3, "item_id": 1 + 6 + 3}


@pytest.mark.parametrize(("data", "model"), [(1, 8), (2, 4), pytest.param(8, 1, marks=pytest.mark.slow)])
def test_bytes_of_a_device_are_those_of_the_program(data, model):
    """The program's arguments are the state, to the few bytes of key, step and dense parameters (17 numbers, thrice)."""
    compiled, _ = compiled_chunk(sharding.make_mesh(data, model), ITEMS)
    told = sizes(TABLES, SLOTS, tasks=TASKS, data=data, model=model, dense=2 * SIZE + 1)
    assert abs(compiled.memory_analysis().argument_size_in_bytes - told.state) < 200


def payload(compiled, kind: str) -> list[int]:
    """Bytes of the result of each collective of this kind, its own part included."""
    found = []
    for shape in re.findall(rf"= (.*?) {kind}(?:-start)?\(", compiled.as_text()):
        parts = re.findall(r"(?:f32|s32|u32|pred)\[([\d,]*)\]", shape)
        found.append(sum(4 * int(np.prod([int(n) for n in dims.split(",") if n])) for dims in parts))
    return found


def test_bytes_over_the_links_are_those_of_the_collectives():
    """8 owners: one all-to-all of ids and two of rows for the items, 8 x capacity places each. The user table of 2,000
    rows is on every device: its 3 slots a task are gathered, ids and gradients. A mean of 17 gradients and 3 metrics."""
    compiled, _ = compiled_chunk(sharding.make_mesh(1, 8), ITEMS)
    places = 8 * exchange.capacity(SLOTS["item_id"] * TASKS // 8, 8)
    assert sorted(payload(compiled, "all-to-all")) == [places * 4, places * SIZE * 4, places * SIZE * 4]
    told = sizes(TABLES, SLOTS, tasks=TASKS, model=8, dense=2 * SIZE + 1)
    crossing = places * 7 // 8 * (4 + 2 * SIZE * 4)
    users = SLOTS["user_id"] * TASKS // 8 * 7 * (4 + SIZE * 4)
    assert told.links == crossing + users + 2 * (2 * SIZE + 1) * 4


def test_a_page_of_a_billion_items():
    """10^9 items and 10^8 users in rows of 64 on 256 devices: 1.1 billion rows of 776 bytes, 3.4 GB a device; twice the
    devices, half of it. With 8 times the devices, and 8 times the tasks, the links carry hardly more."""
    tables = {"user_id": Table(10**8, 64, ("user_id",)), "item_id": Table(10**9, 64, ("item_id",))}
    slots = {"user_id": 3, "item_id": 75}
    at = {n: sizes(tables, slots, tasks=512 * n, model=n) for n in (64, 256, 512)}
    whole = (rounded(10**8) + rounded(10**9)) * 776
    assert at[256].state == pytest.approx(whole / 256) == pytest.approx(3.35e9, rel=0.02)
    assert at[512].state == pytest.approx(at[256].state / 2)
    assert at[512].links == pytest.approx(at[64].links, rel=0.2)
