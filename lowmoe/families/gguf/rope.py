"""Rotary positions as a GGUF file describes them, in config.json's words.

Knows:        llama.cpp's kinds of scaling, tensors of factors and what made them.
Ignorant of:  how scaled frequencies are computed.
"""

import math
from collections.abc import Sequence
from typing import Any

from lowmoe.errors import CheckpointError, UnsupportedModelError
from lowmoe.families.gguf.model import GgufModel

FACTORS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
# Factors are float32 of what was computed in float32 from rounded frequencies.
_SAME = 1e-4
SHORTEST = 2.0**-31  # turns a token: a wavelength of more tokens than any context has
MAX_HEAD_SIZE = 2**16  # a hundred times any model's; every two channels may have a factor
MAX_THETA = 1e18  # far above any model's, and its powers are still numbers


def rope_parameters(m: GgufModel, *, theta: float, head_size: int) -> dict[str, Any]:
    """theta: where the file does not say.  head_size: of which perhaps only a part turns."""
    if head_size > MAX_HEAD_SIZE:
        raise CheckpointError(
            f"GGUF: heads have {head_size} channels, but at most {MAX_HEAD_SIZE} are expected. "
            "The file is damaged; download it again."
        )
    found: dict[str, Any] = {"rope_theta": m.number("rope.freq_base", theta)}
    size = m.integer("rope.dimension_count", head_size)
    if not 2 <= size <= head_size or not 1 < found["rope_theta"] < MAX_THETA:
        raise CheckpointError(
            f"GGUF: {size} of {head_size} channels turn, at a base of {found['rope_theta']}, but "
            "there must be 2 at least and the base above 1. The file is damaged; download it again."
        )
    if size != head_size:
        # The least share of which head_size * share, rounded down, is not under size.
        found["partial_rotary_factor"] = math.nextafter(size / head_size, 2)
    return found | _scaling(m, found["rope_theta"], size)


def _scaling(m: GgufModel, theta: float, size: int) -> dict[str, Any]:
    if LONG in m.shapes:
        return _by_length(m, size)
    if FACTORS in m.shapes:
        return _by_factors(m, theta, size)
    # Files older than the key have linear scaling, mostly by 1.
    kind = m.text("rope.scaling.type", "linear")
    factor = m.number("rope.scaling.factor", m.number("rope.scale_linear", 1.0)) or 1.0
    if kind == "none" or (kind == "linear" and factor == 1):
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return _yarn(m, factor)
    raise UnsupportedModelError(
        f"GGUF: {m.key('rope.scaling.type')} is {kind!r}, but implemented are none, linear, yarn "
        "and factors. This model cannot run here yet."
    )


def _yarn(m: GgufModel, factor: float) -> dict[str, Any]:
    found = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": m.integer("rope.scaling.original_context_length"),
        "beta_fast": m.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": m.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    if m.has("rope.scaling.yarn_attn_factor"):
        found["attention_factor"] = m.number("rope.scaling.yarn_attn_factor")
    if m.has("rope.scaling.yarn_log_multiplier"):
        # The converter keeps mscale_all_dim, and of it a tenth; every published model has the same
        # mscale, which it does not keep.
        share = round(m.number("rope.scaling.yarn_log_multiplier") / 0.1, 6)
        if not 0 <= share <= 100:
            raise CheckpointError(
                f"GGUF: {m.key('rope.scaling.yarn_log_multiplier')} makes an mscale of {share}, "
                "but it must be from 0 to 100. The file is damaged; download it again."
            )
        found |= {"mscale": share, "mscale_all_dim": share}
    return found


def _by_length(m: GgufModel, size: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "long_factor": _factors(m, LONG, size),
        "short_factor": _factors(m, SHORT, size),
        "attention_factor": m.number("rope.scaling.attn_factor", 1.0),
        "original_max_position_embeddings": m.integer("rope.scaling.original_context_length"),
    }


def _factors(m: GgufModel, name: str, size: int) -> list[float]:
    """One for each frequency of the channels that turn."""
    if m.shapes.get(name) != (size // 2,):
        raise CheckpointError(
            f"GGUF: {name} is {m.shapes.get(name)}, but {size} channels that turn need {size // 2} "
            "factors. The file is damaged; download it again."
        )
    factors = list(m.vector(name))
    if not all(0 < f < math.inf for f in factors):
        raise CheckpointError(
            f"GGUF: {name} has factors from {min(factors)} to {max(factors)}, but all must be "
            "above 0. The file is damaged; download it again."
        )
    return factors


def _by_factors(m: GgufModel, theta: float, size: int) -> dict[str, Any]:
    factors = _factors(m, FACTORS, size)
    if all(f == 1 for f in factors):
        return {"rope_type": "default"}
    made_of = wavelengths(factors, theta)
    if made_of is not None:
        return made_of
    whole = m.integer("context_length")
    return {
        "rope_type": "longrope",
        "long_factor": factors,
        "short_factor": factors,
        "short_mscale": 1.0,
        "long_mscale": 1.0,
        "original_max_position_embeddings": whole,
    }


def wavelengths(factors: Sequence[float], theta: float) -> dict[str, Any] | None:
    """What Llama 3's scaling made these factors of, None if it was another.

    Between the fast frequencies, kept, and the slow ones, divided by `factor`, it divides by
    1 / ((1 - s) / factor + s), where s = (n / wavelength - low) / (high - low) grows evenly with
    frequency. Two of these frequencies say what low / n and high / n are; low is 1 in every
    published model.  Source: meta-llama/llama-models, apply_scaling.
    """
    frequencies = [theta ** (-i / len(factors)) / (2 * math.pi) for i in range(len(factors))]
    factor = factors[-1]
    between = [i for i, f in enumerate(factors) if 1 < f < factor * (1 - _SAME)]
    if len(between) < 2:
        return None
    shares = {i: (1 / factors[i] - 1 / factor) / (1 - 1 / factor) for i in between}
    first, last = between[0], between[-1]
    step = frequencies[first] - frequencies[last]
    slope = (shares[first] - shares[last]) / step if step > 0 else 0.0
    low = frequencies[last] - shares[last] / slope if slope > 0 else 0.0
    n_original = round(1 / low) if low > SHORTEST else 0
    high = round(1 + n_original / slope, 3) if n_original > 0 else 1.0
    if high <= 1:
        return None
    found = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": n_original,
    }
    made = [_factor(found, frequency) for frequency in frequencies]
    same = all(abs(a - b) <= _SAME * b for a, b in zip(made, factors, strict=True))
    return found if same else None


def _factor(parameters: dict[str, Any], frequency: float) -> float:
    high = parameters["high_freq_factor"]
    share = (parameters["original_max_position_embeddings"] * frequency - 1) / (high - 1)
    share = min(max(share, 0.0), 1.0)
    factor: float = 1 / ((1 - share) / parameters["factor"] + share)
    return factor
