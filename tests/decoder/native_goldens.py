"""What torch makes of a model and a text, and how far native code may be from it.

Tolerances are of the relative squared error of a token's logits. What native code rounds that torch
does not are activations, to int8 with one scale for each 128 of them: the largest of 128 normal
numbers is about 2.7 deviations, a step of 2.7 / 127 has a variance of step^2 / 12 = 4e-5. A layer
rounds before each of its four matrices and the head once more, and a residual stream carries all of
it on: (4 * LAYERS + 1) * 4e-5 is what to expect. For more than eight tokens, planes are added up in
int8 too, 1e-4 more (lowmoe/kernels/cpu/trellis_tile.h); an int8 cache rounds keys and values as
often. Measured on these models, the mean is at most 1.4 times what is expected, and the worst of
some hundred tokens 13 times.
"""

from dataclasses import dataclass

import torch
from tiny_models import in_chunks
from torch import Tensor
from trellis_models import Answer, Recording, TrellisModel

from lowmoe.kernels import cpu

ROUNDING, TILE_ROUNDING = 4e-5, 1e-4
MEAN_LIMIT, TOKEN_LIMIT = 3.0, 30.0  # times what is to be expected
FEW_TOKENS = 8  # at once, that are multiplied one by one
N_TOKENS = 60
CHUNKS = {
    "at once": [N_TOKENS],
    "one by one": [1],
    "few by few": [FEW_TOKENS, 2],
    "in all sizes": [1, 10, 2, 3, 4, 20],
}


def expected_error(n_layers: int, kv: cpu.KvFormat, sizes: list[int]) -> float:
    of_a_matrix = ROUNDING + (TILE_ROUNDING if max(sizes) > FEW_TOKENS else 0)
    of_the_cache = 2 * n_layers * ROUNDING if kv == "int8" else 0
    return (4 * n_layers + 1) * of_a_matrix + of_the_cache


def errors(found: Tensor, wanted: Tensor) -> Tensor:
    """The relative squared error of each token, [T]."""
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype == torch.float32
    return (found - wanted).square().sum(1) / wanted.square().sum(1)


def assert_within(found: Tensor, wanted: Tensor, expected: float) -> None:
    error = errors(found, wanted)
    assert error.mean() < MEAN_LIMIT * expected
    assert error.max() < TOKEN_LIMIT * expected, f"token {error.argmax()}"


def some_ids(model: TrellisModel, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, model.spec.n_vocab, (count,), generator=generator)


def answer_of_torch(model: TrellisModel, ids: Tensor) -> Answer:
    recording = Recording(model.in_torch(), len(model.spec.layers))
    with model.decoder(recording) as decoder:
        return Answer(in_chunks(decoder, ids, [256]), recording.routings())


@dataclass(frozen=True, slots=True)
class Golden:
    """A model, a text, and what torch makes of it."""

    model: TrellisModel
    ids: Tensor
    answer: Answer


def golden_of(model: TrellisModel, n_tokens: int = N_TOKENS) -> Golden:
    ids = some_ids(model, n_tokens)
    return Golden(model, ids, answer_of_torch(model, ids))
