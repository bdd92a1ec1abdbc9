"""Layers that keep states, in native code on the CPU.

Knows:        which addresses and sizes their operations want, where states come from and go to.
Ignorant of:  other layers, at which positions states stay kept.
"""

from collections.abc import Callable
from types import UnionType
from typing import TypeAlias

import torch
from torch import Tensor

from lowmoe.decoder.native_norms import attention_norm, kept
from lowmoe.decoder.state_cache import StatefulCache, stops
from lowmoe.decoder.weights import DenseWeights
from lowmoe.kernels import cpu
from lowmoe.spec import GatedDeltaNet, LightningAttention, ModelSpec
from quant.matrix import Matrix

_Linear: TypeAlias = Callable[[Matrix], cpu.Linear]


class NativeStates:
    """The operations, bound to a model's weights, which who makes them keeps alive."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: DenseWeights,
        engine: cpu.Engine,
        linear: _Linear,
    ) -> None:
        """linear: a matrix by its addresses; not kept, it may be the owner's own."""
        self._spec, self._weights = spec, weights
        self._owned: list[Tensor] = []
        # Each kind counts its own layers.
        self._deltas = numbered(spec, GatedDeltaNet)
        self._lightnings = numbered(spec, LightningAttention)
        self._delta_net = self._lightning = None
        if self._deltas:
            deltas = [self._delta_layer(i, linear) for i in self._deltas]
            self._delta_net = cpu.DeltaNet(engine, deltas)
        if self._lightnings:
            lightnings = [self._lightning_layer(i, linear) for i in self._lightnings]
            self._lightning = cpu.Lightning(engine, lightnings)

    def __contains__(self, layer_id: int) -> bool:
        return layer_id in self._deltas or layer_id in self._lightnings

    def __bool__(self) -> bool:
        return bool(self._deltas or self._lightnings)

    @property
    def n_bytes(self) -> int:
        """Of what is kept of weights in another order."""
        return sum(tensor.nbytes for tensor in self._owned)

    def run(self, x: Tensor, layer_id: int, cache: StatefulCache) -> None:
        """Adds to x in place, [T, H], tokens after those in the cache."""
        states, first = cache.states[layer_id], cache.n_tokens
        state = states.at(first)  # which has to live until the end
        before = [tensor.data_ptr() for tensor in state]
        found = [(end, states.empty()) for end in stops(x.shape[0])]
        to = [(end, [tensor.data_ptr() for tensor in new]) for end, new in found]
        if layer_id in self._deltas:
            assert self._delta_net is not None
            number, window, maps = self._deltas[layer_id], *before
            ends = [(end, to_window, to_maps) for end, (to_window, to_maps) in to]
            self._delta_net.run(number, window, maps, ends, x.data_ptr(), x.shape[0])
        else:
            assert self._lightning is not None
            number, (maps,) = self._lightnings[layer_id], before
            last = [(end, addresses[0]) for end, addresses in to]
            self._lightning.run(number, maps, last, x.data_ptr(), x.shape[0])
        for end, new in found:
            states.put(first + end, new)

    def _delta_layer(self, layer_id: int, linear: _Linear) -> cpu.DeltaLayer:
        weights, layer = self._weights.layers[layer_id], self._spec.layers[layer_id]
        spec = layer.attention
        assert isinstance(spec, GatedDeltaNet)
        taps = self._own(weights.vector("delta_taps").T.contiguous())
        return cpu.DeltaLayer(
            norm=attention_norm(self._spec, weights, layer_id),
            in_=linear(weights.parts["delta_in"]),
            out=linear(weights.attention_out),
            rates=weights.vector("delta_rates").data_ptr(),
            taps=taps.data_ptr(),
            decay_bias=weights.vector("delta_decay_bias").data_ptr(),
            log_decay=weights.vector("delta_log_decay").data_ptr(),
            head_norm=weights.vector("delta_norm").data_ptr(),
            head_norm_epsilon=spec.norm_epsilon,
            kept=kept(layer.attention_residual),
            n_key_heads=spec.n_key_heads,
            n_heads=spec.n_heads,
            key_size=spec.key_size,
            value_size=spec.value_size,
            n_taps=spec.n_taps,
        )

    def _lightning_layer(self, layer_id: int, linear: _Linear) -> cpu.LightningLayer:
        weights, layer = self._weights.layers[layer_id], self._spec.layers[layer_id]
        spec = layer.attention
        assert isinstance(spec, LightningAttention)
        remains = self._own(torch.exp(-torch.tensor(spec.slopes)))
        return cpu.LightningLayer(
            norm=attention_norm(self._spec, weights, layer_id),
            qkv=linear(weights.qkv),
            gate=linear(weights.parts["attention_gate"]),
            out=linear(weights.attention_out),
            remains=remains.data_ptr(),
            out_norm=weights.vector("lightning_norm").data_ptr(),
            out_norm_epsilon=spec.norm_epsilon,
            kept=kept(layer.attention_residual),
            n_heads=spec.n_heads,
            head_size=spec.head_size,
        )

    def _own(self, tensor: Tensor) -> Tensor:
        self._owned.append(tensor)
        return tensor


def numbered(spec: ModelSpec, kind: type | UnionType) -> dict[int, int]:
    """The layers of a kind of attention, by their ids, counted from 0."""
    found = [i for i, layer in enumerate(spec.layers) if isinstance(layer.attention, kind)]
    return {layer_id: number for number, layer_id in enumerate(found)}
