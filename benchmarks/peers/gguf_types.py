"""Which ggml type llama-quantize gives to every tensor of a Mixture-of-Experts model.

Knows:        the rules of four presets, as of llama.cpp 0c1e57098 (src/llama-quant.cpp,
              llama_tensor_get_type_impl) without an importance matrix.
Ignorant of:  bytes of weights, files.

Runs in llama.cpp's virtual environment (README.md).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from benchmarks.peers.shapes import Shape

FILE_TYPES = {
    "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "Q4_K_M": gguf.LlamaFileType.MOSTLY_Q4_K_M,
    "Q2_K": gguf.LlamaFileType.MOSTLY_Q2_K,
    "IQ2_XS": gguf.LlamaFileType.MOSTLY_IQ2_XS,
}
BASE_TYPES = {"Q4_0": Type.Q4_0, "Q4_K_M": Type.Q4_K, "Q2_K": Type.Q2_K, "IQ2_XS": Type.IQ2_XS}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """One tensor.  shape: outermost dimension first; share_per_token: of its bytes."""

    name: str
    shape: tuple[int, ...]
    type: Type
    share_per_token: float = 1.0

    @property
    def n_bytes(self) -> int:
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[self.type]
        if self.shape[-1] % block_size:
            raise SystemExit(
                f"{self.name} has rows of {self.shape[-1]} weights, but {self.type.name} needs a "
                f"multiple of {block_size}. Choose another shape."
            )
        return int(np.prod(self.shape)) // block_size * block_bytes


def bytes_per_token(plans: list[TensorPlan]) -> float:
    """Bytes of weights that one token reads."""
    return sum(plan.n_bytes * plan.share_per_token for plan in plans)


def tensor_plans(shape: Shape, preset: str) -> list[TensorPlan]:
    """Every tensor of the model in a preset."""
    base = BASE_TYPES[preset]
    head = Type.Q5_K if preset == "IQ2_XS" else Type.Q6_K
    words = Type.Q2_K if preset == "IQ2_XS" else base
    vocabulary = (shape.n_vocab, shape.n_hidden)
    plans = [
        TensorPlan(
            name="token_embd.weight",
            shape=vocabulary,
            type=words,
            share_per_token=1 / shape.n_vocab,
        )
    ]
    for layer_id in range(shape.n_layers):
        plans += _layer(shape, preset, layer_id)
    plans.append(_norm("output_norm.weight", shape.n_hidden))
    plans.append(TensorPlan(name="output.weight", shape=vocabulary, type=head))
    return plans


def _norm(name: str, size: int) -> TensorPlan:
    return TensorPlan(name=name, shape=(size,), type=Type.F32)


def _layer(shape: Shape, preset: str, layer_id: int) -> Iterator[TensorPlan]:
    prefix, base = f"blk.{layer_id}.", BASE_TYPES[preset]
    n_hidden, q_size = shape.n_hidden, shape.n_heads * shape.head_size
    kv_shape = (shape.n_kv_heads * shape.head_size, n_hidden)
    types = _LAYER_RULES[preset](shape, layer_id)

    def matrix(name: str, *dimensions: int, share: float = 1.0) -> TensorPlan:
        type = types.get(name, base)
        name = f"{prefix}{name}.weight"
        return TensorPlan(name=name, shape=dimensions, type=type, share_per_token=share)

    yield _norm(prefix + "attn_norm.weight", n_hidden)
    yield matrix("attn_q", q_size, n_hidden)
    yield matrix("attn_k", *kv_shape)
    yield matrix("attn_v", *kv_shape)
    yield matrix("attn_output", n_hidden, q_size)
    for name, size in _query_key_norms(shape):
        yield _norm(prefix + name, size)
    yield _norm(prefix + "ffn_norm.weight", n_hidden)
    yield TensorPlan(
        name=prefix + "ffn_gate_inp.weight", shape=(shape.n_experts, n_hidden), type=Type.F32
    )
    share = shape.n_active / shape.n_experts
    yield matrix("ffn_gate_exps", shape.n_experts, shape.n_inner, n_hidden, share=share)
    yield matrix("ffn_up_exps", shape.n_experts, shape.n_inner, n_hidden, share=share)
    yield matrix("ffn_down_exps", shape.n_experts, n_hidden, shape.n_inner, share=share)


def _query_key_norms(shape: Shape) -> list[tuple[str, int]]:
    heads = {"olmoe": (shape.n_heads, shape.n_kv_heads), "qwen3moe": (1, 1), "llama": (0, 0)}
    sizes = [n * shape.head_size for n in heads[shape.graph]]
    names = ("attn_q_norm.weight", "attn_k_norm.weight")
    return [(name, size) for name, size in zip(names, sizes, strict=True) if size]


# --- the rules: layer -> {tensor: type} where it is not the base type


def _gets_more_bits(layer_id: int, n_layers: int) -> bool:
    eighth = n_layers // 8
    at_an_end = layer_id < eighth or layer_id >= 7 * n_layers // 8
    return at_an_end or (layer_id - eighth) % 3 == 2


def _q4_0(shape: Shape, layer_id: int) -> dict[str, Type]:
    return {"attn_k": Type.Q8_0, "attn_v": Type.Q8_0} if shape.n_experts == 8 else {}


def _q4_k_m(shape: Shape, layer_id: int) -> dict[str, Type]:
    types = {}
    if _gets_more_bits(layer_id, shape.n_layers):
        types = {"attn_v": Type.Q6_K, "ffn_down_exps": Type.Q6_K}
    if shape.n_experts == 8:
        types |= {"attn_k": Type.Q8_0, "attn_v": Type.Q8_0, "attn_output": Type.Q5_K}
    return types


def _q2_k(shape: Shape, layer_id: int) -> dict[str, Type]:
    shares_keys = shape.n_heads // shape.n_kv_heads >= 4
    types = {
        "attn_v": Type.Q4_K if shares_keys else Type.Q3_K,
        "attn_output": Type.Q3_K,
        "ffn_down_exps": Type.Q3_K,
    }
    if shape.n_experts == 8:
        types |= {"attn_k": Type.Q8_0, "attn_v": Type.Q8_0, "attn_output": Type.Q5_K}
    return types


def _iq2_xs(shape: Shape, layer_id: int) -> dict[str, Type]:
    types = {"attn_v": Type.Q4_K}
    if layer_id < shape.n_layers // 8:
        types["ffn_down_exps"] = Type.Q2_K
    if shape.n_experts == 8:
        types |= {"attn_k": Type.Q4_K, "attn_output": Type.Q5_K}
    return types


_LAYER_RULES: dict[str, Callable[[Shape, int], dict[str, Type]]] = {
    "Q4_0": _q4_0,
    "Q4_K_M": _q4_k_m,
    "Q2_K": _q2_k,
    "IQ2_XS": _iq2_xs,
}
