"""A fitted baseline from its name and its parameters alone, as a stored mixture holds them."""

from __future__ import annotations

from metarec_jax.baselines import closed_form as forms
from metarec_jax.core import Method, Params

_FUNCTIONS = {
    "popularity": (forms._nobody, forms._by_item, forms._same_for_all),
    "item_mean": (forms._nothing, forms._by_item, None),
    "user_mean": (forms._user_mean_adapt, forms._user_mean_predict, None),
    "bias": (forms._bias_adapt, forms._bias_predict, None),
    "item_knn": (forms._knn_adapt, forms._knn_predict, forms._knn_scores),
    "ease": (forms._ease_adapt, forms._ease_predict, forms._ease_scores),
    "als": (forms._fold_in, forms._als_predict, forms._als_scores),
    "gaussian_prior": (forms._posterior_mean, forms._als_predict, forms._als_scores),
}
_IMPLICIT_ALS = (forms._implicit_fold_in, forms._implicit_predict, forms._implicit_scores)


def fitted(name: str, params: Params) -> Method:
    """The baseline ``name`` with these parameters, which a fit of it made."""
    if name.endswith("_liked"):
        inner = fitted(name.removesuffix("_liked"), params["clicks"])
        adapt, predict, scores = forms._of_clicks(inner.adapt, inner.predict, inner.scores)
        return Method(params, adapt, predict, scores=scores)
    adapt, predict, scores = _IMPLICIT_ALS if name == "als" and "gram" in params else _FUNCTIONS[name]
    return Method(params, adapt, predict, scores=scores)
