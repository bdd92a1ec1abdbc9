"""The experts of a layer that the CPU computes, for tokens that a GPU routed and rounded.

Knows:        which addresses native code wants, where tokens come from and sums go.
Ignorant of:  the GPU, which experts are whose.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowmoe.decoder.moe import Routing
from lowmoe.decoder.native_layers import experts_layer
from lowmoe.decoder.weights import DenseWeights, LayerWeights
from lowmoe.kernels import cpu
from lowmoe.spec import ModelSpec
from quant.trellis import TrellisCode

# Vectors of a layer that foreseeing and computing experts take.
KEPT = ("experts_norm", "router", "router_bias", "choice_bias", "gate_up_bias", "down_bias")


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTokens:
    """What the CPU is told of tokens, and its answer, in the host's memory.

    x, share: [T, H] float32; weights, experts: [T, K] float32 and int32; codes, scales: rounded
    tokens of the norm of x, see cuda_ext/ops.py.
    """

    x: Tensor
    weights: Tensor
    experts: Tensor
    codes: Tensor
    scales: Tensor
    share: Tensor

    def of(self, n_tokens: int) -> "HostTokens":
        """The same memory for fewer tokens."""
        return HostTokens(
            x=self.x[:n_tokens],
            weights=self.weights[:n_tokens],
            experts=self.experts[:n_tokens],
            codes=self.codes[:n_tokens],
            scales=self.scales[:n_tokens],
            share=self.share[:n_tokens],
        )


class CpuShare:
    """Computes experts as they come; begin, run for some at a time, finish."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: DenseWeights,
        code: TrellisCode,
        pool: cpu.Pool,
        *,
        isa: str,
        max_tokens: int,
    ) -> None:
        """weights: in RAM, of which it keeps copies of some vectors; max_tokens: at once."""
        before = cpu.allocated_bytes()
        self.max_tokens = max_tokens
        self._spec = spec
        with_experts = [i for i, n in enumerate(spec.n_experts_by_layer) if n]
        self._at = {layer_id: at for at, layer_id in enumerate(with_experts)}
        copies = [_copied(weights.layers[i]) for i in with_experts]
        no_choice = torch.zeros(1, spec.n_hidden)
        self._kept, self._no_choice = copies, no_choice
        self._engine = cpu.engine(isa, pool, code, max_tokens=max_tokens)
        layers = [
            experts_layer(spec, i, of, no_choice)
            for i, of in zip(with_experts, copies, strict=True)
        ]
        self._experts = cpu.Experts(self._engine, layers)
        self._ids = torch.empty(0, dtype=torch.int64)
        self.working_bytes = cpu.allocated_bytes() - before

    def begin(self, layer_id: int, tokens: HostTokens) -> None:
        """Tokens that some experts of this layer are to be run for; none has."""
        n_tokens = tokens.codes.shape[0]
        codes, scales = tokens.codes.data_ptr(), tokens.scales.data_ptr()
        self._experts.take(self._at[layer_id], codes, scales, n_tokens)
        self._ids = tokens.experts.long()

    def run(self, layer_id: int, experts: dict[int, tuple[Tensor, ...]]) -> None:
        """These experts, by their parts, for the tokens that go to them."""
        given = [(e, [part.data_ptr() for part in parts]) for e, parts in experts.items()]
        self._experts.run(self._at[layer_id], self._ids.data_ptr(), self._ids.shape[0], given)

    def finish(self, layer_id: int, tokens: HostTokens) -> None:
        """share = the weighted sum of what was run, of the tokens that `begin` was given."""
        tokens.share.zero_()
        weights, n_tokens = tokens.weights.data_ptr(), tokens.share.shape[0]
        self._experts.add(self._at[layer_id], weights, n_tokens, tokens.share.data_ptr())

    def foresee(self, layer_id: int, x: Tensor) -> Routing:
        """Where x [T, H] would go if it were this layer's input: nowhere without experts."""
        n_active = self._spec.layers[layer_id].feed_forward.router.n_active
        weights = torch.empty(x.shape[0], n_active)
        ids = torch.empty(x.shape[0], n_active, dtype=torch.int64)
        where = (weights.data_ptr(), ids.data_ptr())
        if layer_id not in self._at:
            return Routing(weights, ids)
        self._experts.foresee(self._at[layer_id], x.data_ptr(), x.shape[0], *where)
        return Routing(weights, ids)


def _copied(layer: LayerWeights) -> LayerWeights:
    """Of all weights of a folder one piece of memory is read, which is not to be kept."""
    of = layer.transforms
    transforms = replace(of, d_in=of.d_in.clone(), d_inner=of.d_inner.clone())
    parts = {name: layer.vector(name).clone() for name in KEPT if name in layer.parts}
    return LayerWeights(parts=parts, transforms=transforms)
