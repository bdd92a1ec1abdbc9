"""bitsandbytes' weights: 4-bit codes of a table in blocks, and 8-bit rows.

4 bits  weight           bytes in any dtype, two codes each, the one in the high bits first, rows
                         one after the other; blocks do not end where rows do
        weight.quant_map [16] float32, what codes stand for
        weight.absmax    [blocks] float32, or uint8 codes of another table:
        weight.nested_quant_map [256], weight.nested_absmax [blocks / 256]
        weight.quant_state.bitsandbytes__nf4 (or fp4)  JSON: blocksize, shape, nested_offset, ...
        w[i] = quant_map[code i] * absmax[i / blocksize]
        absmax[b] = nested_quant_map[code b] * nested_absmax[b / nested_blocksize] + nested_offset
8 bits  weight [n, k] int8, SCB [n] float32:  w[r][c] = weight[r][c] * SCB[r] / 127

Source: bitsandbytes, functional.py (QuantState.as_dict, dequantize_4bit) and nn/modules.py;
QLoRA, arXiv 2305.14314; LLM.int8, arXiv 2208.07339.

Knows:        where codes, tables and scales lie.
Ignorant of:  how they were chosen.
"""

import json
import math
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowmoe.checkpoint.packings.codes import looked_up
from lowmoe.checkpoint.packings.packing import (
    CHUNK_WEIGHTS,
    PackedWeight,
    Weight,
    groups,
)
from lowmoe.checkpoint.packings.scaled import INT8, scale_rows
from lowmoe.checkpoint.safetensors_file import DTYPES

TABLES = ("nf4", "fp4")
MAX_STATE_BYTES = 2**16
MAX_BLOCK = 2**16
MAX_OFFSET = 2.0**100  # beyond any mean of scales, and JSON's whole numbers can be longer
INT8_MAX = 127.0


