"""Norms and sums between layers as native code wants them, which adds all of what a layer computes.

Where r times that is to be added to x, or to a norm, x / r is what native code keeps: norms divide
r out again, but for their epsilon.

Knows:        what the epsilons are then, and how much of a norm is kept.
Ignorant of:  how anything is computed.
"""

from dataclasses import dataclass

from torch import Tensor

from lowmoe.decoder.weights import LayerWeights
from lowmoe.kernels import cpu
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


def attention_norm(spec: ModelSpec, weights: LayerWeights, layer_id: int) -> cpu.Norm:
    """Before a layer's attention."""
    epsilon, bias = norm_epsilons(spec).attention[layer_id], weights.optional("attention_norm_bias")
    return native_norm(spec, weights.attention_norm, bias, epsilon)


def experts_norm(spec: ModelSpec, weights: LayerWeights, layer_id: int) -> cpu.Norm:
    """Before a layer's experts."""
    epsilon, bias = norm_epsilons(spec).experts[layer_id], weights.optional("experts_norm_bias")
    return native_norm(spec, weights.experts_norm, bias, epsilon)


def out_norm(spec: ModelSpec, weights: LayerWeights, name: str) -> cpu.Norm | None:
    """Of what a layer adds, which is not divided by r; None without."""
    if not spec.norm_after:
        return None
    bias = weights.optional(f"{name}_bias")
    return native_norm(spec, weights.vector(name), bias, spec.norm_epsilon)


def native_norm(spec: ModelSpec, weight: Tensor, bias: Tensor | None, epsilon: float) -> cpu.Norm:
    """weight, bias: [H], to be kept alive."""
    return cpu.Norm(
        weight=weight.data_ptr(),
        epsilon=epsilon,
        bias=address(bias),
        centred=spec.norm == "layer",
    )


def address(vector: Tensor | None) -> int:
    """0 for none."""
    return 0 if vector is None else vector.data_ptr()
