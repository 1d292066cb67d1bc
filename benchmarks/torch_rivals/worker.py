"""A worker of PyTorch's side (`benchmarks.protocol`), and the outer gradients for ``--check``.

python -m benchmarks.torch_rivals.worker '{"variant": "lazy_dots", "model": "seed", ...}'
python -m benchmarks.torch_rivals.worker --gradients FILE.npz
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from benchmarks import seed_program
from benchmarks.cells import Batches
from benchmarks.protocol import Cell, resident_mib, serve
from benchmarks.torch_rivals import variants, whole_step
from benchmarks.torch_rivals.models import Batch, Seed, as_tensors, device, make_batches, make_model

WHOLE: dict[str, tuple[str, Callable]] = {
    "whole_dense": ("seed", lambda m, lr, k: whole_step.seed_step(m, lr, k, lazy=False, dots=False)),
    "whole_dense_dots": ("seed", lambda m, lr, k: whole_step.seed_step(m, lr, k, lazy=False, dots=True)),
    "whole_lazy": ("seed", lambda m, lr, k: whole_step.seed_step(m, lr, k, lazy=True, dots=False)),
    "whole_lazy_dots": ("seed", lambda m, lr, k: whole_step.seed_step(m, lr, k, lazy=True, dots=True)),
    "whole_melu": ("melu", lambda m, lr, k: whole_step.melu_step(m, lr, k, lazy=True, low_rank=False)),
    "whole_melu_low_rank": ("melu", lambda m, lr, k: whole_step.melu_step(m, lr, k, lazy=True, low_rank=True)),
    "whole_melu_low_rank_dense": ("melu", lambda m, lr, k: whole_step.melu_step(m, lr, k, lazy=False, low_rank=True)),
}


class Outer:
    """A variant's gradient, then Adam: fused, or SparseAdam for the tables of the sparse variants."""

    def __init__(self, name: str, model: Any, lr: float, steps: int) -> None:
        self.gradient = variants.VARIANTS[name](model, lr, steps)
        everything = list(model.parameters())
        self.zero = name in ("smart", "smart_compile")  # these add into .grad
        if "sparse" in name and isinstance(model, Seed):
            tables = [model.head.user.weight, model.head.item.weight]
            rest = list(model.head.out.parameters())
            self.optimizers: list[Any] = [torch.optim.SparseAdam(tables, lr=1e-3), torch.optim.Adam(rest, lr=1e-3)]
        else:
            self.optimizers = [torch.optim.Adam(everything, lr=1e-3, fused=name.startswith("smart"))]

    def __call__(self, batch: Batch) -> torch.Tensor:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=not self.zero)
        loss = self.gradient(batch)
        for optimizer in self.optimizers:
            optimizer.step()
        return loss


def as_first_written(cell: Mapping[str, Any]) -> Callable[[Batch], Any]:
    """The seed's program, copied graph and all: it learns nothing."""
    from benchmarks.cells import SIZE, USERS

    with device():
        model = seed_program.MetaRecommender(USERS, cell["items"], SIZE)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(batch: Batch) -> float:
        tasks = [((xs[:, 0], xs[:, 1], ys), (xq[:, 0], xq[:, 1], yq)) for xs, ys, xq, yq in zip(*batch, strict=True)]
        with device():
            return seed_program.meta_step(model, optimizer, tasks, cell["lr"], cell["inner_steps"])

    return step


def make_step(cell: Mapping[str, Any]) -> tuple[Callable[[Batch], Any], list[Batch]]:
    """``step(batch)`` of a variant, and the prepared batches in the form that it likes best."""
    name, prepared = cell["variant"], make_batches(cell)
    if name == "as_first_written":
        return as_first_written(cell), prepared
    model = make_model(cell)
    if name in WHOLE:
        narrow = [(xs.int(), ys, xq.int(), yq) for xs, ys, xq, yq in prepared]
        return WHOLE[name][1](model, cell["lr"], cell["inner_steps"]), narrow
    return Outer(name, model, cell["lr"], cell["inner_steps"]), prepared


def setup(cell: dict[str, Any]) -> Cell:
    """Run the first step, which compiles, and one more."""
    on_cuda = device().type == "cuda"
    if cell.get("threads"):
        torch.set_num_threads(cell["threads"])
    before = resident_mib()
    step, prepared = make_step(cell)
    wait = torch.cuda.synchronize if on_cuda else lambda: None
    wait()
    begin = time.perf_counter()
    float(step(prepared[0]))
    wait()
    compile_s = time.perf_counter() - begin
    step(prepared[-1])
    if cell["variant"] in WHOLE:  # one program, never another: its guards need no looking at, some 10% of a small step
        torch.compiler.set_stance(skip_guard_eval_unsafe=True)
    done = 0
    steps = cell.get("block", 1)

    def run(blocks: int) -> None:
        nonlocal done
        for _ in range(blocks * steps):
            step(prepared[done % len(prepared)])
            done += 1
        wait()

    extra = {
        "device": torch.cuda.get_device_name() if on_cuda else "cpu",
        "added_mib": round(resident_mib() - before, 1),
        "torch": torch.__version__,
    }
    return Cell(run, steps, compile_s, extra, torch.cuda.max_memory_allocated if on_cuda else None)


def gradients(path: str) -> None:
    """Read parameters and a batch; write every variant's outer gradient in float64 beside them."""
    torch.set_default_dtype(torch.float64)
    with np.load(path, allow_pickle=False) as file:
        given = dict(file)
    cell = json.loads(str(given["cell"]))
    batch = as_tensors(Batches(given["ids"][None], given["rating"][None]))[0]
    found: dict[str, np.ndarray] = {}
    for name in [*variants.VARIANTS, *(n for n, (model, _) in WHOLE.items() if model == cell["model"])]:
        model = make_model(cell)
        with torch.no_grad():
            for key, leaf in model.named_parameters():
                leaf.copy_(torch.as_tensor(given[key]))
        if name in WHOLE:
            step = WHOLE[name][1](model, cell["lr"], cell["inner_steps"])
            step((batch[0].int(), batch[1], batch[2].int(), batch[3]))
            grads = _torch_names(step.first_gradient())
        else:
            try:
                variants.VARIANTS[name](model, cell["lr"], cell["inner_steps"])(batch)
            except ImportError as error:
                print(f"{name}: {error}", file=sys.stderr)
                continue
            grads = {key: leaf.grad.to_dense() for key, leaf in model.named_parameters()}
        found |= {f"{name}/{key}": g.cpu().numpy() for key, g in grads.items()}
    np.savez(path, allow_pickle=False, **found)


def _torch_names(grads: whole_step.Tensors) -> whole_step.Tensors:
    """A whole step's leaves under the names that the module gives them."""
    if "table" in grads:
        tables = grads["table"].split(list(whole_step.VOCAB))
        dense = {f"head.{n}": g for n, g in grads.items() if n != "table"}
        return {**{f"emb.{c}.weight": t for c, t in enumerate(tables)}, **dense}
    names = {"user": "head.user.weight", "item": "head.item.weight", "w": "head.out.weight", "b": "head.out.bias"}
    return {names[n]: g for n, g in grads.items()}


if __name__ == "__main__":
    if sys.argv[1] == "--gradients":
        gradients(sys.argv[2])
    else:
        serve(setup)
