"""Traces drawn from what is published of a model's routing (lowmoe/families/routing_fits.py).

A layer's router scores each expert by s * popular + drifting, of which popular stays, and drifting
is autoregressive from token to token, normal, of deviation 1, and keeps r of itself. The K highest
are used.

Knows:        the process.
Ignorant of:  anything else about routing: layers are alike and do not know of each other.
"""

import numpy as np

from lowmoe.experts.trace import RoutingTrace
from lowmoe.families import read_config
from lowmoe.families.aliases import ALIASES
from lowmoe.families.routing_fits import FITS


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
