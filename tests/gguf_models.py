"""Writes a Hugging Face checkpoint as a GGUF file, as llama.cpp's converter does.

With the gguf package's writer, its names of tensors and of keys; what the converter does beyond
names is written here again, from its conversion/*.py. Files of the converter itself, of every
family here, gave the same logits.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from tests.gguf_headers import describe
from tests.gguf_tensors import converted

Writer = gguf.GGUFWriter
Type = gguf.GGMLQuantizationType

ARCHITECTURES = {
    "dbrx": "dbrx",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "deepseek_v32": "deepseek32",
    "dots1": "dots1",
    "ernie4_5_moe": "ernie4_5-moe",
    "glm4_moe": "glm4moe",
    "glm4_moe_lite": "deepseek2",
    "gpt2": "gpt2",
    "gpt_oss": "gpt-oss",
    "granitemoe": "granitemoe",
    "grok-1": "grok",
    "hunyuan_v1_moe": "hunyuan-moe",
    "kimi_k2": "deepseek2",
    "llama": "llama",
    "llama4_text": "llama4",
    "minimax": "minimax-01",
    "minimax_m1": "minimax-01",
    "minimax_m2": "minimax-m2",
    "minimax_text_01": "minimax-01",
    "mistral": "llama",
    "mixtral": "llama",
    "olmoe": "olmoe",
    "phimoe": "phimoe",
    "qwen": "qwen",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3_5_moe_text": "qwen35moe",
    "qwen3_moe": "qwen3moe",
    "qwen3_next": "qwen3next",
}


def write_gguf(
    folder: Path,
    path: Path,
    *,
    type: Type = Type.F32,
    split: int = 0,
    more: Callable[[Writer], None] = lambda writer: None,
) -> None:
    """Write the checkpoint's model.  type: of matrices whose rows it fits; split: tensors a file;
    more: adds what else is to be in the header."""
    config = json.loads((folder / "config.json").read_text())
    architecture = ARCHITECTURES[config["model_type"]]
    writer = Writer(path, architecture, split_max_tensors=split)
    describe(writer, config)
    more(writer)
    for name, tensor in named(dict(converted(all_tensors(folder), config)), architecture):
        fits = tensor.dim() > 1 and tensor.shape[-1] % gguf.GGML_QUANT_SIZES[type][0] == 0
        kind = type if fits and "ffn_gate_inp" not in name else Type.F32
        writer.add_tensor(name, gguf.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def all_tensors(folder: Path) -> dict[str, Tensor]:
    """Of all shards."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def named(tensors: Mapping[str, Tensor], architecture: str) -> Iterator[tuple[str, Tensor]]:
    """Under llama.cpp's names, as the gguf package knows them."""
    like = _UNKNOWN.get(architecture, architecture)
    (kind,) = (k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == like)
    names = gguf.get_tensor_name_map(kind, 10)
    for name, tensor in tensors.items():
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if architecture == "minimax-01":
            found = _of_lightning(name) or found
        if found is None:
            assert name in (*ROPE_TENSORS, "blk"), name
        yield found or name, tensor


# Architectures that llama.cpp knows and the package does not yet, and one of like names.
_UNKNOWN = {"deepseek32": "glm-dsa", "minimax-01": "llama"}
_OF_LIGHTNING = {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.output_gate": "attn_gate",
    "self_attn.norm": "attn_norm_2",
    "self_attn.out_proj": "attn_output",
}


def _of_lightning(name: str) -> str | None:
    for theirs, ours in _OF_LIGHTNING.items():
        if f".{theirs}." in name:
            return f"blk.{name.split('.')[2]}.{ours}.weight"
    return None


ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def rewritten(path: Path, to: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """The same file with other tensors, {name: (array, type)}, and the header's values as before.

    change: takes the table and changes it in place.
    """
    reader = gguf.GGUFReader(path)
    writer = Writer(to, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(key, field.contents(), *field.types[:2])
    tensors = {t.name: (np.array(t.data), t.tensor_type) for t in reader.tensors}
    change(tensors)
    for name, (data, type) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
