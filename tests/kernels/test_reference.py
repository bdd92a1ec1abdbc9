from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from lowmoe.kernels import row_chunks
from lowmoe.kernels.reference import ReferenceKernels
from quant import nf4
from quant.encode import encode_planes
from quant.expert import Expert, ExpertFormat, Nf4Format, PlainFormat, TrellisFormat
from quant.layout import PlaneLayout
from quant.matrix import Matrix, Nf4Matrix, TrellisMatrix, dequantize
from quant.transform import channel_factors
from quant.trellis import DEFAULT_CODE
from tests.live_bytes import LiveBytes

KERNELS = ReferenceKernels()
FORMATS = ["plain fp32", "plain bf16", "nf4", "trellis, 1 plane", "trellis, 3 planes"]
# The transform turns x and W apart from each other; products of 70 terms are rounded on either
# side, by 6e-8 * sqrt(70) of a product of size up to 40.
ROUNDING = 1e-4


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """As in tests/quant: on a busy machine, threads wait for each other longer than they work."""
    found = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(found)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrix_of(form: str, weights: Tensor) -> Matrix:
    n_out, n_in = weights.shape
    if form == "nf4":
        return Nf4Matrix(nf4.Nf4Layout(n_out, n_in), nf4.encode(weights))
    if form.startswith("plain"):
        return weights.bfloat16() if form == "plain bf16" else weights
    layout = PlaneLayout(n_out, n_in)
    d = channel_factors(None, torch.ones(n_in), seed=3)
    planes = encode_planes(weights, d, layout, DEFAULT_CODE, int(form[9]))
    return TrellisMatrix(layout, DEFAULT_CODE, tuple(planes), d)


def expert_of(form: str, n_hidden: int, n_inner: int) -> Expert:
    formats: dict[str, ExpertFormat] = {
        "plain fp32": PlainFormat(n_hidden, n_inner, torch.float32),
        "plain bf16": PlainFormat(n_hidden, n_inner, torch.bfloat16),
        "nf4": Nf4Format(n_hidden, n_inner),
        "trellis, 1 plane": TrellisFormat(n_hidden, n_inner, 1, DEFAULT_CODE),
        "trellis, 3 planes": TrellisFormat(n_hidden, n_inner, 3, DEFAULT_CODE),
    }
    d_in = channel_factors(None, torch.ones(n_hidden), seed=1)
    d_inner = channel_factors(None, torch.ones(n_inner), seed=2)
    shapes = [(n_inner, n_hidden), (n_inner, n_hidden), (n_hidden, n_inner)]
    gate, up, down = (random(*shape, seed=i) / 8 for i, shape in enumerate(shapes))
    parts = formats[form].pack(gate, up, down, d_in, d_inner)
    return formats[form].open(tuple(parts), d_in, d_inner)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", [(64, 70), (33, 128), (1, 2)])
def test_a_product_is_that_with_the_dequantized_weights(form: str, shape: tuple[int, int]) -> None:
    matrix = matrix_of(form, random(*shape))
    x = random(5, shape[1], seed=9)
    found = KERNELS.linear(x, matrix)
    assert found.shape == (5, shape[0])
    torch.testing.assert_close(found, x @ dequantize(matrix).float().T, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("form", FORMATS)
def test_an_embedding_is_the_rows_of_the_dequantized_weights(form: str) -> None:
    matrix = matrix_of(form, random(150, 70))
    ids = torch.tensor([149, 0, 63, 64, 0, 128])
    found = KERNELS.embed(ids, matrix, torch.float32)
    torch.testing.assert_close(found, dequantize(matrix).float()[ids], rtol=0, atol=1e-6)
    assert KERNELS.embed(ids, matrix, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("sizes", [(70, 130), (64, 64)])
def test_an_expert_is_down_of_silu_of_gate_times_up(form: str, sizes: tuple[int, int]) -> None:
    expert = expert_of(form, *sizes)
    x = random(5, sizes[0], seed=9)
    gate, up = (half.T for half in expert.split(dequantize(expert.gate_up).float().T))
    inner = ACT2FN["silu"](x @ gate.T) * (x @ up.T)
    wanted = inner @ dequantize(expert.down).float().T
    assert wanted.std() > 0.3
    torch.testing.assert_close(KERNELS.expert(x, expert), wanted, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activations_keep_their_dtype(form: str, dtype: torch.dtype) -> None:
    x = random(3, 64, seed=9).to(dtype)
    assert KERNELS.linear(x, matrix_of(form, random(64, 64))).dtype == dtype
    found = KERNELS.expert(x, expert_of(form, 64, 64))
    assert found.dtype == dtype
    wide = KERNELS.expert(x.float(), expert_of(form, 64, 64))
    # Five roundings on the way, of 2**-8 of numbers up to 4 in bfloat16.
    torch.testing.assert_close(found.float(), wide, rtol=0, atol=5 * 4 * 2**-8)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", [(330, 128), (300, 200), (130, 2048)])
def test_chunks_of_rows_do_not_change_a_product(
    monkeypatch: pytest.MonkeyPatch, form: str, shape: tuple[int, int]
) -> None:
    matrix, x = matrix_of(form, random(*shape)), random(5, shape[1], seed=9)
    whole = KERNELS.linear(x, matrix)
    monkeypatch.setattr(row_chunks, "CHUNK_WEIGHTS", 64 * shape[1])
    chunks = list(row_chunks.row_chunks(matrix))
    # The blocks of nf4 (300, 200) end together with a row only after 2048 rows.
    assert len(chunks) == 1 if (form, shape) == ("nf4", (300, 200)) else len(chunks) > 1
    if form == "plain bf16":
        x = x.double()  # exact products, and another dtype than the weights'
        whole = x @ dequantize(matrix).double().T
    # The same products of up to 2048 terms of size up to 16, added up in another order.
    torch.testing.assert_close(KERNELS.linear(x, matrix), whole, rtol=0, atol=1e-3)
    pieces = torch.cat([dequantize(rows) for _, rows in chunks])
    torch.testing.assert_close(pieces, dequantize(matrix), rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", FORMATS)
def test_a_product_takes_no_more_memory_than_it_says(
    monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr(row_chunks, "CHUNK_WEIGHTS", 2**16)
    matrix, x = matrix_of(form, random(1024, 256)), random(1, 256)
    x = x.bfloat16() if form == "plain fp32" else x  # so that weights are converted
    KERNELS.linear(x, matrix)  # tables that are made once
    with LiveBytes() as live:
        KERNELS.linear(x, matrix)
    activations = 4 * (3 * 256 + 2 * 1024)
    assert 2**16 < live.peak <= KERNELS.working_bytes(1024, 256) + activations
    assert KERNELS.working_bytes(2**17, 256) == KERNELS.working_bytes(1024, 256)
