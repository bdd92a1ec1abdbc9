"""What is published of how models route, as two numbers each, for traces nobody could record here.

A layer's router is taken to score each expert by a popularity of its own, which stays, and by what
the text is about, which drifts from token to token: see lowmoe/plan/synthetic_trace.py.

    model           r, s        fitted to
    mixtral-8x7b    .20, .12    a token uses an expert of the one before: .45 to .67 by layer, and
                                experts' shares .06 to .19 (arXiv 2401.04088, table 5, figure 7)
    qwen3-30b-a3b   .73, .25    an expert is used again by the next token: .45 (kekzl/imp#1359)
    deepseek-v3     .40, .60    nothing: what is known of its successor (FreeToken#174) only says
                                that experts differ in use by far more than from token to token

Knows:        which models anything is published of.
Ignorant of:  what the numbers do.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingFit:
    """kept: r, of drifting scores from token to token; skew: s, of popularity beside them."""

    kept: float
    skew: float


FITS: Mapping[str, RoutingFit] = {
    "mixtral-8x7b": RoutingFit(kept=0.20, skew=0.12),
    "mixtral-8x22b": RoutingFit(kept=0.20, skew=0.12),  # as its sibling: nothing is published
    "qwen3-30b-a3b": RoutingFit(kept=0.73, skew=0.25),
    "deepseek-v3": RoutingFit(kept=0.40, skew=0.60),
}
