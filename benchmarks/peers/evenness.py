"""How evenly tokens spread over experts, and how evenly they must for a speed to mean anything.

A model whose tokens all go to the same few experts decodes from a cache and prefills in fewer,
larger products than a real one.

Knows:        counts of how often each expert was chosen.
Ignorant of:  engines.  Needs nothing but numpy, so that it runs on both sides.
"""

import sys
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

N_TOKENS = 512
MOST_UNUSED = 0.05  # a fair draw of 512 tokens leaves out none of 128 experts
MOST_UNEVEN = 0.75  # a fair draw: sqrt(E / (K T)), .18 for 8 of 128 experts and 512 tokens


class Evenness(TypedDict):
    """One number a layer: the share of experts never used; deviation over mean of their use."""

    unused: list[float]
    deviation_over_mean: list[float]


def evenness_of(counts: Sequence[NDArray[np.int64]]) -> Evenness:
    """counts: for each layer, how many tokens chose each expert, [E]."""
    return Evenness(
        unused=[float((count == 0).mean()) for count in counts],
        deviation_over_mean=[float(count.std() / count.mean()) for count in counts],
    )


def describe(evenness: Evenness) -> str:
    """A line for people."""
    return (
        f"{np.mean(evenness['unused']):.1%} of the experts never used by {N_TOKENS} tokens; use "
        f"varies by {np.median(evenness['deviation_over_mean']):.2f} of its mean"
    )


def require_even(name: str, evenness: Evenness) -> None:
    """End here if a model's speed would say nothing."""
    if (
        np.mean(evenness["unused"]) > MOST_UNUSED
        or np.median(evenness["deviation_over_mean"]) > MOST_UNEVEN
    ):
        sys.exit(
            f"{name}: {describe(evenness)}; expected at most {MOST_UNUSED:.0%} and "
            f"{MOST_UNEVEN}. Delete it; its random weights have to be made otherwise."
        )
