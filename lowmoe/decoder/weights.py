"""Gathers the dense weights of a decoder: everything but the routed experts.

Knows:        which matrices a layer has, how they lie in a folder or a checkpoint.
Ignorant of:  what is computed with them.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowmoe.checkpoint.buffers import Arena
from lowmoe.checkpoint.folder import ModelFolder
from lowmoe.checkpoint.layout import dense_tensors
from lowmoe.checkpoint.tensors import CheckpointFiles
from lowmoe.errors import CheckpointError, UnsupportedModelError
from lowmoe.families import Family
from lowmoe.spec import ModelSpec, Part, Role, end_parts, layer_parts
from quant import nf4
from quant.layout import REGION_ALIGNMENT, PlaneLayout, round_up
from quant.matrix import Matrix, Nf4Matrix, TrellisMatrix

# Constants that follow from config.json, which some programs store all the same: of rope, and of
# lightning attention.
HARMLESS_SUFFIXES = (
    "rotary_emb.inv_freq",
    "self_attn.slope_rate",
    "self_attn.query_decay",
    "self_attn.key_decay",
    "self_attn.diagonal_decay",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTransforms:
    """The input transforms of a layer's experts; ones where the format has none.

    d_in: [H], shared by gate and up of all; d_inner: [E, I], each expert's own for down.
    """

    d_in: Tensor
    d_inner: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One layer.  parts: by name, what lowmoe/spec/parts.py lists for it."""

    parts: Mapping[str, Matrix]
    transforms: ExpertTransforms

    def vector(self, name: str) -> Tensor:
        """A part that is not coded."""
        found = self.parts[name]
        assert isinstance(found, Tensor), name
        return found

    def optional(self, name: str) -> Tensor | None:
        """The same, None where this kind of layer has no such part."""
        return self.vector(name) if name in self.parts else None

    @property
    def attention_norm(self) -> Tensor:
        """[H]."""
        return self.vector("attention_norm")

    @property
    def qkv(self) -> Matrix:
        """[q + k + v rows, H]."""
        return self.parts["qkv"]

    @property
    def attention_out(self) -> Matrix:
        """[H, q rows]."""
        return self.parts["attention_out"]

    @property
    def experts_norm(self) -> Tensor:
        """[H]."""
        return self.vector("experts_norm")

    @property
    def router(self) -> Tensor:
        """[E, H]."""
        return self.vector("router")


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseWeights:
    """embedding and head: [V, H], the same object where they are tied; final_norm: [H] and its
    bias; head_bias: [V]; positions: [context, H], where they are learned.
    """

    embedding: Matrix
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    head: Matrix
    final_norm_bias: Tensor | None = None
    head_bias: Tensor | None = None
    positions: Tensor | None = None

    @property
    def n_bytes(self) -> int:
        """Bytes of RAM all of it takes."""
        return _bytes(self._tensors())

    @property
    def bytes_per_token(self) -> int:
        """Bytes of it that are read for every token: an embedding, of which a token reads one row,
        counts where it is the head too.
        """
        embedding = 0 if self.embedding is self.head else _bytes(_matrix_tensors(self.embedding))
        return self.n_bytes - embedding

    def largest_piece(self) -> Tensor:
        """The memory that most of it lies in, as uint8: a folder's is one piece."""
        return _piece_of(max(self._tensors(), key=lambda t: t.untyped_storage().nbytes()))

    def at(self, place: torch.device) -> "DenseWeights":
        """The same in the memory of a device, what is one piece of memory here one piece there."""
        there = _There(place)
        embedding = there.matrix(self.embedding)
        tied = self.head is self.embedding
        return DenseWeights(
            embedding=embedding,
            layers=tuple(there.layer(layer) for layer in self.layers),
            final_norm=there.vector(self.final_norm),
            head=embedding if tied else there.matrix(self.head),
            final_norm_bias=there.optional(self.final_norm_bias),
            head_bias=there.optional(self.head_bias),
            positions=there.optional(self.positions),
        )

    def _tensors(self) -> list[Tensor]:
        found = [self.final_norm, *_matrix_tensors(self.embedding), *_matrix_tensors(self.head)]
        others = (self.final_norm_bias, self.head_bias, self.positions)
        found += [t for t in others if t is not None]
        for layer in self.layers:
            found += [layer.transforms.d_in, layer.transforms.d_inner]
            found += [t for part in layer.parts.values() for t in _matrix_tensors(part)]
        return found


def _bytes(tensors: Iterable[Tensor]) -> int:
    # Tensors that were expanded have fewer bytes than values; those of a folder share a storage.
    sizes = {t.data_ptr(): min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors}
    return sum(sizes.values())


