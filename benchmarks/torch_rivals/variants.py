"""Second-order MAML's outer gradient, one factory for each style of writing it in PyTorch.

Each factory takes ``(model, lr, steps)`` and returns ``outer(batch) -> loss``, which leaves the outer gradient (of the
mean over tasks) in ``.grad`` of the model's parameters. `whole_step` has the variants that compile the optimiser too.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, grad_and_value, vmap

from benchmarks.torch_rivals.models import Batch

Outer = Callable[[Batch], torch.Tensor]


def _tasks(model: Any, batch: Batch) -> Iterator[tuple]:
    for xs, ys, xq, yq in zip(*batch, strict=True):
        yield model.features(xs), ys, model.features(xq), yq


def loop(model: Any, lr: float, steps: int) -> Outer:
    """As first written by hand: python loop over tasks, SGD over all of the head."""

    def outer(batch):
        total, n = 0.0, len(batch[0])
        for hs, ys, hq, yq in _tasks(model, batch):
            p = dict(model.head.named_parameters())
            for _ in range(steps):
                loss = F.mse_loss(functional_call(model.head, p, (hs,)), ys)
                g = torch.autograd.grad(loss, list(p.values()), create_graph=True)
                p = {k: v - lr * gk for (k, v), gk in zip(p.items(), g, strict=True)}
            loss = F.mse_loss(functional_call(model.head, p, (hq,)), yq) / n
            loss.backward()
            total += loss.detach()
        return total

    return outer


def learn2learn(model: Any, lr: float, steps: int) -> Outer:
    """The library's MAML, cloned for each task."""
    maml = _l2l_maml()(model.head, lr=lr, first_order=False)

    def outer(batch):
        total, n = 0.0, len(batch[0])
        for hs, ys, hq, yq in _tasks(model, batch):
            learner = maml.clone()
            for _ in range(steps):
                learner.adapt(F.mse_loss(learner(hs), ys))
            loss = F.mse_loss(learner(hq), yq) / n
            loss.backward()
            total += loss.detach()
        return total

    return outer


@functools.cache
def _l2l_maml() -> Any:
    """learn2learn's MAML class without its __init__ (that wants gym and torchvision)."""
    found = importlib.util.find_spec("learn2learn")
    if found is None or not found.submodule_search_locations:
        raise ImportError("learn2learn is not installed")
    where = found.submodule_search_locations[0]
    for name in ("learn2learn", "learn2learn.algorithms"):
        mod = types.ModuleType(name)
        mod.__path__ = [where + name.removeprefix("learn2learn").replace(".", "/")]
        sys.modules[name] = mod
    utils = importlib.import_module("learn2learn.utils")
    vars(sys.modules["learn2learn"])["clone_module"] = utils.clone_module
    return importlib.import_module("learn2learn.algorithms.maml").MAML


def higher(model: Any, lr: float, steps: int) -> Outer:
    """The library's differentiable inner optimiser."""
    import higher as H

    inner = torch.optim.SGD(model.head.parameters(), lr=lr)

    def outer(batch):
        total, n = 0.0, len(batch[0])
        for hs, ys, hq, yq in _tasks(model, batch):
            with H.innerloop_ctx(model.head, inner, copy_initial_weights=False) as (fnet, opt):
                for _ in range(steps):
                    opt.step(F.mse_loss(fnet(hs), ys))
                loss = F.mse_loss(fnet(hq), yq) / n
                loss.backward()
            total += loss.detach()
        return total

    return outer


def torchopt(model: Any, lr: float, steps: int) -> Outer:
    """The library's differentiable SGD, its state recovered after each task."""
    import torchopt as T

    inner = T.MetaSGD(model.head, lr=lr)

    def outer(batch):
        total, n = 0.0, len(batch[0])
        net0 = T.extract_state_dict(model.head, by="reference")
        opt0 = T.extract_state_dict(inner, by="reference")
        for hs, ys, hq, yq in _tasks(model, batch):
            for _ in range(steps):
                inner.step(F.mse_loss(model.head(hs), ys))
            loss = F.mse_loss(model.head(hq), yq) / n
            loss.backward()
            total += loss.detach()
            T.recover_state_dict(model.head, net0)
            T.recover_state_dict(inner, opt0)
        return total

    return outer


def adapt_then_loss(predict: Callable, lr: float, steps: int) -> Callable:
    """loss(params, support..., query...) of one task, for vmap; params is a dict."""

    def mse(p, x, y):
        return F.mse_loss(predict(p, x), y)

    def task(p, xs, ys, xq, yq):
        for _ in range(steps):
            g = grad(mse)(p, xs, ys)
            p = {k: p[k] - lr * g[k] for k in p}
        return mse(p, xq, yq)

    return task


def vmap_dense(model: Any, lr: float, steps: int) -> Outer:
    """torch.func: vmap over tasks, every task with its own copy of the whole head."""
    task = adapt_then_loss(lambda p, x: functional_call(model.head, p, (x,)), lr, steps)
    run = vmap(task, in_dims=(None, 0, 0, 0, 0))

    def outer(batch):
        xs, ys, xq, yq = batch
        p = dict(model.head.named_parameters())
        loss = run(p, model.features(xs), ys, model.features(xq), yq).mean()
        loss.backward()
        return loss.detach()

    return outer


