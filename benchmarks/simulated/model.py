"""A model of some shape on a simulated machine: lowmoe's own scheduling, tiers and policy over it.

Of the model, layers, experts and routing are as many as they are; matrices are tiny, since their
bytes are only counted.

Knows:        how a model that a card has in part is put together.
Ignorant of:  which shapes and machines there are.
"""

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.simulated.gpu import (
    USUAL_OVERHEADS,
    Overheads,
    SimulatedGpu,
    SimulatedReads,
    SimulatedRing,
    SimulatedShare,
    Sizes,
    wait_for_one,
)
from benchmarks.simulated.machine import Machine, Speeds
from benchmarks.simulated.routing import MadeUpRouting
from cuda_ext.ops import MOST_DECODED
from lowmoe.checkpoint.files import ALIGNMENT
from lowmoe.decoder.decoder import Decoder
from lowmoe.decoder.hybrid import HybridComputation
from lowmoe.decoder.weights import DenseWeights, LayerWeights, no_transforms
from lowmoe.engine.statistics import (
    Bandwidths,
    Moved,
    PerTier,
    hit_rate,
)
from lowmoe.experts.gpu_slots import GpuSlots
from lowmoe.experts.hybrid import HybridExperts
from lowmoe.experts.ledger import Traffic
from lowmoe.experts.split import Costs, Misses, MissSplit
from lowmoe.experts.staging import Staging
from lowmoe.experts.store import ExpertStore
from lowmoe.families import read_config
from lowmoe.spec import ModelSpec, layer_parts
from quant.layout import PlaneLayout
from quant.matrix import TrellisMatrix
from quant.trellis import DEFAULT_CODE

