"""A pass takes no more memory than is set aside for it, nor is far more set aside than it takes."""

from pathlib import Path

import pytest

import lowmoe
from lowmoe.engine.generate import Session
from lowmoe.engine.load import LoadOptions, load_checkpoint, load_folder
from lowmoe.decoder.working import working_bytes
from lowmoe.families import read_config
from lowmoe.families.aliases import ALIASES
from lowmoe.kernels.reference import ReferenceKernels
from tests.live_bytes import LiveBytes


@pytest.mark.parametrize("form", ["trellis", "nf4", "bf16", "checkpoint"])
def test_a_prefill_stays_within_the_memory_set_aside_for_it(
    model_folder: Path, talking_checkpoint: Path, tmp_path: Path, form: str
) -> None:
    if form == "checkpoint":
        runtime = load_checkpoint(talking_checkpoint, LoadOptions(dtype="float32", ram="90%"))
    else:
        folder = model_folder
        if form != "trellis":
            folder = tmp_path / form
            lowmoe.quantize(talking_checkpoint, folder, format=form, calibrate=False)
        runtime = load_folder(folder, LoadOptions(ram="90%"))
    ids = [i % 300 for i in range(runtime.decoder.computation.max_tokens)]
    for _ in Session(runtime).forward(ids):
        pass  # the experts are in RAM now, and tables made once
    session = Session(runtime)
    for hidden in session.forward(ids):  # the cache has its full size
        runtime.decoder.logits(hidden[-1:])
    session.rewind([])
    with LiveBytes() as live:
        for hidden in session.forward(ids):
            runtime.decoder.logits(hidden[-1:])
    runtime.close()
    assert runtime.working_bytes / 8 < live.peak <= runtime.working_bytes


def test_the_largest_model_needs_little_beside_its_weights() -> None:
    spec = read_config(ALIASES["mixtral-8x22b"].config).spec
    assert working_bytes(spec, 256, 8192, ReferenceKernels()) < 300e6