def _smart(model: Any, lr: float, steps: int, compiled: bool, sparse: bool) -> Outer:
    """vmap over small per-task tables: gather the touched rows, scatter back.

    MF: a task's table is 1 user row and its own item rows (local ids; repeats of an
    item inside a task share one row). MeLU-like: nothing to gather in the head, so
    the embeddings are looked up once for the batch and only the head is vmapped.
    """
    wrap = (lambda f: torch.compile(f, dynamic=False)) if compiled else (lambda f: f)
    if not hasattr(model.head, "user"):
        task = adapt_then_loss(lambda p, x: functional_call(model.head, p, (x,)), lr, steps)
        run = vmap(task, in_dims=(None, 0, 0, 0, 0))
        core = wrap(grad_and_value(lambda p, hs, ys, hq, yq: run(p, hs, ys, hq, yq).mean(), argnums=(0, 1, 3)))

        def outer_of_head(batch: Batch) -> torch.Tensor:
            xs, ys, xq, yq = batch
            hs, hq = model.features(xs), model.features(xq)
            p = {k: v.detach() for k, v in model.head.named_parameters()}
            (gp, gs, gq), loss = core(p, hs.detach(), ys, hq.detach(), yq)
            torch.autograd.backward((hs, hq), (gs, gq))
            for k, v in model.head.named_parameters():
                v.grad = gp[k]
            return loss

        return outer_of_head

    def predict(p, loc):
        v = p["v"][loc]
        return torch.cat([p["u"].expand(len(loc), -1), v], -1) @ p["w"] + p["b"]

    run = vmap(adapt_then_loss(predict, lr, steps), in_dims=({"u": 0, "v": 0, "w": None, "b": None}, 0, 0, 0, 0))
    core = wrap(grad_and_value(lambda p, ls, ys, lq, yq: run(p, ls, ys, lq, yq).mean()))
    user, item, lin = model.head.user.weight, model.head.item.weight, model.head.out

    def outer(batch):
        xs, ys, xq, yq = batch
        uid, iid = xs[:, 0, 0], torch.cat([xs[..., 1], xq[..., 1]], 1)
        loc = (iid[:, :, None] == iid[:, None, :]).int().argmax(-1)
        k = xs.shape[1]
        p = {"u": user.detach()[uid], "v": item.detach()[iid], "w": lin.weight.detach()[0], "b": lin.bias.detach()[0]}
        g, loss = core(p, loc[:, :k], ys, loc[:, k:], yq)
        for table, ids, rows in ((user, uid, g["u"]), (item, iid.flatten(), g["v"].flatten(0, 1))):
            if sparse:
                table.grad = torch.sparse_coo_tensor(ids[None], rows, table.shape)
            else:
                if table.grad is None:
                    table.grad = torch.zeros_like(table)
                table.grad.index_add_(0, ids, rows)
        lin.weight.grad, lin.bias.grad = g["w"][None], g["b"][None]
        return loss

    return outer


def smart_compile_all(model: Any, lr: float, steps: int) -> Outer:
    """As smart_compile, with the gather and the scatter inside the compiled region (MF)."""
    if not hasattr(model.head, "user"):
        return smart_compile(model, lr, steps)

    def predict(p, loc):
        return torch.cat([p["u"].expand(len(loc), -1), p["v"][loc]], -1) @ p["w"] + p["b"]

    run = vmap(adapt_then_loss(predict, lr, steps), in_dims=({"u": 0, "v": 0, "w": None, "b": None}, 0, 0, 0, 0))
    core = grad_and_value(lambda p, ls, ys, lq, yq: run(p, ls, ys, lq, yq).mean())
    user, item, lin = model.head.user.weight, model.head.item.weight, model.head.out

    @torch.compile(dynamic=False)
    @torch.no_grad()
    def whole(user, item, w, b, xs, ys, xq, yq):
        uid, iid = xs[:, 0, 0], torch.cat([xs[..., 1], xq[..., 1]], 1)
        loc = (iid[:, :, None] == iid[:, None, :]).int().argmax(-1)
        k = xs.shape[1]
        p = {"u": user[uid], "v": item[iid], "w": w[0], "b": b[0]}
        g, loss = core(p, loc[:, :k], ys, loc[:, k:], yq)
        gu = torch.zeros_like(user).index_add(0, uid, g["u"])
        gv = torch.zeros_like(item).index_add(0, iid.flatten(), g["v"].flatten(0, 1))
        return loss, gu, gv, g["w"][None], g["b"][None]

    def outer(batch):
        loss, user.grad, item.grad, lin.weight.grad, lin.bias.grad = whole(
            user.detach(), item.detach(), lin.weight.detach(), lin.bias.detach(), *batch
        )
        return loss

    return outer


def smart(model: Any, lr: float, steps: int) -> Outer:
    """Rows gathered, vmap over those, scattered back; fused dense Adam."""
    return _smart(model, lr, steps, compiled=False, sparse=False)


def smart_sparse(model: Any, lr: float, steps: int) -> Outer:
    """As smart, with sparse gradients and SparseAdam."""
    return _smart(model, lr, steps, compiled=False, sparse=True)


def smart_compile(model: Any, lr: float, steps: int) -> Outer:
    """As smart, the vmapped core compiled."""
    return _smart(model, lr, steps, compiled=True, sparse=False)


def smart_sparse_compile(model: Any, lr: float, steps: int) -> Outer:
    """As smart_sparse, the vmapped core compiled."""
    return _smart(model, lr, steps, compiled=True, sparse=True)


VARIANTS = {
    f.__name__: f
    for f in (
        loop,
        learn2learn,
        higher,
        torchopt,
        vmap_dense,
        smart,
        smart_sparse,
        smart_compile,
        smart_sparse_compile,
        smart_compile_all,
    )
}
