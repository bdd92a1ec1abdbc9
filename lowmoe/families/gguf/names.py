"""Where a GGUF file keeps every role: one table for all architectures, with what there is of it.

Knows:        llama.cpp's names, old and new; which architectures' rope turns neighbours.
Ignorant of:  what any tensor is for.
"""

from collections.abc import Mapping, Set

from lowmoe.families.gguf.names_of_states import OF_STATES
from lowmoe.spec import Stored

_LAYER = "blk.{layer}."
# Channels that rope turns against each other stand side by side in these, as their makers kept them
# or as the converter laid them; LLAMA_ROPE_TYPE_NORM in llama.cpp.
_PAIRED = frozenset(("llama", "llama4", "deepseek2", "deepseek32", "granitemoe", "ernie4_5-moe"))
# The norm before the feed-forward, by its names in order of preference.
_SECOND_NORMS = ("ffn_norm", "post_attention_norm", "attn_output_norm")
_LAST_NORMS = ("layer_output_norm", "post_ffw_norm")  # behind it, likewise
_MATRICES = ("gate", "up", "down")
# What no role needs: factors that became part of the config, and what chooses tokens that are too
# many to attend to all.
_OF_MODELS, _OF_LAYERS = ("rope_freqs.", "rope_factors_"), (_LAYER + "indexer.",)
_GUESSING = ".nextn.eh_proj.weight"  # every layer that guesses further tokens has one


def table(architecture: str, names: Set[str]) -> Mapping[str, str | Stored]:
    """names: of the tensors there are."""
    second = next((n for n in _SECOND_NORMS if f"blk.0.{n}.weight" in names), _SECOND_NORMS[0])
    behind = next((n for n in _LAST_NORMS if f"blk.0.{n}.weight" in names), _LAST_NORMS[0])
    return {
        "embedding": "token_embd.weight",
        "final_norm": "output_norm.weight",
        "final_norm_bias": "output_norm.bias",
        "head": "output.weight",
        "head_bias": "output.bias",
        "positions": "position_embd.weight",
        **_both("attention_norm", "attn_norm"),
        **_both("experts_norm", second),
        "attention_out_norm": _LAYER + "attn_output_norm.weight",
        "experts_out_norm": f"{_LAYER}{behind}.weight",
        **_attention(architecture in _PAIRED, names),
        **_feed_forward(names),
        **(OF_STATES[architecture](names) if architecture in OF_STATES else {}),
    }


def ignored(n_layers: int, names: Set[str]) -> tuple[str, ...]:
    """What names begin with that no role needs: a layer behind the model's only if it is one of
    those that guess further tokens.
    """
    of_layers = (name.format(layer=i) for name in _OF_LAYERS for i in range(n_layers))
    own = {_LAYER.format(layer=i) for i in range(n_layers)}
    guessing = {name.removesuffix(_GUESSING[1:]) for name in names if name.endswith(_GUESSING)}
    return (*_OF_MODELS, *of_layers, *sorted(guessing - own))


def _both(role: str, name: str) -> dict[str, str]:
    return {role: f"{_LAYER}{name}.weight", f"{role}_bias": f"{_LAYER}{name}.bias"}


def _attention(paired: bool, names: Set[str]) -> dict[str, str | Stored]:
    found: dict[str, str | Stored] = {
        **_both("attention_out", "attn_output"),
        "q_norm": _LAYER + "attn_q_norm.weight",
        "k_norm": _LAYER + "attn_k_norm.weight",
        "sinks": _LAYER + "attn_sinks.weight",
        "q_down": _LAYER + "attn_q_a.weight",
        "q_latent_norm": _LAYER + "attn_q_a_norm.weight",
        "q_up": Stored(name=_LAYER + "attn_q_b.weight", pairs=paired),
        "kv_down": Stored(name=_LAYER + "attn_kv_a_mqa.weight", pairs=paired),
        "kv_latent_norm": _LAYER + "attn_kv_a_norm.weight",
        "kv_up": _LAYER + "attn_kv_b.weight",
    }
    for suffix, ending in (("", "weight"), ("_bias", "bias")):
        roles = tuple(role + suffix for role in "qkv")
        # A model may have the first in layers of attention, the second in those that keep states.
        fused = _any(names, f"attn_qkv.{ending}") and not _any(names, f"attn_q.{ending}")
        for role in roles:
            found[role] = Stored(
                name=f"{_LAYER}attn_{'qkv' if fused else role[0]}.{ending}",
                holds=roles if fused else (),
                pairs=paired and role[0] != "v",
            )
    return found


def _feed_forward(names: Set[str]) -> dict[str, str | Stored]:
    found: dict[str, str | Stored] = {
        "router": _LAYER + "ffn_gate_inp.weight",
        "router_bias": _LAYER + "ffn_gate_inp.bias",
        "choice_bias": _LAYER + "exp_probs_b.bias",
        "shared_router": _LAYER + "ffn_gate_inp_shexp.weight",
        **{f"only_{m}": f"{_LAYER}ffn_{m}.weight" for m in _MATRICES},
        **{f"shared_{m}": f"{_LAYER}ffn_{m}_shexp.weight" for m in _MATRICES},
    }
    # Not every layer has experts.
    if _any(names, "ffn_down_exps.weight"):
        found |= _stacked("{}", "weight") | _stacked("{}_bias", "bias")
    elif _any(names, "ffn_down.0.weight"):  # until April 2024
        found |= {m: f"{_LAYER}ffn_{m}.{{expert}}.weight" for m in _MATRICES}
    else:
        found |= {m: f"{_LAYER}ffn_{m}.weight" for m in _MATRICES}
        found |= {f"{m}_bias": f"{_LAYER}ffn_{m}.bias" for m in _MATRICES}
    if _any(names, "ffn_gate_up_exps.weight"):
        both = Stored(name=_LAYER + "ffn_gate_up_exps.weight", holds=("gate", "up"), experts="axis")
        found |= dict.fromkeys(both.holds, both)
    return found


def _stacked(role: str, ending: str) -> dict[str, Stored]:
    return {
        role.format(m): Stored(name=f"{_LAYER}ffn_{m}_exps.{ending}", experts="axis")
        for m in _MATRICES
    }


def _any(names: Set[str], ending: str) -> bool:
    return any(name.endswith("." + ending) for name in names)
