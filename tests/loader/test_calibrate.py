"""Does calibration hear what transformers' own modules are given?"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from lowmoe.checkpoint.reader import Checkpoint
from lowmoe.decoder.weights import CheckpointTensors
from lowmoe.experts.source import CheckpointExperts
from lowmoe.families import read_config
from lowmoe.loader.calibrate import (
    SHRINKAGE,
    CalibrationRun,
    LayerMoments,
    Moments,
    column_rms,
    column_squares,
    rms_of,
)
from quant.transform import hadamard_size

# Float32 sums of some dozen products in another order; both models' values are about 1.
TOLERANCE = 1e-4
LENGTHS = (40, 23, 9)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def covariance_of(x: Tensor) -> Tensor:
    """The mean of x x^T inside each Hadamard block of channels, in float64.  x: [T, n_in]."""
    size = hadamard_size(x.shape[1])
    blocks = [b.double().T @ b.double() / x.shape[0] for b in torch.split(x, size, dim=1)]
    return torch.stack(blocks)


# Moments


@pytest.mark.parametrize("n_in", [48, 33, 256])
def test_moments_are_the_mean_products_of_all_tokens(n_in: int) -> None:
    x, moments = gaussian(300, n_in) + 0.5, Moments(n_in)
    for part in torch.split(x, [100, 1, 199]):
        moments.add(part)
    # 300 products summed in float32.
    assert torch.allclose(moments.covariance().double(), covariance_of(x), rtol=1e-4, atol=1e-4)
    rms = x.double().square().mean(0).sqrt().float()
    assert torch.allclose(rms_of(moments.covariance()), rms, rtol=1e-4)


def test_an_expert_that_heard_little_is_taken_for_an_average_one() -> None:
    layer, expert, silent = Moments(8), Moments(8), Moments(8)
    layer.add(gaussian(1000, 8))
    expert.add(3 * gaussian(SHRINKAGE, 8, seed=1))
    # It heard as many tokens as are mixed in: half and half.
    half = (expert.covariance() + layer.covariance()) / 2
    assert torch.allclose(expert.shrunk_towards(layer), half)
    assert torch.allclose(silent.shrunk_towards(layer), layer.covariance())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_columns_are_measured_in_pieces_as_in_one(dtype: torch.dtype) -> None:
    weights = gaussian(2500, 20).to(dtype)
    squares = weights.double().square().sum(0)
    assert torch.allclose(column_squares(weights), squares, rtol=1e-6)
    assert torch.allclose(column_rms(weights), (squares / 2500).sqrt().float(), rtol=1e-6)


# Against transformers


@dataclass
class Theirs:
    """What transformers' modules were given, all sequences one after the other.

    Lists have a tensor [T, ...] for each sequence, by layer.
    """

    qkv: dict[int, list[Tensor]] = field(default_factory=dict)
    attention_out: dict[int, list[Tensor]] = field(default_factory=dict)
    router: dict[int, list[Tensor]] = field(default_factory=dict)
    experts: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    layer_out: dict[int, list[Tensor]] = field(default_factory=dict)
    head: dict[int, list[Tensor]] = field(default_factory=dict)


def keep(into: dict[int, list[Any]], layer_id: int) -> Callable[..., None]:
    def hook(module: object, args: tuple[Tensor, ...]) -> None:
        into.setdefault(layer_id, []).append(args[0].reshape(-1, args[0].shape[-1]).clone())

    return hook


def run_theirs(model: MixtralForCausalLM, sequences: list[Tensor]) -> Theirs:
    theirs = Theirs()
    for layer_id, layer in enumerate(model.model.layers):
        layer.self_attn.q_proj.register_forward_pre_hook(keep(theirs.qkv, layer_id))
        layer.self_attn.o_proj.register_forward_pre_hook(keep(theirs.attention_out, layer_id))
        layer.mlp.gate.register_forward_pre_hook(keep(theirs.router, layer_id))
        layer.mlp.experts.register_forward_pre_hook(
            lambda _, args, i=layer_id: theirs.experts.setdefault(i, []).append(args[:2])
        )
        layer.register_forward_hook(
            lambda _, args, out, i=layer_id: theirs.layer_out.setdefault(i, []).append(out[0])
        )
    model.lm_head.register_forward_pre_hook(keep(theirs.head, 0))
    with torch.no_grad():
        for ids in sequences:
            model(input_ids=ids[None], use_cache=False)
    return theirs


@dataclass(frozen=True)
class Both:
    """One checkpoint, calibrated on here and run by transformers."""

    model: MixtralForCausalLM
    theirs: Theirs
    ours: list[LayerMoments]
    hidden: list[Tensor]  # behind each layer, [T, H]
    run: CalibrationRun
    final_norm: Tensor


@pytest.fixture(scope="module", params=[None, 8], ids=["full", "sliding"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=6,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        sliding_window=request.param,
        initializer_range=0.2,  # activations of about 1
    )
    torch.manual_seed(0)
    model = MixtralForCausalLM(config)
    model.train(False)
    folder = tmp_path_factory.mktemp("transformers")
    model.save_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(0, 64, (n,), generator=generator) for n in LENGTHS]
    return calibrate(folder, sequences, model)


def calibrate(folder: Path, sequences: list[Tensor], model: MixtralForCausalLM) -> Both:
    checkpoint = Checkpoint(folder)
    tensors = CheckpointTensors(checkpoint, read_config(checkpoint.config))
    spec = tensors.family.spec
    source = CheckpointExperts(checkpoint, tensors.family, torch.float32)
    hidden = tensors.read("embedding")[torch.cat(sequences)].float()
    run = CalibrationRun(hidden, list(LENGTHS), spec)
    ours, behind = [], []
    for layer_id in range(len(spec.layers)):
        weights = tensors.layer(layer_id, torch.float32)
        ours.append(run.through_layer(layer_id, weights, Experts(source, layer_id)))
        behind.append(run.hidden)
    theirs = run_theirs(model, sequences)
    return Both(model, theirs, ours, behind, run, tensors.read("final_norm").float())


@dataclass(frozen=True)
class Experts:
    source: CheckpointExperts
    layer_id: int

    def matrices(self, expert_id: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.source.read_matrices(self.layer_id, expert_id)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    scale = theirs.abs().max().clamp_min(1)
    assert (ours - theirs).abs().max() <= TOLERANCE * scale


def test_hidden_states_are_those_of_transformers_behind_every_layer(both: Both) -> None:
    for layer_id, hidden in enumerate(both.hidden):
        theirs = torch.cat([out.view(-1, 64) for out in both.theirs.layer_out[layer_id]])
        assert_same(hidden, theirs)


@pytest.mark.parametrize(
    ("name", "module"),
    [("qkv", "qkv"), ("attention_out", "attention_out"), ("experts_in", "router")],
)
def test_every_shared_input_is_that_of_transformers_module(
    both: Both, name: str, module: str
) -> None:
    for layer_id, moments in enumerate(both.ours):
        given = torch.cat(getattr(both.theirs, module)[layer_id])
        assert given.shape[0] == sum(LENGTHS)
        ours = moments.experts_in if name == "experts_in" else moments.dense[name]
        assert_same(ours.double(), covariance_of(given))


def inner_of(both: Both, layer_id: int) -> Iterator[Tensor]:
    """What transformers' experts multiply with down, [tokens, I] of each expert."""
    experts = both.model.model.layers[layer_id].mlp.experts
    given = both.theirs.experts[layer_id]
    x = torch.cat([hidden.view(-1, 64) for hidden, _ in given])
    expert_ids = torch.cat([ids for _, ids in given])
    for expert_id, gate_up in enumerate(experts.gate_up_proj.detach()):
        token = torch.where((expert_ids == expert_id).any(1))[0]
        gate, up = (x[token] @ gate_up.T).chunk(2, dim=1)
        yield F.silu(gate) * up


