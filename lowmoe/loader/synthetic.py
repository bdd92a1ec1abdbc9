"""Model folders of random codes in the real layout: a model's speed without its weights.

The bytes of a span come from its name alone. So a folder that was interrupted becomes the one it
would have been, and any number of writers of the same folder write the same bytes.

Knows:        a model's shape, which bytes make sane weights.
Ignorant of:  any real weights.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from lowmoe.checkpoint.layout import Recipe, folder_layout
from lowmoe.checkpoint.manifest import Manifest, Source, Span
from lowmoe.checkpoint.writer import FolderWriter
from lowmoe.families import Family
from lowmoe.spec import ModelSpec, Part, end_parts, layer_parts
from quant.expert import TrellisFormat
from quant.layout import MAX_PLANES, PlaneLayout

# Each plane codes about a twelfth of the energy of the one before it.
PLANE_RATIO = 0.28


def write_synthetic(
    folder: Path,
    config: Mapping[str, Any],
    family: Family,
    recipe: Recipe,
    *,
    name: str,
    progress: Callable[[int, int], None],
) -> None:
    """Write a folder of a model of this shape.  progress: spans done and in all."""
    assert recipe.format == "trellis"
    layout = folder_layout(family.spec, recipe)

    def manifest(spans: Mapping[str, Span]) -> Manifest:
        return Manifest(
            config=config,
            source=Source(name=name, commit=None),
            recipe=recipe,
            calibration=None,
            small_files={},
            spans=spans,
        )

    identity = manifest({}).identity()
    with FolderWriter(folder, layout, identity) as w:
        if w.finished:
            w.require_same_model(identity)
            return
        make = span_maker(family, recipe)
        total = len(layout.places)
        for done, span in enumerate(layout.places, start=1):
            if not w.has(span):
                w.commit({span: make(span)})
            progress(done, total)
        w.finish(manifest(w.spans()), {})


def span_maker(family: Family, recipe: Recipe) -> Callable[[str], Tensor]:
    """What makes each span of such a folder, by its name."""
    makers, expert = _makers(family), recipe.expert_format(family.spec)
    assert isinstance(expert, TrellisFormat)
    matrices = [expert.gate_up, expert.down]

    def plane(span: str) -> Tensor:
        return _random_planes(matrices, span)

    return lambda span: makers.get(span, plane)(span)


def _random(span: str) -> np.random.Generator:
    """Numbers of its own for every span, the same at every run."""
    return np.random.Generator(np.random.SFC64(xxhash.xxh3_64_intdigest(span.encode())))


def _makers(family: Family) -> dict[str, Callable[[str], Tensor]]:
    """What makes each span that is no expert's plane, by its name."""
    spec = family.spec
    makers = _matrix_makers("embedding", spec.n_vocab, spec.n_hidden, spread=_spread(spec))
    for layer_id, layer in enumerate(spec.layers):
        prefix, experts = f"layers.{layer_id}.", layer.feed_forward
        for part in layer_parts(layer, spec):
            makers |= _part_makers(prefix, part)
        if experts.n_experts:
            makers[prefix + "experts.d_in"] = _constant(spec.n_hidden, torch.float16)
            makers[prefix + "experts.d_inner"] = _constant(
                experts.n_experts * experts.n_inner, torch.float16
            )
    for part in end_parts(spec):
        makers |= _part_makers("", part)
    return makers


def _spread(spec: ModelSpec) -> float:
    """Embeddings of spread 1, as layers' outputs have: what attention adds is alike for all tokens,
    and would send them to the same experts if they differed by less. Not where the embedding is the
    head too, whose scores would be as much too large.
    """
    return 1.0 if spec.tied_head else spec.n_hidden**0.5


def _part_makers(prefix: str, part: Part) -> dict[str, Callable[[str], Tensor]]:
    name = prefix + part.name
    if part.coded:
        assert part.n_columns is not None
        return _matrix_makers(name, part.n_rows, part.n_columns)
    if part.n_columns is not None:
        return {name: lambda span: _normal(span, part.shape)}
    is_norm = part.name.endswith("norm")
    return {name: _constant(math.prod(part.shape), torch.float32, 1.0 if is_norm else 0.0)}


def _matrix_makers(
    name: str, n_out: int, n_in: int, *, spread: float = 1.0
) -> dict[str, Callable[[str], Tensor]]:
    layout = PlaneLayout(n_out, n_in)
    makers: dict[str, Callable[[str], Tensor]] = {
        f"{name}.plane{p}": lambda span: _random_planes([layout], span, spread)
        for p in range(MAX_PLANES)
    }
    return makers | {f"{name}.d": _constant(n_in, torch.float16)}


def _constant(count: int, dtype: torch.dtype, value: float = 1.0) -> Callable[[str], Tensor]:
    return lambda span: torch.full((count,), value, dtype=dtype)


def _normal(span: str, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(_random(span).standard_normal(shape, dtype=np.float32))


def _random_planes(layouts: Iterable[PlaneLayout], span: str, spread: float = 1.0) -> Tensor:
    """One plane of several matrices, one after the other; which one, the span's name ends in."""
    random = _random(span)
    return torch.cat([_random_plane(layout, int(span[-1]), random, spread) for layout in layouts])


def _random_plane(
    layout: PlaneLayout, plane: int, random: np.random.Generator, spread: float
) -> Tensor:
    """A plane whose weights have an rms of about 1 / sqrt(n_in): activations stay finite."""
    data = torch.from_numpy(np.frombuffer(random.bytes(layout.plane_bytes), dtype=np.uint8).copy())
    scale = spread * PLANE_RATIO**plane / layout.n_in**0.5
    end = layout.gain_offset
    data[layout.row_scale_offset : end].view(torch.float16).fill_(scale)
    data[end : end + 4].view(torch.float32).fill_(1.0)
    return data
