"""Folders of synthetic models that are larger than the disk they lie on.

A manifest says where each span lies. Here the spans of a layer that the files do not have are those
of one that they have: layer 9 of a model written with 8 layers reads what layer 1 reads. Whoever
runs it reads as many bytes as of a whole one, past the page cache as ever, and keeps each expert in
memory of its own.

Knows:        manifests, names of spans.
Ignorant of:  what is measured with such a folder.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowmoe.checkpoint import files
from lowmoe.checkpoint.layout import folder_layout
from lowmoe.checkpoint.manifest import MANIFEST, Span, read_manifest
from lowmoe.families import read_config
from lowmoe.families.fewer_layers import with_layers


def with_other_layers(folder: Path, base: Path, config: Mapping[str, Any], n_layers: int) -> None:
    """Make a folder of so many layers from a written one, whose files it shares.

    config: of the whole model.  Layers must be alike where they repeat, or SystemExit says so.
    """
    written = read_manifest(base)
    n_written = read_config(written.config).spec.n_layers
    cut = with_layers(config, n_layers)
    wanted = folder_layout(read_config(cut).spec, written.recipe)
    spans: dict[str, Span] = {}
    for name, place in wanted.places.items():
        span = written.spans.get(_repeated(name, n_written))
        if span is None or span.place.n_bytes != place.n_bytes:
            raise SystemExit(f"{base}: {name} is not as long as that of a layer it repeats.")
        spans[name] = span
    folder.mkdir(parents=True, exist_ok=True)
    for name in {span.place.file for span in spans.values()} - {p.name for p in folder.iterdir()}:
        os.link(base / name, folder / name)
    manifest = replace(written, config=cut, spans=spans)
    files.write_whole(folder / MANIFEST, manifest.to_json())


def _repeated(name: str, n_written: int) -> str:
    """The name of the same span of a layer that is written."""
    head, *rest = name.split(".")
    if head != "layers":
        return name
    return ".".join([head, str(int(rest[0]) % n_written), *rest[1:]])
