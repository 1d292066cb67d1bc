"""Who stands beside us in the speed questions: contenders for a cell."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.harness import Contender, Options, Side, cores

LIBRARIES = ("learn2learn", "higher", "torchopt")
LEARNS_NOTHING = (
    "the seed's program as first written: the graph is cut, no gradient reaches what it trains; learns nothing"
)
NOTES = {
    "as_first_written": LEARNS_NOTHING,
    "loop": "the seed's program made right: a Python loop over tasks",
    "vmap_dense": "torch.func; every task holds a copy of the whole tables",
    "smart_sparse": "lazy rows: SparseAdam",
    "smart_sparse_compile": "lazy rows: SparseAdam",
    "whole_dense": "gather, adaptation, scatter and Adam in one torch.compile; dense Adam",
    "whole_dense_dots": "as whole_dense; rows meet the weights before they are picked",
    "whole_lazy": "gather, adaptation, scatter and Adam in one torch.compile; lazy rows",
    "whole_lazy_dots": "as whole_lazy; rows meet the weights before they are picked",
    "whole_melu": "everything in one torch.compile; lazy rows",
    "whole_melu_low_rank": "as whole_melu; inner steps in low-rank form, by hand",
    "whole_melu_low_rank_dense": "as whole_melu_low_rank; dense Adam on the tables",
}


def ours(options: Options, cell: Mapping[str, Any], variants: Sequence[str] = ("lazy",)) -> list[Contender]:
    """Our rows: "lazy" (lazy Adam on rows), "drawn" (and tasks drawn on the device), "dense" (Adam on whole tables).

    "two": as "lazy", with the tasks over two CPU devices; left out where there is one core, or an accelerator.
    """
    made = {
        "lazy": ("prepared tasks, lazy rows", {}, None),
        "drawn": ("tasks drawn on the device, lazy rows", {"tasks_from": "device"}, None),
        "dense": ("prepared tasks, dense Adam", {"optimizer": "dense"}, "another training run than lazy rows"),
        "two": (
            "prepared tasks, lazy rows, two cores",
            {"devices": 2},
            "tasks over two CPU devices; unfair to one core",
        ),
    }
    found = []
    for name in variants:
        variant, told, note = made[name]
        on, env = pinned(options), {}
        if name == "two":
            if options.core is None or len(cores()) < 2:
                continue
            on = [options.core, next(core for core in cores() if core != options.core)]
            flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
            env = {"XLA_FLAGS": flags.strip()}
        found.append(Contender(variant, "ours", "benchmarks.ours", {**cell, **told}, cores=on, env=env, note=note))
    return found


def torch(options: Options, cell: Mapping[str, Any], variants: Iterable[str]) -> list[Contender]:
    """PyTorch's rows; none where no interpreter has torch. Compilers start cold, but for ``--quick``."""
    if options.torch_python is None:
        return []
    cold = {} if options.quick else {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    cold["THP_MEM_ALLOC_ENABLE"] = "1"  # huge pages, which our tables get too
    made = []
    for name in variants:
        side: Side = "library" if name in LIBRARIES else "torch"
        told = {**cell, "variant": name, "threads": None if options.core is None else 1}
        made.append(
            Contender(
                name,
                side,
                "benchmarks.torch_rivals.worker",
                told,
                python=options.torch_python,
                cores=pinned(options),
                env=cold,
                counts=name != "as_first_written",
                note=NOTES.get(name),
            )
        )
    return made


def pinned(options: Options) -> list[int] | None:
    """The core of ``--core``."""
    return None if options.core is None else [options.core]