PART_BYTES = 64  # of what stands for an expert
VOCABULARY = 96
CAPACITY = 4096
FAST = 1e18  # bytes a second, to fill RAM before anything is measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """n_slots: experts on the GPU; n_in_ram: beside them; memory, skew: see MadeUpRouting."""

    n_layers: int
    n_experts: int
    n_active: int
    sizes: Sizes
    n_slots: int
    n_in_ram: int
    memory: float
    skew: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of some tokens.  n_passed: experts a token that passed through the GPU."""

    tokens_per_s: float
    bound_tokens_per_s: float
    hit_rate: PerTier
    bytes_per_token: PerTier
    n_passed: float


class SimulatedModel:
    """Close it, or use it with `with`."""

    def __init__(
        self,
        shape: Shape,
        speeds: Speeds,
        misses: Misses,
        *,
        overheads: Overheads = USUAL_OVERHEADS,
        seed: int = 0,
    ) -> None:
        self.machine, self.shape = Machine(speeds), shape
        self._closing = ExitStack()
        sizes = shape.sizes
        routing = MadeUpRouting(
            shape.n_layers,
            shape.n_experts,
            shape.n_active,
            memory=shape.memory,
            skew=shape.skew,
            seed=seed,
        )
        spec = _spec(shape)
        weights = _weights(spec)
        routing.know([layer.router.data_ptr() for layer in weights.layers])
        gpu = SimulatedGpu(self.machine, sizes, routing, overheads)
        self.experts = self._experts(gpu)
        self.split = MissSplit(misses, Costs(int(sizes.expert), speeds.gpu))
        share: Any = SimulatedShare(gpu, routing)
        computation = HybridComputation(
            spec,
            weights,
            DEFAULT_CODE,
            self.experts,
            gpu,
            share,
            self.split,
            kv="float16",
            max_tokens=MOST_DECODED,
            n_context=CAPACITY,
            clock=self.machine.clock,
        )
        self._decoder = Decoder(spec=spec, store=self.experts, computation=computation)
        self._fill_ram()
        self._cache = self._decoder.new_cache(CAPACITY)

    def __enter__(self) -> "SimulatedModel":
        return self

    def __exit__(self, *exc: object) -> None:
        self._closing.close()

    def decode(self, n_tokens: int) -> Outcome:
        """So many tokens after those before."""
        begin, traffic = self.machine.now, self.experts.traffic()
        for _ in range(n_tokens):
            hidden = self._decoder.forward(torch.tensor([1]), self._cache)
            self._decoder.logits(hidden)
            self.machine.until(self._decoder.computation._gpu.event().mark)  # type: ignore[attr-defined]
            self._cache.n_tokens = 1  # what attention reads is part of the sizes
        seconds, moved = self.machine.now - begin, self.experts.traffic() - traffic
        sizes, speeds = self.shape.sizes, self.machine.speeds
        # What stands for an expert has other bytes on the GPU than in RAM, where it is padded.
        scaled = _scaled(moved, sizes.expert, self.experts)
        dense = PerTier(gpu=self.shape.n_layers * (sizes.layer + sizes.cached) + sizes.head)
        of = Moved(traffic=scaled, n_tokens=n_tokens, dense=dense)
        bound = of.bound_tokens_per_s(
            Bandwidths(gpu=speeds.gpu, ram=speeds.ram, disk=speeds.disk, bus=speeds.bus)
        )
        assert bound is not None
        return Outcome(
            tokens_per_s=n_tokens / seconds,
            bound_tokens_per_s=bound,
            hit_rate=hit_rate(moved),
            bytes_per_token=of.per_token,
            n_passed=scaled.passed_bytes / sizes.expert / n_tokens,
        )

    def _experts(self, gpu: SimulatedGpu) -> HybridExperts:
        shape, parts = self.shape, (PART_BYTES,)
        ring: Any = SimulatedRing(gpu)
        source, total = _Nothing(), shape.n_layers * shape.n_experts
        self._closing.enter_context(mock.patch("lowmoe.experts.store.wait", wait_for_one))
        reads = SimulatedReads(self.machine, shape.sizes.expert)
        threads = mock.patch("lowmoe.experts.store.ThreadPoolExecutor", return_value=reads)
        with threads:
            ram = ExpertStore(
                source,
                ram_budget_bytes=shape.n_in_ram * sum(source.buffer_bytes),
                n_experts_total=total,
            )
        self._closing.enter_context(ram)
        n_experts = [shape.n_experts] * shape.n_layers
        slots = GpuSlots(parts, n_experts, gpu, ring, n_slots=shape.n_slots)
        slots.fill(source, lambda done, in_all: None)
        staging = Staging(parts, shape.n_experts, gpu, ring)
        return HybridExperts(
            slots=slots, staging=staging, ring=ring, ram=ram, n_experts_total=total
        )

    def _fill_ram(self) -> None:
        """With what the GPU does not have, layer by layer, as far as there is room."""
        speeds = self.machine.speeds
        disk, ram, speeds.disk, speeds.ram = speeds.disk, speeds.ram, FAST, FAST
        store = self.experts.ram
        for layer_id in range(self.shape.n_layers):
            for expert_id in self.experts.missing(layer_id, range(self.shape.n_experts)):
                if len(store.keys()) < store.n_slots:
                    with store.borrow(layer_id, [expert_id]):
                        pass
        speeds.disk, speeds.ram = disk, ram


class _Nothing:
    """A source of what stands for experts."""

    buffer_bytes = (ALIGNMENT,)

    def read(self, layer_id: int, expert_id: int, buffers: list[Tensor]) -> int:
        return ALIGNMENT


def _scaled(moved: Traffic, expert_bytes: float, experts: HybridExperts) -> Traffic:
    there, in_ram = expert_bytes / experts.expert_bytes, expert_bytes / experts.ram.expert_bytes
    return replace(
        moved,
        gpu_bytes=round(moved.gpu_bytes * there),
        copied_bytes=round(moved.copied_bytes * there),
        passed_bytes=round(moved.passed_bytes * there),
        ram_bytes=round(moved.ram_bytes * in_ram),
        disk_bytes=round(moved.disk_bytes * in_ram),
        layers=Counter(
            {
                (round(on_gpu * there), round(from_ram * there), round(sent * there)): n
                for (on_gpu, from_ram, sent), n in moved.layers.items()
            }
        ),
    )


def _spec(shape: Shape) -> ModelSpec:
    """Of as many layers and experts, otherwise tiny."""
    config = {
        "model_type": "mixtral",
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "num_local_experts": shape.n_experts,
        "num_experts_per_tok": shape.n_active,
        "max_position_embeddings": CAPACITY,
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-5,
    }
    return read_config(config).spec


def _weights(spec: ModelSpec) -> DenseWeights:
    """Of no bytes, but for vectors."""

    def matrix(n_out: int, n_in: int) -> TrellisMatrix:
        d = torch.ones(n_in, dtype=torch.float16)
        return TrellisMatrix(PlaneLayout(n_out, n_in), DEFAULT_CODE, (torch.empty(0),), d)

    def layer(layer_id: int) -> LayerWeights:
        of = spec.layers[layer_id]
        experts = of.feed_forward
        parts = {
            part.name: matrix(part.n_rows, part.n_columns or 0)
            if part.coded
            else torch.ones(part.shape)
            for part in layer_parts(of, spec)
        }
        transforms = no_transforms(spec.n_hidden, experts.n_experts, experts.n_inner)
        return LayerWeights(parts=parts, transforms=transforms)

    return DenseWeights(
        embedding=matrix(spec.n_vocab, spec.n_hidden),
        layers=tuple(layer(i) for i in range(len(spec.layers))),
        final_norm=torch.ones(spec.n_hidden),
        head=matrix(spec.n_vocab, spec.n_hidden),
    )