def _state_name(name: str, table: str) -> str:
    return f"{name}.quant_state.bitsandbytes__{table}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FourBitPacking:
    """nf4 and fp4."""

    def stored(self, name: str, names: Container[str]) -> tuple[str, ...]:
        """Codes, scales, tables and what is said of them."""
        states = [_state_name(name, t) for t in TABLES if _state_name(name, t) in names]
        if not states:
            return ()
        parts = [name, *(f"{name}.{part}" for part in ("absmax", "quant_map")), *states]
        nested = [f"{name}.nested_absmax", f"{name}.nested_quant_map"]
        return (*parts, *(n for n in nested if n in names))

    def open(self, weight: Weight) -> PackedWeight:
        """Raises CheckpointError unless all of them cover the weight.  Reads what is said of it."""
        name, n_weights = weight.name, math.prod(weight.shape)
        table = next(t for t in TABLES if _state_name(name, t) in weight.files)
        state = _read_state(weight, _state_name(name, table))
        codes = weight.files.entry(name)
        if codes.dtype not in DTYPES or codes.n_bytes != -(-n_weights // 2):
            raise weight.damaged(
                f"is {codes.dtype} of {codes.n_bytes} bytes",
                f"4-bit codes of {list(weight.shape)} take {-(-n_weights // 2)}",
            )
        n_blocks = groups(n_weights, state.block)
        weight.require(f"{name}.quant_map", ("F32",), (16,))
        if state.nested_block is None:
            weight.require(f"{name}.absmax", ("F32",), (n_blocks,))
        else:
            weight.require(f"{name}.absmax", ("U8",), (n_blocks,))
            n_nested = groups(n_blocks, state.nested_block)
            weight.require(f"{name}.nested_absmax", ("F32",), (n_nested,))
            weight.require(f"{name}.nested_quant_map", ("F32",), (256,))
        return _FourBitWeight(weight, state)


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """block, nested_block: weights and blocks to a scale; nested_block: None without a table."""

    block: int
    nested_block: int | None
    nested_offset: float


def _read_state(weight: Weight, name: str) -> _State:
    entry = weight.files.entry(name)
    if entry.dtype != "U8" or len(entry.shape) != 1 or entry.n_bytes > MAX_STATE_BYTES:
        raise weight.damaged(
            f"its quant_state is {entry.dtype} {list(entry.shape)}",
            f"at most {MAX_STATE_BYTES} bytes of JSON are expected",
        )
    try:
        values = json.loads(weight.files.read_whole(name).numpy().tobytes())
    except (ValueError, RecursionError) as e:
        raise weight.damaged(f"its quant_state is not JSON ({e})", "it must be") from e
    if not isinstance(values, dict) or values.get("shape") != list(weight.shape):
        found = values.get("shape") if isinstance(values, dict) else values
        raise weight.damaged(
            f"its quant_state has shape {str(found)[:80]}",
            f"config.json needs {list(weight.shape)}",
        )
    nested = f"{weight.name}.nested_absmax" in weight.files
    return _State(
        block=_block(weight, values, "blocksize"),
        nested_block=_block(weight, values, "nested_blocksize") if nested else None,
        nested_offset=_offset(weight, values) if nested else 0.0,
    )


def _block(weight: Weight, values: Mapping[str, Any], key: str) -> int:
    value = values.get(key)
    if type(value) is not int or not 2 <= value <= MAX_BLOCK or value & (value - 1):
        raise weight.damaged(
            f"its {key} is {str(value)[:80]}", f"a power of two from 2 to {MAX_BLOCK} is expected"
        )
    return value


def _offset(weight: Weight, values: Mapping[str, Any]) -> float:
    value = values.get("nested_offset")
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < MAX_OFFSET:
        raise weight.damaged(f"its nested_offset is {str(value)[:80]}", "a number is expected")
    return float(value)


@dataclass(frozen=True, slots=True)
class _FourBitWeight:
    weight: Weight
    state: _State

    def rows(self, first: int, count: int) -> Tensor:
        """Some of the first axis; of the file's first axis only what holds it is read."""
        weight, size = self.weight, self.state.block
        row = math.prod(weight.shape[1:])
        begin, end = first * row, (first + count) * row
        first_block, end_block = begin // size, groups(end, size)
        octets = self._octets(first_block * size, end_block * size)
        scales = self._scales(first_block, end_block)
        table = weight.files.read_whole(f"{weight.name}.quant_map")
        # The last block of all may be cut short.
        out = torch.empty(scales.shape[0] * size)
        per_chunk = max(1, CHUNK_WEIGHTS // size)
        for start in range(0, scales.shape[0], per_chunk):
            stop = min(start + per_chunk, scales.shape[0])
            numbers = looked_up(
                octets[start * size // 2 : stop * size // 2], table, low_first=False
            ).flatten()
            out[start * size :][: numbers.shape[0]] = numbers
            out[start * size : stop * size].view(-1, size).mul_(scales[start:stop, None])
        before = begin - first_block * size
        return out[before : before + count * row].view(count, *weight.shape[1:])

    def _octets(self, begin: int, end: int) -> Tensor:
        """The codes of weights begin..end, two to a byte, as far as there are any."""
        files, entry = self.weight.files, self.weight.files.entry(self.weight.name)
        if not entry.shape:
            return files.read_whole(self.weight.name).flatten().view(torch.uint8)
        unit = entry.n_bytes // max(entry.shape[0], 1)  # bytes
        start = begin // 2 // unit
        stop = min(-(-end // 2 // unit), entry.shape[0])
        found = files.read_stored(self.weight.name, start, stop - start)
        octets = found.flatten().view(torch.uint8)[begin // 2 - start * unit :]
        return octets[: end // 2 - begin // 2]

    def _scales(self, first: int, end: int) -> Tensor:
        """[blocks] float32."""
        files, name, size = self.weight.files, self.weight.name, self.state.nested_block
        scales = files.read_stored(f"{name}.absmax", first, end - first)
        if size is None:
            return scales
        table = files.read_whole(f"{name}.nested_quant_map")
        nested = files.read_whole(f"{name}.nested_absmax")
        of_block = nested[torch.arange(first, end) // size]
        return table[scales.int()] * of_block + self.state.nested_offset


@dataclass(frozen=True, slots=True, kw_only=True)
class EightBitPacking:
    """LLM.int8's rows."""

    def stored(self, name: str, names: Container[str]) -> tuple[str, ...]:
        """Codes, scales, and which order they are in where that is said."""
        scales, order = _row_scales(name), name + "_format"
        if not (name.endswith(".weight") and scales in names):
            return ()
        return (name, scales, *((order,) if order in names else ()))

    def open(self, weight: Weight) -> PackedWeight:
        """Raises CheckpointError unless rows lie one after the other, each with its scale."""
        weight.require(weight.name, (INT8,), weight.require_matrix())
        weight.require(_row_scales(weight.name), ("F32",), (weight.shape[0],))
        order = weight.name + "_format"
        if order in weight.files:
            entry = weight.require(order, ("U8",), weight.files.entry(order).shape)
            if entry.n_bytes != 1 or int(weight.files.read_whole(order)) != 0:
                raise weight.damaged(
                    "its weight_format is not 0", "rows one after the other are expected"
                )
        return _EightBitWeight(weight)


@dataclass(frozen=True, slots=True)
class _EightBitWeight:
    weight: Weight

    def rows(self, first: int, count: int) -> Tensor:
        """Some rows."""
        codes = self.weight.files.read_stored(self.weight.name, first, count)
        scales = self.weight.files.read_stored(_row_scales(self.weight.name), first, count)
        return scale_rows(codes, scales / INT8_MAX)


def _row_scales(name: str) -> str:
    return name.removesuffix("weight") + "SCB"