def _piece_of(tensor: Tensor) -> Tensor:
    """The memory that it is a part of, as uint8."""
    return torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage())


class _There:
    """Copies to a device, of each piece of memory one.

    One for each matrix would cost hundreds of MB that nobody counts: torch takes memory of a GPU in
    pieces of 20 MiB for what has 1 to 10, and in multiples of 2 for what has more.
    """

    def __init__(self, place: torch.device) -> None:
        self._place = place
        self._pieces: dict[int, Tensor] = {}

    def vector(self, tensor: Tensor) -> Tensor:
        """A tensor's copy."""
        if not tensor.is_contiguous():  # of one number that was expanded
            return tensor.to(self._place)
        address = tensor.untyped_storage().data_ptr()
        if address not in self._pieces:
            self._pieces[address] = _piece_of(tensor).to(self._place)
        first = tensor.data_ptr() - address
        there = self._pieces[address][first : first + tensor.nbytes]
        return there.view(tensor.dtype).view(tensor.shape)

    def optional(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else self.vector(tensor)

    def matrix(self, matrix: Matrix) -> Matrix:
        if isinstance(matrix, TrellisMatrix):
            planes = tuple(self.vector(plane) for plane in matrix.planes)
            return replace(matrix, planes=planes, d=self.vector(matrix.d))
        if isinstance(matrix, Nf4Matrix):
            return replace(matrix, buffer=self.vector(matrix.buffer))
        return self.vector(matrix)

    def layer(self, layer: LayerWeights) -> LayerWeights:
        of = layer.transforms
        transforms = ExpertTransforms(d_in=self.vector(of.d_in), d_inner=self.vector(of.d_inner))
        parts = {name: self.matrix(part) for name, part in layer.parts.items()}
        return LayerWeights(parts=parts, transforms=transforms)


def _matrix_tensors(matrix: Matrix) -> tuple[Tensor, ...]:
    if isinstance(matrix, TrellisMatrix):
        return (*matrix.planes, matrix.d)
    return (matrix.buffer,) if isinstance(matrix, Nf4Matrix) else (matrix,)


def from_folder(folder: ModelFolder, spec: ModelSpec) -> DenseWeights:
    """Read a folder's dense weights into RAM, every byte and every size checked.

    Raises FolderError for tensors that are not what the config promises.
    """
    recipe = folder.recipe
    spans = folder.read_all(
        [name for name, *_ in dense_tensors(spec, recipe)], _arena_for(folder, spec)
    )

    def vector(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        return spans[name].view(dtype)

    def matrix(name: str, n_out: int, n_in: int) -> Matrix:
        if recipe.dense_dtype is not None:
            return spans[name].view(recipe.dense_dtype).view(n_out, n_in)
        if recipe.format == "nf4" and name.startswith("layers."):
            return Nf4Matrix(nf4.Nf4Layout(n_out, n_in), spans[f"{name}.nf4"])
        planes = tuple(spans[f"{name}.plane{p}"] for p in range(recipe.dense_planes))
        d = vector(f"{name}.d", torch.float16)
        return TrellisMatrix(PlaneLayout(n_out, n_in), recipe.code, planes, d)

    def kept(prefix: str, part: Part) -> Matrix:
        if not part.coded:
            return vector(prefix + part.name).view(part.shape)
        assert part.n_columns is not None
        return matrix(prefix + part.name, part.n_rows, part.n_columns)

    def layer(layer_id: int) -> LayerWeights:
        experts, prefix = spec.layers[layer_id].feed_forward, f"layers.{layer_id}."
        parts = {p.name: kept(prefix, p) for p in layer_parts(spec.layers[layer_id], spec)}
        transforms = no_transforms(spec.n_hidden, experts.n_experts, experts.n_inner)
        if recipe.format == "trellis" and experts.n_experts:
            d_inner = vector(prefix + "experts.d_inner", torch.float16)
            transforms = ExpertTransforms(
                d_in=vector(prefix + "experts.d_in", torch.float16),
                d_inner=d_inner.view(experts.n_experts, experts.n_inner),
            )
        return LayerWeights(parts=parts, transforms=transforms)

    return _dense(
        spec,
        embedding=matrix("embedding", spec.n_vocab, spec.n_hidden),
        layers=tuple(layer(i) for i in range(len(spec.layers))),
        ends={part.name: kept("", part) for part in end_parts(spec)},
    )


def _dense(
    spec: ModelSpec,
    *,
    embedding: Matrix,
    layers: tuple[LayerWeights, ...],
    ends: Mapping[str, Matrix],
) -> DenseWeights:
    vectors = {name: part for name, part in ends.items() if isinstance(part, Tensor)}
    return DenseWeights(
        embedding=embedding,
        layers=layers,
        final_norm=vectors["final_norm"],
        final_norm_bias=vectors.get("final_norm_bias"),
        head=embedding if spec.tied_head else ends["head"],
        head_bias=vectors.get("head_bias"),
        positions=vectors.get("positions"),
    )


def _arena_for(folder: ModelFolder, spec: ModelSpec) -> Arena:
    """Room for all dense tensors, once each has the size that its place in the model needs."""
    total = 0
    for name, dtype, shape in dense_tensors(spec, folder.recipe):
        n_bytes = dtype.itemsize * math.prod(shape)
        folder.require_bytes(name, n_bytes)
        total += round_up(n_bytes, REGION_ALIGNMENT)
    return Arena(total)


def no_transforms(n_hidden: int, n_experts: int, n_inner: int) -> ExpertTransforms:
    """Transforms that change nothing and take no memory."""
    one = torch.ones(1, dtype=torch.float16)
    return ExpertTransforms(d_in=one.expand(n_hidden), d_inner=one.expand(n_experts, n_inner))


class CheckpointTensors:
    """Tensors of a checkpoint by role, checked against the shape the config promises."""

    def __init__(self, checkpoint: CheckpointFiles, family: Family) -> None:
        """Raises CheckpointError where the names of the tensors contradict the config."""
        self.checkpoint, self.family = checkpoint, family.as_found(checkpoint.names())
        self._check_names()
        pieces = (self.family.piece(role) for role in self.family.shapes)
        checkpoint.check_shapes({piece.name: piece.shape for piece in pieces})

    def _check_names(self) -> None:
        stored, found = self.checkpoint.stored, self.checkpoint.names()
        wanted = {n for role in self.family.shapes for n in stored(self.family.tensor_name(role))}
        if missing := sorted(wanted - found):
            raise CheckpointError(
                f"{self.checkpoint.folder}: {len(missing)} tensors that the model is described to "
                f"have are missing, {missing[0]} among them. Its files are incomplete or of "
                "different models; download them again."
            )
        # A tied head may be stored all the same.
        harmless = set(stored(self.family.tensor_name(Role("head"))))
        extra = sorted(
            n
            for n in found - wanted - harmless
            if not n.endswith(HARMLESS_SUFFIXES)
            and not n.startswith(self.family.ignored)
            and not self.checkpoint.ignores(n)
        )
        if extra:
            model_type = self.family.spec.model_type
            raise UnsupportedModelError(
                f"{self.checkpoint.folder}: {len(extra)} tensors that a {model_type} does not "
                f"have, {extra[0]} among them. This variant is not implemented."
            )

    def read(self, name: str) -> Tensor:
        """The tensor of a role that is no layer's, in the dtype of the file."""
        return self._read(Role(name))

    def positions(self) -> Tensor:
        """Those that are learned, [context, H] float32."""
        (part,) = (p for p in end_parts(self.family.spec) if p.name == "positions")
        return self.part(part, None, torch.float32)

    def _read(self, role: Role) -> Tensor:
        return self.checkpoint.read_piece(self.family.piece(role))

    def part(self, part: Part, layer_id: int | None, dtype: torch.dtype) -> Tensor:
        """A part, unquantized: of dtype where a folder would code it, else float32."""
        dtype = dtype if part.coded else torch.float32
        rows = torch.cat([self._read(role).to(dtype) for role, _ in part.roles(layer_id)])
        return rows.view(part.shape)

    def layer(self, layer_id: int, dtype: torch.dtype) -> LayerWeights:
        """One layer, unquantized."""
        spec = self.family.spec
        layer = spec.layers[layer_id]
        experts = layer.feed_forward
        return LayerWeights(
            parts={p.name: self.part(p, layer_id, dtype) for p in layer_parts(layer, spec)},
            transforms=no_transforms(spec.n_hidden, experts.n_experts, experts.n_inner),
        )


def from_checkpoint(tensors: CheckpointTensors, dtype: torch.dtype) -> DenseWeights:
    """Read a checkpoint's dense weights into RAM, unquantized."""
    spec = tensors.family.spec
    return _dense(
        spec,
        embedding=tensors.read("embedding").to(dtype),
        layers=tuple(tensors.layer(i, dtype) for i in range(len(spec.layers))),
        ends={part.name: tensors.part(part, None, dtype) for part in end_parts(spec)},
    )
