"""Meta-learners: one file an idea, each ending in one factory that returns a `core.Learner`."""

from metarec_jax.learners.cavia import cavia
from metarec_jax.learners.cvar import cvar
from metarec_jax.learners.dropout_net import dropout_net
from metarec_jax.learners.ensemble import ensemble
from metarec_jax.learners.fine_tune import fine_tune
from metarec_jax.learners.gaussian_process import gaussian_process, gaussian_process_start
from metarec_jax.learners.hypernetwork import hypernetwork
from metarec_jax.learners.imaml import imaml
from metarec_jax.learners.in_context import in_context
from metarec_jax.learners.item_map import item_map, item_map_start
from metarec_jax.learners.leo import leo
from metarec_jax.learners.logistic import logistic
from metarec_jax.learners.maml import maml
from metarec_jax.learners.maml_plus_plus import anneal, maml_plus_plus
from metarec_jax.learners.matching import matching
from metarec_jax.learners.memory import memory
from metarec_jax.learners.meta_embedding import meta_embedding
from metarec_jax.learners.mwuf import mwuf
from metarec_jax.learners.neural_process import neural_process
from metarec_jax.learners.protomaml import protomaml
from metarec_jax.learners.protonet import protonet
from metarec_jax.learners.reptile import reptile
from metarec_jax.learners.ridge import ridge
from metarec_jax.learners.rules import Rule, from_optax, lslr, lstm, meta_curvature, meta_sgd, sgd
from metarec_jax.learners.warm_start import warm_start

__all__ = [
    "Rule",
    "anneal",
    "cavia",
    "cvar",
    "dropout_net",
    "ensemble",
    "fine_tune",
    "from_optax",
    "gaussian_process",
    "gaussian_process_start",
    "hypernetwork",
    "imaml",
    "in_context",
    "item_map",
    "item_map_start",
    "leo",
    "logistic",
    "lslr",
    "lstm",
    "maml",
    "maml_plus_plus",
    "matching",
    "memory",
    "meta_curvature",
    "meta_embedding",
    "meta_sgd",
    "mwuf",
    "neural_process",
    "protomaml",
    "protonet",
    "reptile",
    "ridge",
    "sgd",
    "warm_start",
]
