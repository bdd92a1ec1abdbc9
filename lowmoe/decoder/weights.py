"""Gathers the dense weights of a decoder: everything but the routed experts.

Knows:        which matrices a layer has, how they lie in a folder or a checkpoint.
Ignorant of:  what is computed with them.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowmoe.checkpoint.buffers import Arena
from lowmoe.checkpoint.folder import ModelFolder
from lowmoe.checkpoint.layout import dense_tensors
from lowmoe.checkpoint.reader import Checkpoint
from lowmoe.errors import CheckpointError, UnsupportedModelError
from lowmoe.families import Family
from lowmoe.spec import ModelSpec, Role, checkpoint_tensors
from quant import nf4
from quant.layout import REGION_ALIGNMENT, PlaneLayout, round_up
from quant.matrix import Matrix, Nf4Matrix, TrellisMatrix

HARMLESS_SUFFIX = "rotary_emb.inv_freq"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTransforms:
    """The input transforms of a layer's experts; ones where the format has none.

    d_in: [H], shared by gate and up of all; d_inner: [E, I], each expert's own for down.
    """

    d_in: Tensor
    d_inner: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One layer.  qkv: [q + k + v rows, H]; attention_out: [H, q rows]; router: [E, H]."""

    attention_norm: Tensor
    qkv: Matrix
    attention_out: Matrix
    experts_norm: Tensor
    router: Tensor
    transforms: ExpertTransforms


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseWeights:
    """embedding and head: [V, H], the same object where they are tied; final_norm: [H]."""

    embedding: Matrix
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    head: Matrix

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

    def at(self, place: torch.device) -> "DenseWeights":
        """The same in the memory of a device."""
        embedding = _matrix_at(self.embedding, place)
        tied = self.head is self.embedding
        return DenseWeights(
            embedding=embedding,
            layers=tuple(_layer_at(layer, place) for layer in self.layers),
            final_norm=self.final_norm.to(place),
            head=embedding if tied else _matrix_at(self.head, place),
        )

    def _tensors(self) -> list[Tensor]:
        found = [self.final_norm, *_matrix_tensors(self.embedding), *_matrix_tensors(self.head)]
        for layer in self.layers:
            found += [layer.attention_norm, layer.experts_norm, layer.router]
            found += [layer.transforms.d_in, layer.transforms.d_inner]
            found += [*_matrix_tensors(layer.qkv), *_matrix_tensors(layer.attention_out)]
        return found


def _bytes(tensors: Iterable[Tensor]) -> int:
    # Tensors that were expanded have fewer bytes than values; those of a folder share a storage.
    sizes = {t.data_ptr(): min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors}
    return sum(sizes.values())


def _layer_at(layer: LayerWeights, place: torch.device) -> LayerWeights:
    transforms = ExpertTransforms(
        d_in=layer.transforms.d_in.to(place), d_inner=layer.transforms.d_inner.to(place)
    )
    return LayerWeights(
        attention_norm=layer.attention_norm.to(place),
        qkv=_matrix_at(layer.qkv, place),
        attention_out=_matrix_at(layer.attention_out, place),
        experts_norm=layer.experts_norm.to(place),
        router=layer.router.to(place),
        transforms=transforms,
    )


def _matrix_at(matrix: Matrix, place: torch.device) -> Matrix:
    if isinstance(matrix, TrellisMatrix):
        planes = tuple(plane.to(place) for plane in matrix.planes)
        return replace(matrix, planes=planes, d=matrix.d.to(place))
    if isinstance(matrix, Nf4Matrix):
        return replace(matrix, buffer=matrix.buffer.to(place))
    return matrix.to(place)


def _matrix_tensors(matrix: Matrix) -> tuple[Tensor, ...]:
    if isinstance(matrix, TrellisMatrix):
        return (*matrix.planes, matrix.d)
    return (matrix.buffer,) if isinstance(matrix, Nf4Matrix) else (matrix,)


