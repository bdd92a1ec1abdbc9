"""Writes a GGUF file of a shape with random weights, straight in its quantized types.

Knows:        the keys llama.cpp reads, where tensors begin.
Ignorant of:  which types are chosen, what blocks hold.

    python -m benchmarks.peers.gguf_file SHAPE PRESET FILE [--layers N] [--plan]

Runs in llama.cpp's virtual environment (README.md).  Prints one JSON object.
"""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from benchmarks.peers.gguf_blocks import random_blocks
from benchmarks.peers.gguf_types import FILE_TYPES, TensorPlan, bytes_per_token, tensor_plans
from benchmarks.peers.shapes import SHAPES, Shape

# Long enough that no cache holds it, short enough that it is made at once.
POOL_BYTES = 32 * 2**20
BYTES_PER_TOKEN_KEY = "lowmoe.benchmark.bytes_per_token"


class WeightPools:
    """Random weights for any number of tensors, cut from one pool for each type and spread."""

    def __init__(self, n_layers: int, seed: int) -> None:
        self._n_layers = n_layers
        self._random = np.random.default_rng(seed)
        self._pools: dict[tuple[Type, int], NDArray[np.uint8]] = {}

    def write(self, plan: TensorPlan, file: BinaryIO) -> None:
        """A tensor's bytes; each piece begins at a random block, so that tensors differ."""
        if len(plan.shape) == 1:
            file.write(np.ones(plan.shape, np.float32).tobytes())
            return
        pool = self._pool(plan)
        left = plan.n_bytes
        while left:
            first = int(self._random.integers(len(pool) // 2))
            piece = memoryview(pool[first:].reshape(-1))[:left]
            file.write(piece)
            left -= len(piece)

    def _pool(self, plan: TensorPlan) -> NDArray[np.uint8]:
        n_summed = self._n_summed(plan)
        key = (plan.type, n_summed)
        if key not in self._pools:
            count = POOL_BYTES // gguf.GGML_QUANT_SIZES[plan.type][1]
            self._pools[key] = random_blocks(plan.type, count, n_summed**-0.5, self._random)
        return self._pools[key]

    def _n_summed(self, plan: TensorPlan) -> int:
        """How many products of inputs and weights make a sum that spreads like one input.

        Embeddings have spread 1, and what layers add to them together about as much, as GPT-2 is
        initialized: what attention adds is alike for all tokens, so that more of it would send
        them to the same experts.
        """
        if plan.name == "token_embd.weight":
            return 1
        is_added = plan.name.endswith(("attn_output.weight", "ffn_down_exps.weight"))
        return plan.shape[-1] * (2 * self._n_layers if is_added else 1)


def write_gguf(path: Path, shape: Shape, preset: str, *, seed: int = 1) -> None:
    """Write the whole file."""
    plans = tensor_plans(shape, preset)
    writer = gguf.GGUFWriter(None, shape.graph)
    _describe(writer, shape, preset)
    writer.add_float32(BYTES_PER_TOKEN_KEY, bytes_per_token(plans))
    for plan in plans:
        _announce(writer, plan)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    (file,) = writer.fout
    pools = WeightPools(shape.n_layers, seed)
    for plan in plans:
        _pad(file, writer.data_alignment)
        pools.write(plan, file)
    _pad(file, writer.data_alignment)
    file.flush()
    os.fsync(file.fileno())
    writer.close()


def _describe(writer: gguf.GGUFWriter, shape: Shape, preset: str) -> None:
    writer.add_block_count(shape.n_layers)
    writer.add_context_length(shape.n_context)
    writer.add_embedding_length(shape.n_hidden)
    writer.add_feed_forward_length(shape.n_inner)
    writer.add_expert_feed_forward_length(shape.n_inner)
    writer.add_head_count(shape.n_heads)
    writer.add_head_count_kv(shape.n_kv_heads)
    writer.add_key_length(shape.head_size)
    writer.add_value_length(shape.head_size)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(shape.n_experts)
    writer.add_expert_used_count(shape.n_active)
    writer.add_vocab_size(shape.n_vocab)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(FILE_TYPES[preset])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _announce(writer: gguf.GGUFWriter, plan: TensorPlan) -> None:
    if plan.type == Type.F32:
        writer.add_tensor_info(plan.name, plan.shape, np.dtype(np.float32), plan.n_bytes)
        return
    byte_shape = gguf.quant_shape_to_byte_shape(plan.shape, plan.type)
    writer.add_tensor_info(
        plan.name, byte_shape, np.dtype(np.uint8), plan.n_bytes, raw_dtype=plan.type
    )


def _pad(file: BinaryIO, alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))


def main() -> None:
    """Write a file, or with --plan only say how large it would be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("preset", choices=FILE_TYPES)
    parser.add_argument("file", type=Path)
    parser.add_argument("--layers", type=int, help="default: the shape's")
    parser.add_argument("--plan", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    if arguments.layers is not None:
        shape = replace(shape, n_layers=arguments.layers)
    plans = tensor_plans(shape, arguments.preset)
    if not arguments.plan:
        write_gguf(arguments.file, shape, arguments.preset)
    print(
        json.dumps(
            {
                "n_bytes": sum(plan.n_bytes for plan in plans),
                "bytes_per_token": bytes_per_token(plans),
            }
        )
    )


if __name__ == "__main__":
    main()
