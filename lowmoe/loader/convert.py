"""Streams a checkpoint's layers into a model folder.

For each layer: take the calibration tokens through it, code its dense matrices, code its experts
one by one, keep the tokens' hidden states on disk. A killed run goes on inside the layer.

Knows:        the order of work, which spans each step makes, what may be skipped.
Ignorant of:  where shards come from, text, how bits are chosen, crash safety of files.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from lowmoe.checkpoint.layout import Recipe, expert_span, folder_layout
from lowmoe.checkpoint.manifest import Calibration, Manifest, Source, Span
from lowmoe.checkpoint.popularity import POPULARITY, popularity_json
from lowmoe.checkpoint.writer import FolderWriter, small_file_table
from lowmoe.decoder.weights import CheckpointTensors, LayerWeights
from lowmoe.errors import CheckpointError
from lowmoe.experts.source import CheckpointExperts
from lowmoe.loader.calibrate import CalibrationRun, LayerMoments, column_rms, rms_of
from lowmoe.spec import Role, end_parts, layer_parts
from quant import nf4
from quant.encode import Encode
from quant.expert import NO_COVARIANCES, InputCovariances
from quant.layout import PlaneLayout
from quant.transform import channel_factors

# Matrices that are kept in float32.
UNCODED = (
    "router",
    "shared_router",
    "positions",
    "delta_correction",
    "delta_decay",
    "delta_taps",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationText:
    """Token sequences to calibrate on.  text_hash: of the text they came from."""

    sequences: tuple[Tensor, ...]
    text_hash: str

    @property
    def n_tokens(self) -> int:
        return sum(s.shape[0] for s in self.sequences)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a conversion is, in weights coded."""

    done: int
    total: int


