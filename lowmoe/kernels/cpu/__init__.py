"""Kernels for the CPU, written in C++: trellis planes multiplied straight from their bits.

The extension module _native is built when lowmoe is installed. Its objects take addresses and
sizes; who calls keeps the memory alive.

Knows:        how a code and a cache format are handed to native code.
Ignorant of:  layers' order, stores, tensors' owners.
"""

from typing import Literal, TypeAlias

from lowmoe.errors import LowMoeError, UsageError
from quant.trellis import TrellisCode

try:
    from lowmoe.kernels.cpu._native import (
        PAGE_TOKENS,
        Attention,
        AttentionLayer,
        DeltaLayer,
        DeltaNet,
        Ends,
        Engine,
        Experts,
        ExpertsLayer,
        KvPages,
        LatentProjection,
        Layers,
        Lightning,
        LightningLayer,
        Linear,
        Norm,
        Pool,
        Router,
        SharedExpert,
        allocated_bytes,
        isas,
        kv_head_bytes,
    )
except ImportError as e:
    # A clone that Python finds before the installed package, or an extension of other sources.
    raise LowMoeError(
        f"lowmoe's native kernels cannot be loaded from {__path__[0]} ({e}). In a clone, run "
        "pip install -e . first; elsewhere, install lowmoe again."
    ) from e

__all__ = [
    "KV_FORMATS",
    "PAGE_TOKENS",
    "WINDOW_BITS",
    "Attention",
    "AttentionLayer",
    "DeltaLayer",
    "DeltaNet",
    "Ends",
    "Engine",
    "Experts",
    "ExpertsLayer",
    "KvFormat",
    "KvPages",
    "LatentProjection",
    "Layers",
    "Lightning",
    "LightningLayer",
    "Linear",
    "Norm",
    "Pool",
    "Router",
    "SharedExpert",
    "allocated_bytes",
    "choose_isa",
    "engine",
    "isas",
    "kv_head_bytes",
]

KvFormat: TypeAlias = Literal["float32", "float16", "int8"]
KV_FORMATS: tuple[KvFormat, ...] = ("float32", "float16", "int8")
WINDOW_BITS = 6  # the widest window that kernels read


def choose_isa(forced: str | None) -> str:
    """The best instruction set of this processor, or the one that was asked for.

    Raises UsageError for one that this build has no code for or this processor does not run.
    """
    found = isas()
    if forced is None:
        return found[0]
    if forced not in found:
        raise UsageError(
            f"LOWMOE_ISA is {forced!r}, but this processor runs {', '.join(found)}. "
            "Take one of them or torch, or unset it."
        )
    return forced


def engine(isa: str, pool: Pool, code: TrellisCode, *, max_tokens: int) -> Engine:
    """Scratch and threads for calls of up to max_tokens.  code.window_bits: at most WINDOW_BITS."""
    assert code.window_bits <= WINDOW_BITS
    # A narrower window ignores the upper bits of a wider one.
    table = code.table * (2**WINDOW_BITS // len(code.table))
    return Engine(isa, pool, table, code.scale_unit, max_tokens)
