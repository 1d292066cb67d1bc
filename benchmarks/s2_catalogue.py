"""S2: what does an outer step cost as the catalogue grows from 3,706 items to ten million?

The seed's model, 32 tasks x 1 inner step; 256 prepared batches whose items are uniform over the catalogue, so that rows lie
far apart in memory and few are met again while they are in a cache. All sizes take turns in one run; `ratio_to_smallest` is
the time of a step over that at 3,706 items. Rows carry the peak memory and the bytes of tables and moments.
"""

from __future__ import annotations

from benchmarks import rivals
from benchmarks.cells import ITEMS, SIZE, USERS, seed_cell
from benchmarks.harness import Contender, Options, Row, available_mib, compare

SIZES = (ITEMS, 100_000, 1_000_000, 10_000_000)
QUICK = (ITEMS, 1_000_000)
PROCESS_MIB = 500


def run(options: Options) -> list[Row]:
    contenders: list[Contender] = []
    for items in QUICK if options.quick else SIZES:
        cell = seed_cell(32, 1, items, batches=256)
        contenders += rivals.ours(options, cell)
        names = ["whole_lazy_dots"]
        if not options.quick and items in (ITEMS, 1_000_000):
            names += ["whole_lazy", "smart_sparse_compile"]
        contenders += rivals.torch(options, cell, names)
    rows = compare(options, "s2", _that_fit(options, contenders))
    for row in rows:
        first = next((r for r in rows if (r.variant, r.items) == (row.variant, ITEMS)), None)
        if first and first.tasks_per_s and row.tasks_per_s:
            row.extra["ratio_to_smallest"] = round(first.tasks_per_s / row.tasks_per_s, 3)
    return rows


def _that_fit(options: Options, contenders: list[Contender]) -> list[Contender]:
    """All are alive at once: leave out, with a note, what the free memory does not hold."""
    free, kept = available_mib(), []
    for contender in contenders:
        copies = 3 if "lazy" in contender.variant or "sparse" in contender.variant else 5  # moments; and a gradient
        wanted = PROCESS_MIB + copies * 4 * SIZE * (USERS + contender.cell["items"]) / 2**20
        if wanted > free:
            options.note(
                f"s2 {contender.variant} at {contender.cell['items']:,} items wants about {wanted:,.0f} MiB, "
                f"{free:,.0f} MiB are free: left out"
            )
            continue
        free -= wanted
        kept.append(contender)
    return kept
