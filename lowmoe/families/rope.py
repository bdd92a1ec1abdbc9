"""Rotary positions as config.json describes them.

Knows:        rope_parameters, and rope_scaling and rope_theta before it; names of scalings.
Ignorant of:  how scaled frequencies are computed.
"""

import math
from collections.abc import Mapping
from typing import Any

from lowmoe.errors import CheckpointError, UnsupportedModelError
from lowmoe.spec import (
    HfConfig,
    LinearScaling,
    LongScaling,
    Rope,
    RopeScaling,
    WavelengthScaling,
    YarnScaling,
)


def read_rope(hf: HfConfig, *, head_size: int, theta: float, rotated: float = 1.0) -> Rope:
    """theta, rotated: the base and the share of a head that turns, if the config does not say."""
    values = rope_values(hf)
    parameters = HfConfig(values)
    share = parameters.number(
        "partial_rotary_factor", default=hf.number("partial_rotary_factor", default=rotated)
    )
    size = int(head_size * share)
    if share > 1 or size % 2 or size < 2:
        raise CheckpointError(
            f"config.json: {share} of {head_size} channels turn, but it must be an even number of "
            "them, at most all. The file is damaged."
        )
    theta = parameters.number("rope_theta", default=hf.number("rope_theta", default=theta))
    scaling = _scaling(hf, parameters, _kind(values))
    if isinstance(scaling, LongScaling) and {len(scaling.short), len(scaling.long)} != {size // 2}:
        raise CheckpointError(
            f"config.json: rope has {len(scaling.short)} short factors and {len(scaling.long)} "
            f"long ones, but {size} channels that turn need {size // 2}. The file is damaged."
        )
    return Rope(theta=theta, size=None if size == head_size else size, scaling=scaling)


def rope_values(hf: HfConfig) -> Mapping[str, Any]:
    """The table of rope's parameters, in either of the places transformers wrote it."""
    found = [hf.values.get(key) for key in ("rope_parameters", "rope_scaling")]
    values: Any = next((v for v in found if v is not None), {})
    if not isinstance(values, dict):
        raise CheckpointError(
            f"config.json: rope's parameters are {values!r}, but must be a table."
        )
    return values


def _kind(values: Mapping[str, Any]) -> Any:
    return values.get("rope_type", values.get("type", "default"))


def _scaling(hf: HfConfig, parameters: HfConfig, kind: Any) -> RopeScaling | None:
    match kind:
        case "default":
            return None
        case "linear":
            return LinearScaling(factor=parameters.number("factor"))
        case "llama3":
            return WavelengthScaling(
                factor=parameters.number("factor"),
                low=parameters.number("low_freq_factor"),
                high=parameters.number("high_freq_factor"),
                n_original=parameters.integer("original_max_position_embeddings"),
            )
        case "yarn":
            return _yarn(hf, parameters)
        case "longrope" | "su":
            return _long(hf, parameters)
        case _:
            raise UnsupportedModelError(
                f"config.json: rope_type is {kind!r}, but implemented are default, linear, llama3, "
                "longrope and yarn. This model cannot run here yet."
            )


def n_original(hf: HfConfig, parameters: HfConfig) -> int:
    """The tokens a model was first trained on; beside the other keys rather than among RoPE's."""
    key = "original_max_position_embeddings"
    whole = hf.integer("max_position_embeddings")
    return hf.integer(key, default=parameters.integer(key, default=whole))


def magnitude(factor: float, share: float = 1.0) -> float:
    """YaRN's longer queries and keys.  Source: arXiv 2309.00071, equation 22."""
    return 1.0 if factor <= 1 else 0.1 * share * math.log(factor) + 1.0


def _yarn(hf: HfConfig, parameters: HfConfig) -> YarnScaling:
    original = n_original(hf, parameters)
    whole = hf.integer("max_position_embeddings")
    stretched = whole / original if original < whole else None
    factor = parameters.number("factor", default=stretched)
    length, shares = magnitude(factor), [parameters.values.get(k) for k in _SHARES]
    if all(shares):
        ours, all_dim = (parameters.number(key) for key in _SHARES)
        length = magnitude(factor, ours) / magnitude(factor, all_dim)
    return YarnScaling(
        factor=factor,
        beta_fast=parameters.number("beta_fast", default=32.0),
        beta_slow=parameters.number("beta_slow", default=1.0),
        n_original=original,
        length=parameters.number("attention_factor", default=length),
        truncate=parameters.boolean("truncate", default=True),
    )


_SHARES = ("mscale", "mscale_all_dim")


def _long(hf: HfConfig, parameters: HfConfig) -> LongScaling:
    original = n_original(hf, parameters)
    stretched = hf.integer("max_position_embeddings") / original
    factor, length = parameters.number("factor", default=stretched), 1.0
    if factor > 1:
        length = math.sqrt(1 + math.log(factor) / math.log(original))
    length = parameters.number("attention_factor", default=length)
    return LongScaling(
        short=_factors(parameters, "short_factor"),
        long=_factors(parameters, "long_factor"),
        short_length=parameters.number("short_mscale", default=length),
        long_length=parameters.number("long_mscale", default=length),
        n_original=original,
    )


def _factors(parameters: HfConfig, key: str) -> tuple[float, ...]:
    value = parameters.values.get(key)
    if not isinstance(value, list):
        raise CheckpointError(f"config.json: {key} is {value!r}, but must be a list of numbers.")
    return tuple(HfConfig({key: entry}).number(key) for entry in value)
