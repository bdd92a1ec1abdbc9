"""Folders of synthetic models that are larger than the disk they lie on.

A manifest says where each span lies. Here the spans of layers and experts that the files do not
have are those of others of the same size that they have: layer 9 of a model written with 8 layers
reads what layer 1 reads. Whoever runs it reads as many bytes as of a whole one, past the page cache
as ever, and keeps each expert in memory of its own.

Knows:        manifests, names of spans.
Ignorant of:  what is measured with such a folder.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmoe.checkpoint import files
from lowmoe.checkpoint.file_names import MANIFEST
from lowmoe.checkpoint.layout import Place, folder_layout
from lowmoe.checkpoint.manifest import Span, content_hash, read_manifest
from lowmoe.families import read_config
from lowmoe.spec import ModelSpec

OWN_FILE = "own.safetensors"  # what nothing that is written is as long as: spans without a header


def larger(
    folder: Path, base: Path, config: Mapping[str, Any], make: Callable[[str], Tensor] | None = None
) -> None:
    """Make a folder of a model of this config from a written one of its kind, sharing its files.

    make: of spans without a counterpart; None where there are to be none.
    """
    written = read_manifest(base)
    spec = read_config(written.config).spec
    folder.mkdir(parents=True, exist_ok=True)
    spans: dict[str, Span] = {}
    n_own = 0
    with (folder / OWN_FILE).open("wb") as own:
        for name, place in folder_layout(read_config(config).spec, written.recipe).places.items():
            span = written.spans.get(_counterpart(name, spec))
            if span is not None and span.place.n_bytes == place.n_bytes:
                spans[name] = span
            elif make is None:
                raise SystemExit(f"{base}: has nothing as long as {name}.")
            else:
                data = make(name).reshape(-1).view(torch.uint8).numpy().tobytes()
                spans[name] = Span(Place(OWN_FILE, n_own, len(data)), content_hash(data))
                n_own += own.write(data)
    for file in {span.place.file for span in spans.values()} - {OWN_FILE}:
        (folder / file).unlink(missing_ok=True)
        os.link(base / file, folder / file)
    manifest = replace(written, config=config, spans=spans)
    files.write_whole(folder / MANIFEST, manifest.to_json())


def _counterpart(name: str, spec: ModelSpec) -> str:
    """The name of the same span of a layer, and an expert, that are written.  spec: of those."""
    head, *rest = name.split(".")
    if head != "layers":
        return name
    layer = int(rest[0]) % len(spec.layers)
    if rest[1] == "experts" and rest[2].isdigit():
        rest[2] = str(int(rest[2]) % spec.n_experts_by_layer[layer])
    return ".".join([head, str(layer), *rest[1:]])
