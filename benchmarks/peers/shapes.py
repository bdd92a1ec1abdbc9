"""Sizes of models that both sides run with random weights.

Knows:        sizes of published models, how lowmoe's config spells them.
Ignorant of:  formats, files, engines.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Mixture-of-Experts transformer in numbers.  graph: what llama.cpp calls the architecture.

    lowmoe runs every shape as a Mixtral of these sizes: it leaves out OLMoE's and Qwen3's norms of
    queries and keys, some thousand weights of billions.
    """

    graph: str
    n_layers: int
    n_hidden: int
    n_heads: int
    n_kv_heads: int
    head_size: int
    n_experts: int
    n_active: int
    n_inner: int
    n_vocab: int
    rope_theta: float
    n_context: int = 65536

    def lowmoe_config(self) -> dict[str, Any]:
        """A config.json of the Mixtral family with these sizes."""
        return {
            "model_type": "mixtral",
            "hidden_act": "silu",
            "hidden_size": self.n_hidden,
            "intermediate_size": self.n_inner,
            "head_dim": self.head_size,
            "max_position_embeddings": self.n_context,
            "num_attention_heads": self.n_heads,
            "num_experts_per_tok": self.n_active,
            "num_hidden_layers": self.n_layers,
            "num_key_value_heads": self.n_kv_heads,
            "num_local_experts": self.n_experts,
            "rms_norm_eps": 1e-5,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": False,
            "vocab_size": self.n_vocab,
        }


# Each from the config.json of the hub repository named.
SHAPES = {
    # allenai/OLMoE-1B-7B-0924
    "olmoe-1b-7b": Shape(
        graph="olmoe", n_layers=16, n_hidden=2048, n_heads=16, n_kv_heads=16, head_size=128,
        n_experts=64, n_active=8, n_inner=1024, n_vocab=50304, rope_theta=1e4,
    ),
    # nobody's: Mixtral's proportions at a size that loads in seconds
    "mixtral-s": Shape(
        graph="llama", n_layers=16, n_hidden=2048, n_heads=16, n_kv_heads=8, head_size=128,
        n_experts=8, n_active=2, n_inner=7168, n_vocab=32000, rope_theta=1e6,
    ),
    # Qwen/Qwen3-30B-A3B
    "qwen3-30b-a3b": Shape(
        graph="qwen3moe", n_layers=48, n_hidden=2048, n_heads=32, n_kv_heads=4, head_size=128,
        n_experts=128, n_active=8, n_inner=768, n_vocab=151936, rope_theta=1e6,
    ),
    # mistralai/Mixtral-8x7B-v0.1
    "mixtral-8x7b": Shape(
        graph="llama", n_layers=32, n_hidden=4096, n_heads=32, n_kv_heads=8, head_size=128,
        n_experts=8, n_active=2, n_inner=14336, n_vocab=32000, rope_theta=1e6,
    ),
    # Qwen/Qwen3-235B-A22B
    "qwen3-235b-a22b": Shape(
        graph="qwen3moe", n_layers=94, n_hidden=4096, n_heads=64, n_kv_heads=4, head_size=128,
        n_experts=128, n_active=8, n_inner=1536, n_vocab=151936, rope_theta=1e6,
    ),
}  # fmt: skip
