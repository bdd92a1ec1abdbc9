"""Traces of models that nobody could record here, fitted to what is published of their routing.

A layer's router is taken to score each expert by a popularity of its own, which stays, and by what
the text is about, which drifts from token to token: score = s * popular + drifting, where drifting
is autoregressive, normal, of deviation 1, and keeps r of itself. The K highest are used.

    model           r, s        fitted to
    mixtral-8x7b    .20, .12    a token uses an expert of the one before: .45 to .67 by layer, and
                                experts' shares .06 to .19 (arXiv 2401.04088, table 5, figure 7)
    qwen3-30b-a3b   .73, .25    an expert is used again by the next token: .45 (kekzl/imp#1359)
    deepseek-v3     .40, .60    nothing: what is known of its successor (FreeToken#174) only says
                                that experts differ in use by far more than from token to token

Knows:        the process and its fit.
Ignorant of:  anything else about routing: layers are alike and do not know of each other.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lowmoe.experts.trace import RoutingTrace
from lowmoe.families import read_config
from lowmoe.families.aliases import ALIASES


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """kept: r; skew: s."""

    kept: float
    skew: float


FITS: Mapping[str, Fit] = {
    "mixtral-8x7b": Fit(kept=0.20, skew=0.12),
    "mixtral-8x22b": Fit(kept=0.20, skew=0.12),  # as its smaller sibling: nothing is published
    "qwen3-30b-a3b": Fit(kept=0.73, skew=0.25),
    "deepseek-v3": Fit(kept=0.40, skew=0.60),
}


def synthetic_trace(name: str, n_tokens: int, seed: int = 0) -> RoutingTrace:
    """Of one of FITS."""
    fit, config = FITS[name], ALIASES[name].config
    spec = read_config(config).spec
    layers = [of.feed_forward for of in spec.layers if of.feed_forward.n_experts]
    n_experts, n_active = layers[0].n_experts, layers[0].router.n_active
    rng = np.random.default_rng(seed)
    popular = fit.skew * rng.standard_normal((len(layers), n_experts))
    drifting = rng.standard_normal(popular.shape)
    fresh = float(np.sqrt(1 - fit.kept**2))
    used = np.empty((n_tokens, len(layers), n_active), np.uint16)
    for token in range(n_tokens):
        drifting = fit.kept * drifting + fresh * rng.standard_normal(popular.shape)
        scores = popular + drifting
        used[token] = np.argpartition(-scores, n_active - 1, axis=1)[:, :n_active]
    return RoutingTrace(
        experts=used,
        begins=(0,),
        n_experts=tuple(f.n_experts for f in layers),
        model=name,
        config=config,
    )
