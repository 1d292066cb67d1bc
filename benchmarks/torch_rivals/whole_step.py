"""The strongest PyTorch found: gather, adaptation, outer gradient, scatter and Adam as one compiled function.

Rows are updated lazily (those of the batch alone, as SparseAdam does, with one step count for all) or densely. Repeated
rows of a batch are summed without a sort: every copy writes its position to ``slot[id]`` and reads back who won. Users of a
batch are taken to differ, which the prepared batches promise; ours does not rely on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.func import functional_call, grad_and_value, vmap

from benchmarks.cells import SIZE, VOCAB
from benchmarks.torch_rivals.models import Batch
from benchmarks.torch_rivals.variants import adapt_then_loss

LR, B1, B2, EPS = 1e-3, 0.9, 0.999, 1e-8
Tensors = dict[str, torch.Tensor]


class WholeStep:
    """A model's parameters beside both Adam moments of each, and one compiled function that steps them.

    Args:
      leaves: parameters by name; the tables among them are updated by rows where ``lazy``.
      gradient: ``gradient(leaves, batch) -> (loss, {name: dense gradient}, {table: (ids, rows, row gradients, unique)})``.
    """

    def __init__(self, leaves: Tensors, gradient: Callable, lazy: bool, tables: tuple[str, ...]) -> None:
        own = {name: leaf.detach() for name, leaf in leaves.items()}
        self.state = {name: (p, torch.zeros_like(p), torch.zeros_like(p)) for name, p in own.items()}
        first = next(iter(own.values()))
        self.slots = {n: torch.zeros(len(own[n]), dtype=torch.int32, device=first.device) for n in tables if lazy}
        self.count = torch.zeros((), dtype=first.dtype, device=first.device)
        torch._inductor.config.assert_indirect_indexing = False  # ours does not check either
        self.compiled = torch.compile(_stepper(gradient, lazy), dynamic=False, fullgraph=True)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> torch.Tensor:
        """One outer step."""
        return self.compiled(self.state, self.slots, self.count, *batch)

    def first_gradient(self) -> Tensors:
        """The outer gradient of the first step: from moments of 0, the first moment is ``(1 - b1) g``."""
        return {name: m / (1 - B1) for name, (_, m, _) in self.state.items()}


def _stepper(gradient: Callable, lazy: bool) -> Callable:
    def adam(p: Any, m: Any, v: Any, g: Any, t: Any) -> tuple:
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g * g
        return p - LR * (m / (1 - B1**t)) / ((v / (1 - B2**t)).sqrt() + EPS), m, v

    def step(state: dict, slots: Tensors, t: torch.Tensor, *batch: torch.Tensor) -> torch.Tensor:
        t.add_(1)
        loss, dense, by_row = gradient({name: p for name, (p, _, _) in state.items()}, *batch)
        for name, (ids, rows, g, unique) in by_row.items():
            p, m, v = state[name]
            if not lazy:
                dense[name] = torch.zeros_like(p).index_add(0, ids, g)
                continue
            if not unique:
                slots[name][ids] = torch.arange(len(ids), dtype=torch.int32, device=ids.device)
                owner = slots[name][ids]
                g = torch.zeros_like(g).index_add(0, owner, g)[owner]
            p[ids], m[ids], v[ids] = adam(rows, m[ids], v[ids], g, t)
        for name, g in dense.items():
            p, m, v = state[name]
            for old, new in zip((p, m, v), adam(p, m, v, g, t), strict=True):
                old.copy_(new)
        return loss

    return step


def seed_step(model: Any, lr: float, steps: int, lazy: bool, dots: bool) -> WholeStep:
    """The seed's model. ``dots``: rows are multiplied by the weights before a task's examples are picked, not after."""
    head = model.head

    def rows_first(p: Tensors, loc: torch.Tensor) -> torch.Tensor:
        return torch.cat([p["u"].expand(len(loc), -1), p["v"][loc]], -1) @ p["w"] + p["b"]

    def dots_first(p: Tensors, loc: torch.Tensor) -> torch.Tensor:
        wu, wv = p["w"].split(SIZE)
        return (p["u"] * wu).sum(-1) + (p["v"] * wv).sum(-1)[loc] + p["b"]

    task = adapt_then_loss(dots_first if dots else rows_first, lr, steps)
    run = vmap(task, in_dims=({"u": 0, "v": 0, "w": None, "b": None}, 0, 0, 0, 0))
    core = grad_and_value(lambda p, ls, ys, lq, yq: run(p, ls, ys, lq, yq).mean())

    def gradient(leaves: Tensors, xs: Any, ys: Any, xq: Any, yq: Any) -> tuple:
        uid, iid = xs[:, 0, 0], torch.cat([xs[..., 1], xq[..., 1]], 1)
        loc = (iid[:, :, None] == iid[:, None, :]).int().argmax(-1)
        k = xs.shape[1]
        p = {"u": leaves["user"][uid], "v": leaves["item"][iid], "w": leaves["w"][0], "b": leaves["b"][0]}
        g, loss = core(p, loc[:, :k], ys, loc[:, k:], yq)
        by_row = {
            "user": (uid, p["u"], g["u"], True),
            "item": (iid.flatten(), p["v"].flatten(0, 1), g["v"].flatten(0, 1), False),
        }
        return loss, {"w": g["w"][None], "b": g["b"][None]}, by_row

    leaves = {"user": head.user.weight, "item": head.item.weight, "w": head.out.weight, "b": head.out.bias}
    return WholeStep(leaves, gradient, lazy, ("user", "item"))


def melu_step(model: Any, lr: float, steps: int, lazy: bool, low_rank: bool) -> WholeStep:
    """The MeLU-like model, its eight tables in one. ``low_rank``: no task owns a copy of the layers; see `_low_rank`."""
    names = [name for name, _ in model.head.named_parameters()]
    half = len(VOCAB) // 2
    starts = torch.tensor([sum(VOCAB[:c]) for c in range(len(VOCAB))], dtype=torch.int32)

    if low_rank:
        run = lambda p, *task: _low_rank(p, *task, lr=lr, steps=steps)  # noqa: E731
    else:
        one = adapt_then_loss(lambda p, x: functional_call(model.head, p, (x,)), lr, steps)
        run = vmap(one, in_dims=(None, 0, 0, 0, 0))

    def loss_of(p: Tensors, user: Any, item: Any, ys: Any, yq: Any) -> torch.Tensor:
        tasks, n = item.shape[:2]
        x = torch.cat([user.flatten(1)[:, None].expand(tasks, n, -1), item.flatten(2)], -1)
        k = ys.shape[1]
        return run(p, x[:, :k], ys, x[:, k:], yq).mean()

    core = grad_and_value(loss_of, argnums=(0, 1, 2))

    def gradient(leaves: Tensors, xs: Any, ys: Any, xq: Any, yq: Any) -> tuple:
        ids = torch.cat([xs, xq], 1) + starts.to(xs.device)
        of_user, of_item = ids[:, 0, :half], ids[..., half:]
        user, item = leaves["table"][of_user], leaves["table"][of_item]
        (g, g_user, g_item), loss = core({n: leaves[n] for n in names}, user, item, ys, yq)
        flat = torch.cat([of_user.flatten(), of_item.flatten()])
        rows, grads = (
            torch.cat([a.reshape(-1, SIZE), b.reshape(-1, SIZE)]) for a, b in ((user, item), (g_user, g_item))
        )
        return loss, g, {"table": (flat, rows, grads, False)}

    table = torch.cat([e.weight.detach() for e in model.emb])
    return WholeStep({"table": table, **dict(model.head.named_parameters())}, gradient, lazy, ("table",))


def _low_rank(p: Tensors, hs: Any, ys: Any, hq: Any, yq: Any, *, lr: float, steps: int) -> torch.Tensor:
    """Losses ``[T]`` after SGD on three layers with ReLU between, without a copy of the layers for each task.

    A step changes ``W`` by ``-lr A^T G``: A the support's activations before the layer, G its gradients behind it. So an
    adapted layer maps B to ``B W - lr sum_i (B A_i^T) G_i``, and its transpose takes H back to ``H W^T - lr sum_i (H G_i^T) A_i``.
    """
    layers = [(p[f"{n}.weight"].T, p[f"{n}.bias"]) for n in ("0", "2", "4")]
    moved: list[list[tuple]] = [[] for _ in layers]

    def forward(x: Any) -> tuple[list, list]:
        befores, behinds = [], []
        for at, (w, b) in enumerate(layers):
            befores.append(x)
            z = x @ w + b
            for a, g in moved[at]:
                z = z - lr * ((x @ a.mT + 1.0) @ g)  # + 1: the bias moves by the sum of G
            behinds.append(z)
            x = F.relu(z)
        return befores, behinds

    def back(h: Any, at: int) -> Any:
        out = h @ layers[at][0].T
        for a, g in moved[at]:
            out = out - lr * ((h @ g.mT) @ a)
        return out

    for _ in range(steps):
        befores, behinds = forward(hs)
        g = (2 / ys.shape[1]) * (behinds[-1] - ys[..., None])
        found = [(befores[2], g)]
        for at in (1, 0):
            g = back(g, at + 1) * (behinds[at] > 0)
            found.insert(0, (befores[at], g))
        for at, pair in enumerate(found):
            moved[at].append(pair)
    return ((forward(hq)[1][-1][..., 0] - yq) ** 2).mean(-1)
