"""From the options of a run to the learners that read the support: metric, amortised, and with a memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from metarec_jax.config_gradients import PRIOR

if TYPE_CHECKING:
    from metarec_jax.config import LearnerConfig
    from metarec_jax.core import Array, Learner, Model

READERS = ("protonet", "matching", "neural_process", "in_context", "hypernetwork", "leo")
"""Learners that read the support: no inner step on parameters, and a loss of the query that may be any."""


def build_reader(given: LearnerConfig, model: Model, loss: Callable[..., Array], *, clicks: bool) -> Learner:
    """The learner of `READERS`, or "memory"; of clicks, scores are logits unless the loss is of their value."""
    import jax

    from metarec_jax import learners, losses

    if given.name == "memory":
        inner = {} if given.inner_lr is None else {"inner_lr": given.inner_lr}
        return learners.memory(model, slots=given.slots, inner_steps=given.inner_steps, prior=PRIOR, loss=loss, **inner)
    of: dict[str, Any] = {"loss": loss}
    if clicks and given.loss not in ("mse", "mae"):
        of["expected"] = jax.nn.sigmoid
    if given.name == "protonet":
        return learners.protonet(model, classes=given.classes, **of)
    if given.name == "matching":
        return learners.matching(model, similarity=given.similarity, **of)
    if given.name == "neural_process":
        return learners.neural_process(model, latent=given.latent, clusters=given.clusters, **of)
    if given.name == "in_context":
        return learners.in_context(model, **of)
    if given.name == "leo":
        rate, steps = 0.3 if given.inner_lr is None else given.inner_lr, given.inner_steps
        by = losses.bce if "expected" in of else losses.mse
        return learners.leo(model, latent=given.context, inner_lr=rate, inner_steps=steps, inner_loss=by, **of)
    return learners.hypernetwork(model, hidden=given.written, **of)
