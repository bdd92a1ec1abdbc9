"""What Python outside the tests uses of the extension module; addresses are ints.

Knows:        signatures. The headers beside this file say what the operations do.
Ignorant of:  the functions that only tests and benchmarks call.
"""

from collections.abc import Sequence
from typing import Any

PAGE_TOKENS: int

def isas() -> list[str]: ...
def allocated_bytes() -> int: ...
def kv_head_bytes(format: str, head_size: int) -> int: ...

class Pool:
    n_threads: int
    def __init__(self, n_threads: int, cpus: Sequence[int]) -> None: ...
    def read_seconds(self, data: int, n_bytes: int) -> float: ...
    def start_profile(self) -> None: ...
    def phases(self) -> list[tuple[str, float, int]]: ...

class Engine:
    def __init__(
        self, isa: str, pool: Pool, table: Sequence[int], scale_unit: float, max_tokens: int
    ) -> None: ...

class Linear:
    def __init__(
        self, engine: Engine, n_out: int, n_in: int, planes: Sequence[int], d: int
    ) -> None: ...

class KvPages:
    n_reserved: int
    def __init__(
        self, n_layers: int, n_kv_heads: int, head_size: int, format: str, keys_only: bool = False
    ) -> None: ...
    def reserve(self, n_tokens: int) -> None: ...
    def copy_from(self, other: KvPages, n_tokens: int) -> None: ...

class Norm:
    def __init__(self, *, weight: int, epsilon: float, bias: int, centred: bool) -> None: ...

class LatentProjection:
    def __init__(
        self,
        *,
        engine: Engine,
        q_down: Linear | None,
        q_norm: int,
        q_up: Linear,
        kv_down: Linear,
        kv_norm: int,
        norm_epsilon: float,
        kv_up: Linear,
        n_heads: int,
        plain_size: int,
        rope_size: int,
        value_size: int,
    ) -> None: ...

class AttentionLayer:
    def __init__(
        self,
        *,
        norm: Norm,
        qkv: Linear | None,
        out: Linear,
        frequencies: int,
        n_heads: int,
        n_kv_heads: int,
        head_size: int,
        window: int,
        rope_size: int,
        rope_length: float,
        score_scale: float,
        qkv_bias: int,
        out_bias: int,
        head_norm: int,
        q_norm: int,
        k_norm: int,
        head_norm_epsilon: float,
        clamp: float,
        sinks: int,
        gated: bool = False,
        kept: float = 0.0,
        chunk: int = 0,
        temperature_step: int = 0,
        temperature_scale: float = 0.0,
        score_cap: float = 0.0,
        out_norm: Norm | None = None,
        latent: LatentProjection | None = None,
    ) -> None: ...

class Attention:
    def __init__(
        self,
        engine: Engine,
        layers: Sequence[AttentionLayer],
        max_context: int,
        max_sequences: int,
    ) -> None: ...
    def run(self, layer_id: int, cache: KvPages, first: int, x: int, n: int) -> None: ...
    def step(self, layer_id: int, places: Sequence[tuple[KvPages, int]], x: int) -> None: ...

class DeltaLayer:
    def __init__(
        self,
        *,
        norm: Norm,
        in_: Linear,
        out: Linear,
        rates: int,
        taps: int,
        decay_bias: int,
        log_decay: int,
        head_norm: int,
        head_norm_epsilon: float,
        kept: float,
        n_key_heads: int,
        n_heads: int,
        key_size: int,
        value_size: int,
        n_taps: int,
    ) -> None: ...

class DeltaNet:
    def __init__(self, engine: Engine, layers: Sequence[DeltaLayer]) -> None: ...
    def run(
        self,
        layer_id: int,
        window: int,
        maps: int,
        stops: Sequence[tuple[int, int, int]],
        x: int,
        n: int,
    ) -> None: ...

class LightningLayer:
    def __init__(
        self,
        *,
        norm: Norm,
        qkv: Linear,
        gate: Linear,
        out: Linear,
        remains: int,
        out_norm: int,
        out_norm_epsilon: float,
        kept: float,
        n_heads: int,
        head_size: int,
    ) -> None: ...

class Lightning:
    def __init__(self, engine: Engine, layers: Sequence[LightningLayer]) -> None: ...
    def run(
        self, layer_id: int, maps: int, stops: Sequence[tuple[int, int]], x: int, n: int
    ) -> None: ...

class Router:
    def __init__(
        self,
        *,
        weights: int,
        bias: int,
        choice_bias: int,
        sigmoid: bool,
        renormalize: bool,
        n_active: int,
        n_groups: int,
        n_groups_active: int,
        scale: float,
        preference: int,
        spread: float = 0.0,
        jitter: float = 0.0,
    ) -> None: ...

class SharedExpert:
    def __init__(self, *, gate_up: Linear, down: Linear, router: int) -> None: ...

class ExpertsLayer:
    def __init__(
        self,
        *,
        norm: Norm,
        router: Router,
        d_in: int,
        d_inner: int,
        n_hidden: int,
        n_experts: int,
        n_inner: int,
        steepness: float,
        shift: float,
        limit: float,
        gate_up_bias: int,
        down_bias: int,
        shared: SharedExpert | None,
        weigh_input: bool = False,
        cubic: float = 0.0,
        gated: bool = True,
        out_norm: Norm | None = None,
        kept: float = 0.0,
    ) -> None: ...

class Experts:
    def __init__(self, engine: Engine, layers: Sequence[ExpertsLayer]) -> None: ...
    def route(self, layer_id: int, x: int, n: int, weights: int, ids: int) -> None: ...
    def foresee(self, layer_id: int, x: int, n: int, weights: int, ids: int) -> None: ...
    def take(self, layer_id: int, codes: int, scales: int, n: int) -> None: ...
    def run(
        self,
        layer_id: int,
        ids: int,
        n: int,
        experts: Sequence[tuple[int, Sequence[int]]],
        weights: int = 0,
    ) -> None: ...
    def add(self, layer_id: int, weights: int, n: int, x: int) -> None: ...

class Layers:
    def __init__(
        self,
        attention: Attention,
        experts: Experts,
        addresses: Sequence[Sequence[Sequence[int]]],
        uses: int,
    ) -> None: ...
    def run(self, cache: KvPages, first: int, x: int, n: int) -> int: ...
    def step(self, places: Sequence[tuple[KvPages, int]], x: int) -> int: ...

class Ends:
    def __init__(
        self,
        *,
        engine: Engine,
        embedding: Linear,
        final_norm: Norm,
        head: Linear,
    ) -> None: ...
    def embed(self, ids: int, n: int, x: int) -> None: ...
    def logits(self, x: int, n: int, scores: int) -> None: ...

def __getattr__(name: str) -> Any: ...  # the rest is for tests and benchmarks
