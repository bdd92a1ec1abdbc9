"""A pass takes no more memory than is set aside for it, nor is far more set aside than it takes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import lowmoe
from lowmoe.decoder.native import NativeComputation
from lowmoe.decoder.weights import DenseWeights, ExpertTransforms, LayerWeights
from lowmoe.decoder.working import working_bytes
from lowmoe.engine.generate import Session
from lowmoe.engine.load import load_checkpoint, load_folder
from lowmoe.engine.load_options import LoadOptions
from lowmoe.engine.runtime import Runtime
from lowmoe.families import read_config
from lowmoe.families.aliases import ALIASES
from lowmoe.kernels import cpu
from lowmoe.kernels.reference import ReferenceKernels
from lowmoe.spec import ModelSpec
from quant.layout import PlaneLayout
from quant.matrix import TrellisMatrix
from quant.trellis import DEFAULT_CODE
from tests.live_bytes import LiveBytes


@pytest.mark.parametrize("form", ["nf4", "bf16", "checkpoint"])
def test_a_prefill_in_torch_stays_within_the_memory_set_aside_for_it(
    talking_checkpoint: Path, tmp_path: Path, form: str
) -> None:
    if form == "checkpoint":
        runtime = load_checkpoint(talking_checkpoint, LoadOptions(dtype="float32", ram="90%"))
    else:
        lowmoe.quantize(talking_checkpoint, tmp_path / form, format=form, calibrate=False)
        runtime = load_folder(tmp_path / form, LoadOptions(ram="90%"))
    peak = peak_of_a_prefill(runtime)
    runtime.close()
    allowed = runtime.decoder.computation.working_bytes
    assert allowed / 8 < peak <= allowed


@pytest.mark.parametrize("n_threads", [1, 3])
def test_native_scratch_and_a_prefill_stay_within_the_memory_set_aside_for_them(
    model_folder: Path, n_threads: int
) -> None:
    before = cpu.allocated_bytes()
    runtime = load_folder(model_folder, LoadOptions(ram="90%", threads=n_threads))
    scratch = cpu.allocated_bytes() - before
    peak = peak_of_a_prefill(runtime)
    runtime.close()
    allowed = runtime.decoder.computation.working_bytes
    assert allowed / 1.25 < scratch + peak <= allowed


def peak_of_a_prefill(runtime: Runtime) -> int:
    """The most bytes of tensors that are alive at once while a chunk, as long as may be, is run."""
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
    return live.peak


def test_the_largest_model_needs_little_beside_its_weights() -> None:
    spec = read_config(ALIASES["mixtral-8x22b"].config).spec
    assert working_bytes(spec, 256, 8192, ReferenceKernels()) < 300e6


def test_natively_the_largest_model_needs_little_beside_its_weights() -> None:
    spec = read_config(ALIASES["mixtral-8x22b"].config).spec
    native = NativeComputation(
        spec,
        weights_without_bytes(spec),
        DEFAULT_CODE,
        cpu.Pool(16, []),
        isa=cpu.isas()[0],
        kv="float16",
        max_tokens=512,
        n_context=8192,
    )
    assert native.working_bytes < 300e6
    # 56 layers of 8 key-value heads of 128: 229376 bytes a token.
    assert native.cache_bytes(8192) == 56 * 2 * 8 * 128 * 2 * 8192


def weights_without_bytes(spec: ModelSpec) -> DenseWeights:
    """Shapes alone: scratch is taken before the first weight is read."""

    def vector(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    def matrix(n_out: int, n_in: int) -> TrellisMatrix:
        return TrellisMatrix(PlaneLayout(n_out, n_in), DEFAULT_CODE, (vector(1),) * 3, vector(n_in))

    layers = []
    for layer in spec.layers:
        attention, experts = layer.attention, layer.feed_forward
        layers.append(
            LayerWeights(
                parts={
                    "attention_norm": vector(spec.n_hidden),
                    "qkv": matrix(attention.q_size + 2 * attention.kv_size, spec.n_hidden),
                    "attention_out": matrix(spec.n_hidden, attention.q_size),
                    "experts_norm": vector(spec.n_hidden),
                    "router": vector(experts.n_experts, spec.n_hidden),
                },
                transforms=ExpertTransforms(
                    d_in=vector(spec.n_hidden), d_inner=vector(experts.n_experts, experts.n_inner)
                ),
            )
        )
    words = matrix(spec.n_vocab, spec.n_hidden)
    return DenseWeights(
        embedding=words, layers=tuple(layers), final_norm=vector(spec.n_hidden), head=words
    )
