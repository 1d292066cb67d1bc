"""S1: how many tasks a second does second-order MAML train on, with the seed's model?

User table 6,040 and item table 3,706 rows of 32, concatenated, one linear layer, squared error; 10 support and 10 query
ratings; inner SGD at 0.1 on everything; outer Adam at 1e-3. The loops over tasks (the libraries', the seed's program, the
hand-written one) and vmap over whole tables are timed at 32 tasks x 1 step: their speed does not grow with the batch.
"""

from __future__ import annotations

from benchmarks import rivals
from benchmarks.cells import seed_cell
from benchmarks.harness import Options, Row, compare

CELLS = [(tasks, steps) for tasks in (32, 128, 512) for steps in (1, 5)]
QUICK = [(32, 1), (128, 5)]
STRONG = ("smart_compile_all", "whole_dense_dots", "whole_lazy", "whole_lazy_dots")
SLOW = ("as_first_written", "loop", *rivals.LIBRARIES, "vmap_dense", "smart_compile", "smart_sparse_compile")


def run(options: Options) -> list[Row]:
    rows: list[Row] = []
    for tasks, steps in QUICK if options.quick else CELLS:
        cell = seed_cell(tasks, steps)
        own = ["lazy"] if options.quick else ["lazy", "drawn", "dense", "two"]
        theirs = ["whole_lazy_dots"] if options.quick else [*STRONG, *(SLOW if (tasks, steps) == (32, 1) else ())]
        if options.quick and steps == 1:
            theirs.append("higher")
        rows += compare(options, "s1", [*rivals.ours(options, cell, own), *rivals.torch(options, cell, theirs)])
    return rows