def test_every_experts_inner_input_is_that_of_transformers(both: Both) -> None:
    for layer_id, moments in enumerate(both.ours):
        inner = list(inner_of(both, layer_id))
        assert sum(x.shape[0] for x in inner) == 2 * sum(LENGTHS)
        layer = covariance_of(torch.cat(inner))
        for x, ours in zip(inner, moments.inner, strict=True):
            own = covariance_of(x) if x.shape[0] else torch.zeros_like(layer)
            mixed = (own * x.shape[0] + SHRINKAGE * layer) / (x.shape[0] + SHRINKAGE)
            assert_same(ours.double(), mixed)


def test_the_heads_input_is_that_of_transformers(both: Both) -> None:
    given = torch.cat(both.theirs.head[0])
    assert_same(both.run.head_covariance(both.final_norm).double(), covariance_of(given))


def test_columns_are_those_of_transformers_weights(both: Both) -> None:
    for layer_id, moments in enumerate(both.ours):
        experts = both.model.model.layers[layer_id].mlp.experts
        gate_up = experts.gate_up_proj.detach().flatten(0, 1)  # rows of all experts
        assert_same(moments.gate_up_columns, gate_up.square().mean(0).sqrt())
        assert_same(moments.down_columns, experts.down_proj.detach().square().mean(1).sqrt())


def test_nothing_is_kept_of_a_layer_that_was_left(both: Both) -> None:
    assert both.run._kernels._moments == {}