def from_folder(folder: ModelFolder, spec: ModelSpec) -> DenseWeights:
    """Read a folder's dense weights into RAM, every byte and every size checked.

    Raises FolderError for tensors that are not what the config promises.
    """
    recipe = folder.recipe
    arena = _arena_for(folder, spec)

    def vector(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        return folder.read(name, arena).view(dtype)

    def matrix(name: str, n_out: int, n_in: int) -> Matrix:
        if recipe.dense_dtype is not None:
            return folder.read(name, arena).view(recipe.dense_dtype).view(n_out, n_in)
        if recipe.format == "nf4" and name.startswith("layers."):
            return Nf4Matrix(nf4.Nf4Layout(n_out, n_in), folder.read(f"{name}.nf4", arena))
        planes = tuple(folder.read(f"{name}.plane{p}", arena) for p in range(recipe.dense_planes))
        d = vector(f"{name}.d", torch.float16)
        return TrellisMatrix(PlaneLayout(n_out, n_in), recipe.code, planes, d)

    def layer(layer_id: int) -> LayerWeights:
        attention, experts = spec.layers[layer_id].attention, spec.layers[layer_id].feed_forward
        prefix = f"layers.{layer_id}."
        qkv_size = attention.q_size + 2 * attention.kv_size
        transforms = no_transforms(spec.n_hidden, experts.n_experts, experts.n_inner)
        if recipe.format == "trellis":
            d_inner = vector(prefix + "experts.d_inner", torch.float16)
            transforms = ExpertTransforms(
                d_in=vector(prefix + "experts.d_in", torch.float16),
                d_inner=d_inner.view(experts.n_experts, experts.n_inner),
            )
        return LayerWeights(
            attention_norm=vector(prefix + "attention_norm"),
            qkv=matrix(prefix + "qkv", qkv_size, spec.n_hidden),
            attention_out=matrix(prefix + "attention_out", spec.n_hidden, attention.q_size),
            experts_norm=vector(prefix + "experts_norm"),
            router=vector(prefix + "router").view(experts.n_experts, spec.n_hidden),
            transforms=transforms,
        )

    embedding = matrix("embedding", spec.n_vocab, spec.n_hidden)
    return DenseWeights(
        embedding=embedding,
        layers=tuple(layer(i) for i in range(len(spec.layers))),
        final_norm=vector("final_norm"),
        head=embedding if spec.tied_head else matrix("head", spec.n_vocab, spec.n_hidden),
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

    def __init__(self, checkpoint: Checkpoint, family: Family) -> None:
        """Raises CheckpointError where the names of the tensors contradict the config."""
        self.checkpoint, self.family = checkpoint, family
        self._shapes = dict(checkpoint_tensors(family.spec))
        self._check_names()
        named = {family.tensor_name(role): shape for role, shape in self._shapes.items()}
        checkpoint.check_shapes(named)

    def _check_names(self) -> None:
        wanted = {self.family.tensor_name(role) for role in self._shapes}
        found = self.checkpoint.names()
        if missing := sorted(wanted - found):
            raise CheckpointError(
                f"{self.checkpoint.folder}: {len(missing)} tensors that config.json promises are "
                f"missing, {missing[0]} among them. The weights and config.json look like "
                "different models; download both again."
            )
        # A tied head may be stored all the same; older conversions stored rope's constants.
        harmless = {self.family.tensor_name(Role("head"))}
        extra = sorted(n for n in found - wanted - harmless if not n.endswith(HARMLESS_SUFFIX))
        if extra:
            model_type = self.family.spec.model_type
            raise UnsupportedModelError(
                f"{self.checkpoint.folder}: {len(extra)} tensors that a {model_type} does not "
                f"have, {extra[0]} among them. This variant is not implemented."
            )

    def read(self, name: str, layer_id: int | None = None) -> Tensor:
        """The tensor of a role that is not an expert's, in the dtype of the file."""
        role = Role(name, layer_id)
        return self.checkpoint.read(self.family.tensor_name(role), self._shapes[role])

    def layer(self, layer_id: int, dtype: torch.dtype) -> LayerWeights:
        """One layer, unquantized."""
        experts = self.family.spec.layers[layer_id].feed_forward

        def read(name: str) -> Tensor:
            return self.read(name, layer_id)

        return LayerWeights(
            attention_norm=read("attention_norm").float(),
            qkv=torch.cat([read(name).to(dtype) for name in ("q", "k", "v")]),
            attention_out=read("attention_out").to(dtype),
            experts_norm=read("experts_norm").float(),
            router=read("router").float(),
            transforms=no_transforms(self.family.spec.n_hidden, experts.n_experts, experts.n_inner),
        )


def from_checkpoint(tensors: CheckpointTensors, dtype: torch.dtype) -> DenseWeights:
    """Read a checkpoint's dense weights into RAM, unquantized."""
    spec = tensors.family.spec
    embedding = tensors.read("embedding").to(dtype)
    return DenseWeights(
        embedding=embedding,
        layers=tuple(tensors.layer(i, dtype) for i in range(len(spec.layers))),
        final_norm=tensors.read("final_norm").float(),
        head=embedding if spec.tied_head else tensors.read("head").to(dtype),
    )
