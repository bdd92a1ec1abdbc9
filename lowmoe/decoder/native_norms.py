"""Norms and sums between layers as native code wants them, which adds all of what a layer computes.

Where r times that is to be added to x, or to a norm, x / r is what native code keeps: norms divide
r out again, but for their epsilon.

Knows:        what the epsilons are then, and how much of a norm is kept.
Ignorant of:  how anything is computed.
"""

from dataclasses import dataclass

from lowmoe.spec import ModelSpec, NormedResidual


@dataclass(frozen=True, slots=True, kw_only=True)
class NormEpsilons:
    """Of the norms before each layer's attention and experts, and of the final one."""

    attention: list[float]
    experts: list[float]
    final: float


def norm_epsilons(spec: ModelSpec) -> NormEpsilons:
    """Of the norms of x / r."""
    found: list[float] = []
    scale = spec.residual_scale
    for layer in spec.layers:
        for residual in (layer.attention_residual, layer.feed_forward_residual):
            found.append(spec.norm_epsilon / scale**2)
            scale = scale if residual is None else residual.added
    final = spec.norm_epsilon / scale**2
    return NormEpsilons(attention=found[::2], experts=found[1::2], final=final)


def kept(residual: NormedResidual | None) -> float:
    """How much of its norm x becomes before anything is added; 0 where it stays as it is."""
    return 0.0 if residual is None else residual.kept / residual.added
