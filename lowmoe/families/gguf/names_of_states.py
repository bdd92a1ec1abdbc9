"""Where a GGUF file keeps what layers that keep a state have, an architecture each.

Knows:        llama.cpp's names of them, and how its converter lays them.
Ignorant of:  what any tensor is for.
"""

from collections.abc import Callable, Mapping, Set
from dataclasses import replace
from typing import TypeAlias

from lowmoe.spec import Stored

_LAYER = "blk.{layer}."
_Table: TypeAlias = Mapping[str, str | Stored]

_GATED = Stored(name=_LAYER + "attn_q.weight", holds=("q", "attention_gate"), in_heads=True)
_MIXED = Stored(name=_LAYER + "attn_qkv.weight", holds=("delta_q", "delta_k", "delta_v"))
_OLD = Stored(name=_LAYER + "ssm_in.weight", holds=(*_MIXED.holds, "delta_gate"), in_heads=True)
_RATES = Stored(
    name=_LAYER + "ssm_ba.weight", holds=("delta_correction", "delta_decay"), in_heads=True
)
_LIGHTNING = Stored(
    name=_MIXED.name, holds=("lightning_q", "lightning_k", "lightning_v"), in_heads=True
)
_DELTA = {
    **dict.fromkeys(_GATED.holds, _GATED),
    **dict.fromkeys(_MIXED.holds, _MIXED),
    "delta_gate": Stored(name=_LAYER + "attn_gate.weight"),
    "delta_taps": Stored(name=_LAYER + "ssm_conv1d.weight"),
    "delta_decay_bias": Stored(name=_LAYER + "ssm_dt.bias"),
    "delta_log_decay": Stored(name=_LAYER + "ssm_a", minus_exp=True),
    "delta_norm": Stored(name=_LAYER + "ssm_norm.weight"),
    "delta_out": Stored(name=_LAYER + "ssm_out.weight"),
}


def _qwen3_next(names: Set[str]) -> _Table:
    old = any(name.endswith(".ssm_in.weight") for name in names)
    rates = dict.fromkeys(_RATES.holds, _RATES)
    return {**_DELTA, **rates, **(dict.fromkeys(_OLD.holds, _OLD) if old else {})}


def _qwen35_moe(names: Set[str]) -> _Table:
    """Whose heads of values that share a head of keys lie apart."""
    apart = {
        "delta_correction": Stored(name=_LAYER + "ssm_beta.weight"),
        "delta_decay": Stored(name=_LAYER + "ssm_alpha.weight"),
        **{role: _DELTA[role] for role in ("delta_v", "delta_gate", "delta_taps")},
        **{role: _DELTA[role] for role in ("delta_decay_bias", "delta_log_decay")},
    }
    tiled = {role: replace(entry, tiled="rows") for role, entry in apart.items()}
    return {**_DELTA, **tiled, "delta_out": replace(_DELTA["delta_out"], tiled="columns")}


def _minimax_01(names: Set[str]) -> _Table:
    return {
        **dict.fromkeys(_LIGHTNING.holds, _LIGHTNING),
        "lightning_gate": _LAYER + "attn_gate.weight",
        "lightning_norm": _LAYER + "attn_norm_2.weight",
        "lightning_out": _LAYER + "attn_output.weight",
    }


OF_STATES: Mapping[str, Callable[[Set[str]], _Table]] = {
    "minimax-01": _minimax_01,
    "qwen35moe": _qwen35_moe,
    "qwen3next": _qwen3_next,
}
