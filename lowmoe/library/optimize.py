"""Tells a model folder which experts matter, from a trace of what a user does with it.

Where experts lie in their files is left as it is: they are read whole, megabytes at a time, and a
disk reads those as fast in any order (docs/plan.md). Which come first decides how soon a run hits.

Knows:        the order of writes that leaves a folder whole at any moment.
Ignorant of:  who reads the counts, what they do for a run.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from lowmoe.checkpoint import files
from lowmoe.checkpoint.file_names import MANIFEST
from lowmoe.checkpoint.manifest import read_manifest
from lowmoe.checkpoint.popularity import POPULARITY, popularity_json
from lowmoe.checkpoint.writer import small_file_table
from lowmoe.errors import UsageError
from lowmoe.experts.trace import RoutingTrace
from lowmoe.families import read_config
from lowmoe.library.names import locked


def optimize(folder: Path, trace: RoutingTrace) -> int:
    """Write a trace's counts into a finished folder; returns the tokens counted.

    Raises UsageError for another model's trace, FolderError, DiskSpaceError.
    """
    manifest = read_manifest(folder)
    n_experts = read_config(manifest.config).spec.n_experts_by_layer
    if tuple(n for n in n_experts if n) != trace.n_experts:
        raise UsageError(
            f"the trace is of {trace.model}, with {sum(trace.n_experts)} experts in "
            f"{trace.n_layers} layers, but {folder} has {sum(n_experts)} in {len(n_experts)}. "
            "Record one of this model: lowmoe trace."
        )
    data = {POPULARITY: popularity_json(_counts(trace, n_experts), trace.n_tokens)}
    others = {n: f for n, f in manifest.small_files.items() if n != POPULARITY}
    counted = replace(manifest, small_files={**others, **small_file_table(data)})
    with locked(folder):
        # Without the file, with the file that nobody names yet, with its name: whole each time.
        files.write_whole(folder / MANIFEST, replace(manifest, small_files=others).to_json())
        files.write_whole(folder / POPULARITY, data[POPULARITY])
        files.write_whole(folder / MANIFEST, counted.to_json())
    return trace.n_tokens


def _counts(trace: RoutingTrace, n_experts: list[int]) -> list[list[int]]:
    """Of every layer of the model; those without experts have none."""
    rows = iter(np.moveaxis(trace.experts, 1, 0))
    return [
        np.bincount(next(rows).reshape(-1), minlength=n).tolist() if n else [] for n in n_experts
    ]
