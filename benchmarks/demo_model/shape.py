"""The demo model's shape, as its config.json says it.

Knows:        the keys of Hugging Face's Mixtral config.
Ignorant of:  tensors.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Mixtral with tied embeddings."""

    n_vocab: int = 8192
    hidden: int = 256
    inner: int = 512
    n_layers: int = 8
    n_heads: int = 8
    n_kv_heads: int = 4
    head_dim: int = 32
    n_experts: int = 8
    n_active: int = 2
    # 95 of 100 stories fit with their prompt, so that the model sees them end.
    context: int = 1024
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def config(self) -> dict[str, object]:
        """config.json of transformers.MixtralForCausalLM."""
        return {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "vocab_size": self.n_vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "num_local_experts": self.n_experts,
            "num_experts_per_tok": self.n_active,
            "max_position_embeddings": self.context,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.norm_eps,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "sliding_window": None,
            "torch_dtype": "bfloat16",
        }
