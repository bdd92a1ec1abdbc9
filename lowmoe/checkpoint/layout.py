"""Where everything lies in a model folder; all of it follows from the model's shape and the recipe.

    manifest.json                        what is here, and the hash of every span
    tokenizer.json, ...                  as they came
    dense.safetensors                    everything but the routed experts
    experts-plane0-00001.safetensors     one tensor for each (layer, expert): one aligned read
    experts-plane1-00001.safetensors     the refinement; a 2-bit machine never reads it

Because offsets and sizes are known before the first weight is read, the disk can be checked and
reserved to the byte, and an interrupted conversion goes on in the middle of a file.

Knows:        names, files, offsets, sizes.
Ignorant of:  weights, hashes, who reads or writes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

from lowmoe.checkpoint.file_names import DENSE_FILE
from lowmoe.checkpoint.files import ALIGNMENT
from lowmoe.checkpoint.safetensors_file import build_header
from lowmoe.spec import ExpertsFeedForward, ModelSpec, Part, end_parts, layer_parts
from quant.expert import ExpertFormat, Nf4Format, PlainFormat, TrellisFormat
from quant.layout import MAX_PLANES, PlaneLayout, round_up
from quant.nf4 import Nf4Layout
from quant.trellis import DEFAULT_CODE, TrellisCode

MAX_EXPERT_FILE_BYTES = 8 * 2**30
PLAIN_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FORMATS = ("trellis", "nf4", *PLAIN_DTYPES)
Described: TypeAlias = tuple[str, torch.dtype, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Which format the weights take.

    format: "trellis", planes everywhere, dense_planes of them for dense matrices; "nf4" for every
    matrix of the layers, as bitsandbytes does it, beside an embedding and a head in dense_planes;
    or "bf16", "fp16", "fp32" for everything. Routers, norms and biases are always float32.
    """

    format: str = "trellis"
    expert_planes: int = 2
    dense_planes: int = MAX_PLANES
    code: TrellisCode = DEFAULT_CODE

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format is {self.format!r}, but must be one of {', '.join(FORMATS)}")
        for planes in (self.expert_planes, self.dense_planes):
            if not 1 <= planes <= MAX_PLANES:
                raise ValueError(f"{planes} planes, but 1 to {MAX_PLANES} are implemented")

    @property
    def dense_dtype(self) -> torch.dtype | None:
        """The dtype of dense matrices, or None where they are trellis planes."""
        return PLAIN_DTYPES.get(self.format)

    @property
    def part_names(self) -> tuple[str, ...]:
        """What each part of an expert is called in files and spans."""
        if self.format == "trellis":
            return tuple(f"plane{p}" for p in range(self.expert_planes))
        return (self.format,)

    def expert_format(self, spec: ModelSpec, *, n_planes: int | None = None) -> ExpertFormat:
        """How experts are packed; n_planes: fewer planes than are in the folder."""
        experts = spec.uniform_experts()
        sizes = spec.n_hidden, experts.n_inner
        if self.format == "trellis":
            planes = self.expert_planes if n_planes is None else n_planes
            return TrellisFormat(*sizes, planes, self.code, gated=experts.gated)
        if self.format == "nf4":
            return Nf4Format(*sizes, gated=experts.gated)
        return PlainFormat(*sizes, PLAIN_DTYPES[self.format], gated=experts.gated)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a span lies.  n_bytes counts its padding."""

    file: str
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class FolderLayout:
    """headers: the first bytes of every file; sizes: its length; places: every span by its name."""

    headers: Mapping[str, bytes]
    sizes: Mapping[str, int]
    places: Mapping[str, Place]

    @property
    def total_bytes(self) -> int:
        return sum(self.sizes.values())


def expert_span(layer_id: int, expert_id: int, part: str) -> str:
    """The name of the span that holds one part of one expert."""
    return f"layers.{layer_id}.experts.{expert_id}.{part}"


def matrix_tensors(
    name: str, n_out: int, n_in: int, recipe: Recipe, *, in_layer: bool
) -> Iterator[Described]:
    """The tensors that one dense matrix becomes.  in_layer: not the embedding or the head."""
    if recipe.dense_dtype is not None:
        yield name, recipe.dense_dtype, (n_out, n_in)
        return
    if recipe.format == "nf4" and in_layer:
        yield f"{name}.nf4", torch.uint8, (Nf4Layout(n_out, n_in).matrix_bytes,)
        return
    for plane in range(recipe.dense_planes):
        yield f"{name}.plane{plane}", torch.uint8, (PlaneLayout(n_out, n_in).plane_bytes,)
    yield f"{name}.d", torch.float16, (n_in,)


def dense_tensors(spec: ModelSpec, recipe: Recipe) -> Iterator[Described]:
    """Every tensor of dense.safetensors, in the order of the file."""
    yield from matrix_tensors("embedding", spec.n_vocab, spec.n_hidden, recipe, in_layer=False)
    for layer_id, layer in enumerate(spec.layers):
        prefix = f"layers.{layer_id}."
        for part in layer_parts(layer, spec):
            yield from part_tensors(prefix, part, recipe)
        yield from _transforms(prefix, layer.feed_forward, spec.n_hidden, recipe)
    for part in end_parts(spec):
        yield from part_tensors("", part, recipe)


def part_tensors(prefix: str, part: Part, recipe: Recipe) -> Iterator[Described]:
    """The tensors of a folder that one part becomes.  prefix: of its layer, "" for none."""
    if part.coded:
        assert part.n_columns is not None
        yield from matrix_tensors(
            prefix + part.name, part.n_rows, part.n_columns, recipe, in_layer=prefix != ""
        )
    else:
        yield prefix + part.name, torch.float32, part.shape


def _transforms(
    prefix: str, experts: ExpertsFeedForward, n_hidden: int, recipe: Recipe
) -> Iterator[Described]:
    if recipe.format == "trellis" and experts.n_experts:
        yield prefix + "experts.d_in", torch.float16, (n_hidden,)
        yield prefix + "experts.d_inner", torch.float16, (experts.n_experts, experts.n_inner)


def folder_layout(
    spec: ModelSpec, recipe: Recipe, *, max_file_bytes: int = MAX_EXPERT_FILE_BYTES
) -> FolderLayout:
    """The whole folder but for the small files that are copied into it."""
    dense = {name: (dtype, shape) for name, dtype, shape in dense_tensors(spec, recipe)}
    contents = {DENSE_FILE: dense}
    for part, n_bytes in zip(recipe.part_names, recipe.expert_format(spec).part_bytes, strict=True):
        padded = round_up(n_bytes, ALIGNMENT)
        spans = [
            expert_span(layer_id, expert_id, part)
            for layer_id, layer in enumerate(spec.layers)
            for expert_id in range(layer.feed_forward.n_experts)
        ]
        per_file = max(1, max_file_bytes // padded)
        for number, first in enumerate(range(0, len(spans), per_file), start=1):
            contents[f"experts-{part}-{number:05}.safetensors"] = {
                name: (torch.uint8, (padded,)) for name in spans[first : first + per_file]
            }
    return _place(contents)


def _place(
    contents: Mapping[str, Mapping[str, tuple[torch.dtype, tuple[int, ...]]]],
) -> FolderLayout:
    headers: dict[str, bytes] = {}
    sizes: dict[str, int] = {}
    places: dict[str, Place] = {}
    for file, tensors in contents.items():
        headers[file], entries = build_header(tensors, alignment=ALIGNMENT)
        places |= {n: Place(file, e.offset, e.n_bytes) for n, e in entries.items()}
        sizes[file] = len(headers[file]) + sum(e.n_bytes for e in entries.values())
    return FolderLayout(headers, sizes, places)
