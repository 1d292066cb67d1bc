"""Meta-learners: one file an idea, each ending in one factory that returns a `core.Learner`."""

from metarec_jax.learners.maml import maml
from metarec_jax.learners.reptile import reptile
from metarec_jax.learners.ridge import ridge
from metarec_jax.learners.rules import Rule, from_optax, meta_sgd, sgd
from metarec_jax.learners.warm_start import warm_start

__all__ = ["Rule", "from_optax", "maml", "meta_sgd", "reptile", "ridge", "sgd", "warm_start"]
