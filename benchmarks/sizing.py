"""Memory per device and traffic per link for 10^8 users and 10^9 items: ``python -m benchmarks.sizing``.

The formulas are those of `benchmarks.device_sizes`, which tests compare with compiled programs. Bandwidths are
assumptions, which are printed; the arithmetic of a step is not included.
"""

from __future__ import annotations

import argparse

from benchmarks.device_sizes import sizes
from metarec_jax.core import Table
from metarec_jax.training.devices.budget import format_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=10**8)
    parser.add_argument("--items", type=int, default=10**9)
    parser.add_argument("--size", type=int, default=64, help="numbers per row")
    parser.add_argument("--slots", type=int, default=75, help="item ids per task: 1 + support + query")
    parser.add_argument("--tasks", type=int, default=512, help="tasks per device and step")
    parser.add_argument("--memory-gb-per-s", type=float, default=2000.0, help="assumed bandwidth of a device's memory")
    parser.add_argument("--link-gb-per-s", type=float, default=50.0, help="assumed bandwidth into a device")
    given = parser.parse_args()
    tables = {
        "user_id": Table(given.users, given.size, ("user_id",)),
        "item_id": Table(given.items, given.size, ("item_id",)),
    }
    slots = {"user_id": 3, "item_id": given.slots}
    print(
        f"{given.users:,} users, {given.items:,} items, rows of {given.size}, {given.tasks} tasks a device, {given.slots} item "
        f"ids a task; memory {given.memory_gb_per_s:g} GB/s, links {given.link_gb_per_s:g} GB/s (assumed)\n"
    )
    print(
        "| mesh | state a device | rows moved a step | over the links a step | links' time | memory's time | steps/s at most | tasks/s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for data, model in ((1, 1), (1, 8), (1, 64), (1, 256), (4, 64), (1, 1024), (4, 256)):
        found = sizes(tables, slots, tasks=given.tasks * data * model, data=data, model=model)
        link, memory = found.links / given.link_gb_per_s / 1e9, found.rows / given.memory_gb_per_s / 1e9
        steps = 1 / (link + memory)
        print(
            f"| data={data}, model={model} | {format_bytes(found.state)} | {format_bytes(found.rows)} | {format_bytes(found.links)} | "
            f"{link * 1e3:.2f} ms | {memory * 1e3:.2f} ms | {steps:,.0f} | {steps * given.tasks * data * model / 1e6:,.1f} M |"
        )


if __name__ == "__main__":
    main()