class Conversion:
    """One conversion, from construction to `run`."""

    def __init__(
        self,
        tensors: CheckpointTensors,
        folder: Path,
        recipe: Recipe,
        *,
        source: Source,
        small_files: Mapping[str, bytes],
        calibration: CalibrationText | None,
        encode: Encode,
        progress: Callable[[Progress], None],
    ) -> None:
        """folder: to be made or gone on with.  calibration: None codes all channels alike.

        encode: must make the same planes of the same weights in every run that goes on.
        """
        self._tensors, self._folder, self._recipe = tensors, folder, recipe
        self._family, self._spec = tensors.family, tensors.family.spec
        if source.commit is None:
            source = replace(source, sample=tensors.checkpoint.sample_hash())
        self._source, self._small_files, self._calibration = source, dict(small_files), calibration
        self._encode, self._progress = encode, progress
        self._done, self._total = 0, _coded_weights(self._family.shapes)
        self._experts = CheckpointExperts(tensors.checkpoint, self._family, torch.float32)
        self._format = recipe.expert_format(self._spec)
        self._run: CalibrationRun | None = None

    def run(self) -> None:
        """Make the folder, or what is missing of it.

        Raises FolderError where it holds something else, or the unfinished part of it;
        DiskSpaceError; CheckpointError for weights that contradict the config.
        """
        layout, identity = folder_layout(self._spec, self._recipe), self._manifest({}).identity()
        writer = FolderWriter(self._folder, layout, identity, state_bytes=self._state_bytes())
        if writer.finished:
            writer.require_same_model(identity)
            return
        with writer as self._writer:
            first = self._begin()
            for layer_id in range(first, len(self._spec.layers)):
                self._layer(layer_id)
            self._ends()
            self._small_files |= self._popularity()
            self._writer.finish(self._manifest(self._writer.spans()), self._small_files)

    def _popularity(self) -> dict[str, bytes]:
        """Where calibration tokens went, if all layers were counted: older versions did not."""
        notes, n_layers = self._writer.notes, len(self._spec.layers)
        counts = [notes[i] for i in range(1, n_layers + 1) if notes.get(i) is not None]
        if self._calibration is None or len(counts) < n_layers:
            return {}
        return {POPULARITY: popularity_json(counts, self._calibration.n_tokens)}

    def _state_bytes(self) -> int:
        n_tokens = 0 if self._calibration is None else self._calibration.n_tokens
        return n_tokens * self._spec.n_hidden * torch.float32.itemsize

    def _manifest(self, spans: Mapping[str, Span]) -> Manifest:
        calibration = None
        if text := self._calibration:
            calibration = Calibration(n_tokens=text.n_tokens, text_hash=text.text_hash)
        return Manifest(
            config=self._tensors.checkpoint.config,
            source=self._source,
            recipe=self._recipe,
            calibration=calibration,
            small_files=small_file_table(self._small_files),
            spans=spans,
        )

    # --- where to go on

    def _begin(self) -> int:
        """Code the embedding, set up calibration; returns the first layer that is not done."""
        self._forget_all_but_roles()
        if self._calibration is None:
            first = self._first_unfinished_layer()
        else:
            first = self._resume_calibration()
        # Rows of an embedding are looked up: no activations weigh their errors. One that is the
        # head too is coded likewise: weighed for the head, look-ups lose more than the head gains.
        self._whole_matrix("embedding", None)
        for layer_id in range(first):
            self._tick(self._forget_layer(layer_id))
        return first

    def _first_unfinished_layer(self) -> int:
        for layer_id in range(len(self._spec.layers)):
            if not self._writer.has(*self._layer_spans(layer_id)):
                return layer_id
        return len(self._spec.layers)

    def _layer_spans(self, layer_id: int) -> list[str]:
        prefix = f"layers.{layer_id}."
        return [name for name in self._writer.layout.places if name.startswith(prefix)]

    def _resume_calibration(self) -> int:
        assert self._calibration is not None
        lengths = [s.shape[0] for s in self._calibration.sequences]
        state = self._writer.load_state()
        if state is None:
            embedding = self._tensors.read("embedding")
            ids = torch.cat(list(self._calibration.sequences))
            hidden, first = embedding[ids].float() * self._spec.embedding_scale, 0
            if self._spec.learned_positions:
                positions = self._tensors.positions()
                hidden += torch.cat([positions[:length] for length in lengths])
            self._save_state(0, hidden)  # the embedding's shard may go before layer 0 is done
        else:
            first, data = state
            # Copied to where torch aligns it: the same kernels must see it as in an unbroken run.
            hidden = torch.frombuffer(bytearray(data), dtype=torch.float32).clone()
            hidden = hidden.view(-1, self._spec.n_hidden)
        self._run = CalibrationRun(hidden, lengths, self._spec)
        return first

    # --- the steps

    def _layer(self, layer_id: int) -> None:
        moments = self._all_but_experts(layer_id)
        d_in, d_inner = self._expert_transforms(layer_id)
        for expert_id in range(self._spec.layers[layer_id].feed_forward.n_experts):
            inputs = NO_COVARIANCES
            if moments is not None:
                inputs = InputCovariances(gate_up=moments.experts_in, down=moments.inner[expert_id])
            self._expert(layer_id, expert_id, d_in, d_inner[expert_id], inputs)
        if self._run is not None:
            assert moments is not None
            self._save_state(layer_id + 1, self._run.hidden, moments.counts.tolist())
        self._forget_layer(layer_id)

    def _all_but_experts(self, layer_id: int) -> LayerMoments | None:
        """Take the calibration tokens through a layer and code its dense matrices."""
        weights = self._tensors.layer(layer_id, torch.float32)
        moments = None
        if self._run is not None:
            experts = _Experts(self._experts, layer_id)
            with self._naming(f"layers.{layer_id}"):
                moments = self._run.through_layer(layer_id, weights, experts)
        self._dense_spans(layer_id, weights, moments)
        return moments

    def _save_state(self, step: int, hidden: Tensor, counts: list[int] | None = None) -> None:
        """counts: of the tokens of each expert in the layer before this step."""
        self._writer.save_state(step, hidden.numpy().tobytes(), counts)

    def _dense_spans(
        self, layer_id: int, weights: LayerWeights, moments: LayerMoments | None
    ) -> None:
        """Everything of a layer but its experts, in one commit."""
        prefix = f"layers.{layer_id}."
        layer = self._spec.layers[layer_id]
        names = [n for n in self._layer_spans(layer_id) if not n.startswith(prefix + "experts.")]
        transforms = [prefix + "experts.d_in", prefix + "experts.d_inner"]
        transformed = self._recipe.format == "trellis" and layer.feed_forward.n_experts > 0
        names += transforms if transformed else []
        parts = list(layer_parts(layer, self._spec))
        n_dense = _n_weights(weights.parts[p.name] for p in parts if p.coded)
        if self._writer.has(*names):
            self._tick(n_dense)
            return
        spans: dict[str, Tensor] = {}
        for part in parts:
            matrix = weights.parts[part.name]
            assert isinstance(matrix, Tensor)
            if part.coded:
                heard = moments.dense[part.name] if moments else None
                spans |= self._matrix_spans(prefix + part.name, matrix, heard)
            else:
                spans[prefix + part.name] = matrix
        if transformed:
            spans |= self._transform_spans(layer_id, moments)
        self._writer.commit(spans)
        self._tick(n_dense)

    def _transform_spans(self, layer_id: int, moments: LayerMoments | None) -> dict[str, Tensor]:
        prefix = f"layers.{layer_id}.experts."
        experts = self._spec.layers[layer_id].feed_forward
        d_in = channel_factors(
            rms_of(moments.experts_in) if moments else None,
            moments.gate_up_columns if moments else torch.ones(self._spec.n_hidden),
            seed=_seed(prefix + "d_in"),
        )
        d_inner = [
            channel_factors(
                rms_of(moments.inner[e]) if moments else None,
                moments.down_columns[e] if moments else torch.ones(experts.n_inner),
                seed=_seed(f"{prefix}{e}.d_inner"),
            )
            for e in range(experts.n_experts)
        ]
        return {prefix + "d_in": d_in, prefix + "d_inner": torch.stack(d_inner)}

    def _expert_transforms(self, layer_id: int) -> tuple[Tensor, Tensor]:
        """What was committed, so that a resumed run codes all experts of a layer alike."""
        experts = self._spec.layers[layer_id].feed_forward
        if self._recipe.format != "trellis" or not experts.n_experts:
            none = torch.ones(1, dtype=torch.float16)
            return none, none.expand(experts.n_experts, 1)
        prefix = f"layers.{layer_id}.experts."
        d_inner = self._writer.read(prefix + "d_inner", torch.float16)
        return (
            self._writer.read(prefix + "d_in", torch.float16),
            d_inner.view(experts.n_experts, experts.n_inner),
        )

    def _expert(
        self,
        layer_id: int,
        expert_id: int,
        d_in: Tensor,
        d_inner: Tensor,
        inputs: InputCovariances,
    ) -> None:
        spans = [expert_span(layer_id, expert_id, part) for part in self._recipe.part_names]
        if not self._writer.has(*spans):
            matrices = self._experts.read_matrices(layer_id, expert_id)
            with self._naming(f"layers.{layer_id}.experts.{expert_id}"):
                parts = self._format.pack(
                    *matrices, d_in, d_inner, encode=self._encode, inputs=inputs
                )
            self._writer.commit(dict(zip(spans, parts, strict=True)))
        experts = self._spec.uniform_experts()
        self._tick(experts.n_matrices * self._spec.n_hidden * experts.n_inner)

    def _ends(self) -> None:
        """What comes after the layers: the final norm, the head where it is not the embedding."""
        for part in end_parts(self._spec):
            if part.coded:
                self._whole_matrix(part.name, self._head_covariance())
                continue
            if not self._writer.has(part.name):
                self._writer.commit({part.name: self._tensors.part(part, None, torch.float32)})
            self._forget(role for role, _ in part.roles(None))

    def _head_covariance(self) -> Tensor | None:
        if self._run is None:
            return None
        weight = self._writer.read("final_norm", torch.float32)
        bias = None
        if self._spec.norm_bias:
            bias = self._writer.read("final_norm_bias", torch.float32)
        return self._run.head_covariance(weight, bias)

    def _whole_matrix(self, name: str, covariance: Tensor | None) -> None:
        """An embedding or a head."""
        names = [n for n in self._writer.layout.places if n.split(".")[0] == name]
        if not self._writer.has(*names):
            matrix = self._tensors.read(name)
            self._writer.commit(self._matrix_spans(name, matrix, covariance))
        self._tick(self._spec.n_vocab * self._spec.n_hidden)
        self._forget([Role(name)])

    def _matrix_spans(
        self, name: str, matrix: Tensor, covariance: Tensor | None
    ) -> dict[str, Tensor]:
        recipe = self._recipe
        if recipe.dense_dtype is not None:
            return {name: matrix.to(recipe.dense_dtype)}
        if recipe.format == "nf4" and name.startswith("layers."):
            return {f"{name}.nf4": nf4.encode(matrix)}
        heard = None if covariance is None else rms_of(covariance)
        d = channel_factors(heard, column_rms(matrix), seed=_seed(name))
        layout = PlaneLayout(*matrix.shape)
        with self._naming(name):
            planes = self._encode(matrix, d, layout, recipe.code, recipe.dense_planes, covariance)
        return {f"{name}.plane{p}": plane for p, plane in enumerate(planes)} | {f"{name}.d": d}

    @contextlib.contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Say which weights cannot be coded or calibrated with."""
        try:
            yield
        except ValueError as e:
            raise CheckpointError(
                f"{self._tensors.checkpoint.folder}: {name}: {e}. The checkpoint is damaged or was "
                "trained to pieces; download it again or choose another."
            ) from e

    # --- bookkeeping

    def _forget_layer(self, layer_id: int) -> int:
        """Let shards go that held only this layer and earlier ones; returns its weights."""
        roles = {r: s for r, s in self._family.shapes.items() if r.layer_id == layer_id}
        self._forget(roles)
        return _coded_weights(roles)

    def _forget_all_but_roles(self) -> None:
        """Tensors nobody reads, such as a tied head that is stored all the same."""
        checkpoint, name = self._tensors.checkpoint, self._family.tensor_name
        wanted = {n for role in self._family.shapes for n in checkpoint.stored(name(role))}
        checkpoint.forget(checkpoint.names() - wanted)

    def _forget(self, roles: Iterable[Role]) -> None:
        self._tensors.checkpoint.forget(self._family.tensor_name(role) for role in roles)

    def _tick(self, n_weights: int) -> None:
        self._done += n_weights
        self._progress(Progress(done=self._done, total=self._total))


@dataclass(frozen=True, slots=True)
class _Experts:
    """The experts of one layer of a checkpoint."""

    source: CheckpointExperts
    layer_id: int

    def matrices(self, expert_id: int) -> tuple[Tensor | None, Tensor, Tensor]:
        return self.source.read_matrices(self.layer_id, expert_id)


def _coded_weights(shapes: Mapping[Role, tuple[int, ...]]) -> int:
    """Weights of these tensors that are coded: those of matrices, but for some."""
    return sum(s[0] * s[1] for r, s in shapes.items() if len(s) == 2 and r.name not in UNCODED)


def _n_weights(matrices: Iterable[object]) -> int:
    return sum(m.numel() for m in matrices if isinstance(m, Tensor))


def _seed(name: str) -> int:
    """Signs of their own for every matrix, the same at every run."""
    return xxhash.xxh3_64_intdigest(name.encode()) >> 1
