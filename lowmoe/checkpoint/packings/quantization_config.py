"""What config.json says of weights that come quantized, read strictly.

Knows:        the keys of each program that writes such checkpoints.
Ignorant of:  files, how codes become numbers.
"""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

from lowmoe.checkpoint.packings.integers import AwqPacking, GptqPacking, WordPacking
from lowmoe.checkpoint.packings.mxfp4 import Mxfp4Packing
from lowmoe.checkpoint.packings.normal_floats import EightBitPacking, FourBitPacking
from lowmoe.checkpoint.packings.packing import PackedWeight, Packing, Weight
from lowmoe.checkpoint.packings.scaled import E4M3, INT8, Block, ScaledPacking
from lowmoe.errors import CheckpointError, UnsupportedModelError
from lowmoe.spec import HfConfig

KEYS = ("quantization_config", "compression_config")
# Beside packed weights: scales of activations and caches, which are not quantized here.
_OF_ACTIVATIONS = (
    "_activation_scale",
    ".activation_scale",
    ".input_scale",
    ".input_scale_ub",
    ".output_scale",
    ".k_scale",
    ".q_scale",
    ".v_scale",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packings:
    """All ways in which a checkpoint's weights may be packed; none for plain ones.

    zero_biases: whether zeros may lie where a model has no bias.
    """

    of: tuple[Packing, ...] = ()
    zero_biases: bool = False

    def stored(self, name: str, names: Container[str]) -> tuple[str, ...]:
        """The tensors that a weight is packed into; () where it lies there as numbers."""
        return next((found for p in self.of if (found := p.stored(name, names))), ())

    def open(self, weight: Weight) -> PackedWeight | None:
        """A weight, checked; None where it is not packed."""
        for packing in self.of:
            if packing.stored(weight.name, weight.files):
                return packing.open(weight)
        return None

    def zero_bias(self, name: str, names: Container[str]) -> bool:
        """Whether a tensor may be zeros that a program wrote beside every packed matrix."""
        weight = name.removesuffix("bias") + "weight"
        return self.zero_biases and bool(self.stored(weight, names))

    def of_activations(self, name: str) -> bool:
        """Whether a tensor is of no use to weights."""
        return bool(self.of) and name.endswith(_OF_ACTIVATIONS)


def read_packings(config: Mapping[str, Any]) -> Packings:
    """How a config.json's weights are packed.

    Raises UnsupportedModelError for what nobody implemented, CheckpointError for damaged values.
    """
    found = [config[key] for key in KEYS if config.get(key) is not None]
    if not found:
        return Packings()
    values = found[0]
    if not isinstance(values, dict):
        raise CheckpointError(
            f"config.json: {KEYS[0]} is {str(values)[:80]}, but must be an object. The file is "
            "damaged; download it again."
        )
    method = values.get("quant_method")
    if method is None and (values.get("load_in_4bit") or values.get("load_in_8bit")):
        method = "bitsandbytes"  # before there were others
    if not isinstance(method, str) or method not in _METHODS:
        raise UnsupportedModelError(
            f"config.json: quant_method is {str(method)[:80]!r}, but implemented are "
            f"{', '.join(sorted(_METHODS))}. Look for a checkpoint in one of them, or in bfloat16."
        )
    return _METHODS[method](HfConfig(values))


def _fp8(hf: HfConfig) -> Packings:
    hf.require("fmt", "e4m3", None)
    hf.require("scale_fmt", "ue8m0", "float", None)
    block = _pair(hf, "weight_block_size")
    return Packings(of=(ScaledPacking(blocks=(block or (None, None),), suffix="_scale_inv"),))


def _fbgemm(_: HfConfig) -> Packings:
    # Stacks of experts are [E, k, n], with a scale for each of their columns.
    return Packings(of=(ScaledPacking(blocks=((1, None), (None, 1)), suffix="_scale"),))


def _mxfp4(_: HfConfig) -> Packings:
    return Packings(of=(Mxfp4Packing(),))


def _gptq(hf: HfConfig) -> Packings:
    hf.require("format", "gptq", "gptq_v2", None)
    hf.require("checkpoint_format", "gptq", "gptq_v2", None)
    dynamic = hf.values.get("dynamic")
    if dynamic is not None and not (
        # Modules with a minus before them are not packed, which the files say too.
        isinstance(dynamic, dict) and all(k.startswith("-:") or not v for k, v in dynamic.items())
    ):
        raise UnsupportedModelError(
            f"config.json: dynamic is {str(dynamic)[:80]}, but only one width for all modules is "
            "implemented. Look for another checkpoint of the model."
        )
    version = hf.values.get("checkpoint_format") or hf.values.get("format") or "gptq"
    packing = GptqPacking(
        bits=_one_of(hf, "bits", (2, 4, 8)),
        group_size=_group_size(hf, "group_size"),
        less_one=version == "gptq",
        reordered=hf.boolean("desc_act", default=False),
    )
    return Packings(of=(packing,), zero_biases=True)


def _awq(hf: HfConfig) -> Packings:
    bits, size = (
        new if hf.values.get(new) is not None else old
        for new, old in (("bits", "w_bit"), ("group_size", "q_group_size"))
    )
    for key in ("version", "format", "checkpoint_format"):
        hf.require(key, "gemm", "GEMM", None)
    hf.require("backend", "auto", "autoawq", None)
    _one_of(hf, bits, (4,))
    return Packings(of=(AwqPacking(group_size=_group_size(hf, size)),), zero_biases=True)


def _bitsandbytes(hf: HfConfig) -> Packings:
    hf.require("bnb_4bit_quant_type", "nf4", "fp4", None)
    return Packings(of=(FourBitPacking(), EightBitPacking()))


_COMPRESSED = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


def _compressed(hf: HfConfig) -> Packings:
    hf.require("quantization_status", "compressed", None)
    hf.require("transform_config", None, {})
    sparsity = hf.values.get("sparsity_config")
    HfConfig(sparsity if isinstance(sparsity, dict) else {}).require("format", "dense", None)
    table = hf.values.get("config_groups")
    if not isinstance(table, dict) or not all(isinstance(g, dict) for g in table.values()):
        raise CheckpointError(
            f"config.json: config_groups is {str(table)[:80]}, but must be a table of groups. "
            "The file is damaged; download it again."
        )
    hf.require("format", *_COMPRESSED, "mixed-precision")
    words: dict[tuple[int, int | None], None] = {}
    blocks: dict[Block, None] = {}
    dtypes: dict[str, None] = {}
    for group in table.values():
        HfConfig(group).require("format", *_COMPRESSED, None)
        weights = group.get("weights")
        if weights is None:  # quantizes activations alone
            continue
        if not isinstance(weights, dict):
            raise CheckpointError(
                f"config.json: weights of a group are {str(weights)[:80]}, but must be an object. "
                "The file is damaged; download it again."
            )
        scheme = _read_scheme(HfConfig(weights))
        if scheme.in_words:
            words[scheme.bits, scheme.block[1]] = None
        if scheme.bits == 8:
            blocks[scheme.block] = dtypes[scheme.dtype] = None
    of: list[Packing] = [WordPacking(schemes=tuple(words))] if words else []
    if blocks:
        of.append(ScaledPacking(blocks=tuple(blocks), suffix="_scale", dtypes=tuple(dtypes)))
    return Packings(of=tuple(of))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scheme:
    """How a group of modules is packed; in_words: whether it may be in words."""

    bits: int
    block: Block
    dtype: str
    in_words: bool


def _read_scheme(weights: HfConfig) -> _Scheme:
    weights.require("type", "int", "float")
    weights.require("strategy", "tensor", "channel", "group", "block")
    real, strategy = weights.values["type"] == "float", weights.values["strategy"]
    block: Block = (None, None)
    if strategy in ("channel", "group"):
        block = (1, _group_size(weights, "group_size") if strategy == "group" else None)
    elif strategy == "block":
        block = _pair(weights, "block_structure") or block
    return _Scheme(
        bits=_one_of(weights, "num_bits", (8,) if real else (2, 4, 8)),
        block=block,
        dtype=E4M3 if real else INT8,
        in_words=not real and strategy in ("channel", "group"),
    )


_METHODS: Mapping[str, Callable[[HfConfig], Packings]] = {
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed,
    "fbgemm_fp8": _fbgemm,
    "fp8": _fp8,
    "gptq": _gptq,
    "mxfp4": _mxfp4,
}


def _one_of(hf: HfConfig, key: str, allowed: tuple[int, ...]) -> int:
    value = hf.integer(key)
    if value not in allowed:
        raise UnsupportedModelError(
            f"config.json: {key} is {value}, but only {', '.join(map(str, allowed))} are "
            "implemented. Look for another checkpoint of the model."
        )
    return value


def _group_size(hf: HfConfig, key: str) -> int | None:
    """Columns to a group; None, written -1, for one group."""
    return None if hf.values.get(key) == -1 else hf.integer(key)


def _pair(hf: HfConfig, key: str) -> tuple[int, int] | None:
    """Two sizes, None where they are absent."""
    value = hf.values.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2:
        raise CheckpointError(
            f"config.json: {key} is {str(value)[:80]}, but must be two sizes. The file is damaged; "
            "download it again."
        )
    rows, columns = (HfConfig({key: size}).integer(key) for size in value)
    return rows, columns
