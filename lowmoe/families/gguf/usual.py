"""What many architectures' headers say in the same keys.

Knows:        llama.cpp's keys that its models share.
Ignorant of:  which architecture has what.
"""

from collections.abc import Sequence
from typing import Any

from lowmoe.errors import UnsupportedModelError
from lowmoe.families.gguf.model import EMBEDDING, HEAD, GgufModel
from lowmoe.families.gguf.rope import rope_parameters

SOFTMAX, SIGMOID = 1, 2
_CONTROL = 3  # a kind of tokens
# Control tokens that end an answer, whatever key a file has for them; llama.cpp looks for them too.
_ENDS = frozenset(
    ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end_of_text|>", "<|endoftext|>", "<|return|>")
)


def usual(m: GgufModel, model_type: str, *, theta: float = 1e4) -> dict[str, Any]:
    """What all have but their feed-forwards.  theta: as llama.cpp where the file does not say."""
    n_hidden, n_heads = m.integer("embedding_length"), m.integer("attention.head_count")
    head_size = m.integer("attention.key_length", n_hidden // max(1, n_heads))
    value_size = m.integer("attention.value_length", head_size)
    if value_size != head_size:
        raise UnsupportedModelError(
            f"GGUF: keys of {head_size} channels and values of {value_size} are not implemented "
            f"for a {m.architecture}. This model cannot run here yet."
        )
    return shape(m, model_type) | {
        "num_key_value_heads": m.integer("attention.head_count_kv", n_heads),
        "head_dim": head_size,
        "rope_parameters": rope_parameters(m, theta=theta, head_size=head_size),
        "attention_bias": "blk.0.attn_q.bias" in m.shapes or "blk.0.attn_qkv.bias" in m.shapes,
    }


def shape(m: GgufModel, model_type: str) -> dict[str, Any]:
    """Sizes, norms and ends, whatever the attention."""
    epsilon = "attention.layer_norm_rms_epsilon"
    if not m.has(epsilon):
        epsilon = "attention.layer_norm_epsilon"
    return {
        "model_type": model_type,
        "vocab_size": m.shapes[EMBEDDING][0],
        "hidden_size": m.integer("embedding_length"),
        "num_hidden_layers": m.n_layers(),
        "num_attention_heads": m.integer("attention.head_count"),
        "max_position_embeddings": m.integer("context_length"),
        "rms_norm_eps": m.number(epsilon),
        "tie_word_embeddings": HEAD not in m.shapes,
        "eos_token_id": _end_ids(m),
    }


def _end_ids(m: GgufModel) -> list[int]:
    ids = m.token_ids("eos", "eot", "eom")
    tokens = m.values.get("tokenizer.ggml.tokens")
    kinds: list[int] = getattr(m.values.get("tokenizer.ggml.token_type"), "tolist", list)()
    if not isinstance(tokens, Sequence):
        return ids
    ids += [
        i
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind == _CONTROL and token in _ENDS
    ]
    return sorted(set(ids))


def experts(m: GgufModel, count: str) -> dict[str, Any]:
    """How many there are and are used.  count: the key of the first in config.json."""
    return {
        count: m.n_experts(),
        "num_experts_per_tok": m.integer("expert_used_count"),
    }


def of_own_size(m: GgufModel) -> dict[str, Any]:
    """Experts of a size of their own beside dense feed-forwards of another."""
    return {
        "intermediate_size": m.integer("feed_forward_length"),
        "moe_intermediate_size": m.columns("ffn_down_exps"),
    }


def require_gating(m: GgufModel, *wanted: int) -> None:
    """Refuse routers of other kinds."""
    found = m.integer("expert_gating_func", wanted[0])
    if found not in wanted:
        raise UnsupportedModelError(
            f"GGUF: {m.key('expert_gating_func')} is {found}, but a {m.architecture} is "
            f"implemented with {' or '.join(map(str, wanted))} alone (1 softmax, 2 sigmoid)."
        )
