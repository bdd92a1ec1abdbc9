"""Model folders of random codes in the real layout: a model's speed without its weights.

The bytes of a span come from its name alone. So a folder that was interrupted becomes the one it
would have been, and any number of writers of the same folder write the same bytes.

Knows:        a model's shape, which bytes make sane weights.
Ignorant of:  any real weights.
"""

from collections.abc import Callable, Mapping
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
from quant.expert import TrellisFormat
from quant.layout import PlaneLayout

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
        makers = _makers(family, recipe)
        total = len(layout.places)
        for done, span in enumerate(layout.places, start=1):
            if not w.has(span):
                w.commit({span: makers[_kind(span)](span)})
            progress(done, total)
        w.finish(manifest(w.spans()), {})


def _kind(span: str) -> str:
    """The name of a span without its layer, expert and plane."""
    words = [w for w in span.split(".") if not w.isdigit() and w != "layers"]
    return ".".join(w for w in words if not w.startswith("plane"))


def _random(span: str) -> np.random.Generator:
    """Numbers of its own for every span, the same at every run."""
    return np.random.Generator(np.random.SFC64(xxhash.xxh3_64_intdigest(span.encode())))


def _makers(family: Family, recipe: Recipe) -> dict[str, Callable[[str], Tensor]]:
    spec = family.spec
    layer = spec.layers[0]
    attention, experts = layer.attention, layer.feed_forward
    expert = recipe.expert_format(spec)
    assert isinstance(expert, TrellisFormat)

    def plane(*layouts: PlaneLayout, spread: float = 1.0) -> Callable[[str], Tensor]:
        def make(span: str) -> Tensor:
            random = _random(span)
            return torch.cat(
                [_random_plane(layout, int(span[-1]), random, spread) for layout in layouts]
            )

        return make

    def ones(count: int, dtype: torch.dtype) -> Callable[[str], Tensor]:
        return lambda span: torch.ones(count, dtype=dtype)

    def router(span: str) -> Tensor:
        shape = (experts.n_experts, spec.n_hidden)
        scores = _random(span).standard_normal(shape, dtype=np.float32)
        return torch.from_numpy(scores)

    qkv = PlaneLayout(attention.q_size + 2 * attention.kv_size, spec.n_hidden)
    out = PlaneLayout(spec.n_hidden, attention.q_size)
    words = PlaneLayout(spec.n_vocab, spec.n_hidden)
    makers: dict[str, Callable[[str], Tensor]] = {
        "experts": plane(expert.gate_up, expert.down),
        "experts.d_in": ones(spec.n_hidden, torch.float16),
        "experts.d_inner": ones(experts.n_experts * experts.n_inner, torch.float16),
        "router": router,
    }
    for name in ("attention_norm", "experts_norm", "final_norm"):
        makers[name] = ones(spec.n_hidden, torch.float32)
    for name, layout in (
        ("qkv", qkv),
        ("attention_out", out),
        ("embedding", words),
        ("head", words),
    ):
        # Embeddings of spread 1, as layers' outputs have: what attention adds is alike for all
        # tokens, and would send them to the same experts if they differed by less. Not where the
        # embedding is the head too, whose scores would be as much too large.
        alone = name == "embedding" and not spec.tied_head
        makers[name] = plane(layout, spread=layout.n_in**0.5 if alone else 1.0)
        makers[f"{name}.d"] = ones(layout.n_in, torch.float16)
    return makers


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
