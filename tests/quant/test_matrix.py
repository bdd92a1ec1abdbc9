import pytest
import torch
from torch import Tensor

import quant.matrix
from quant import nf4
from quant.encode import encode_planes
from quant.layout import PlaneLayout
from quant.matrix import Nf4Matrix, TrellisMatrix, dequantize
from quant.transform import channel_factors, transform_activations
from quant.trellis import TrellisCode, decode_planes


def weights_of(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def trellis_matrix(weights: Tensor, n_planes: int = 2) -> TrellisMatrix:
    code, layout = TrellisCode(), PlaneLayout(*weights.shape)
    loudness = torch.rand(weights.shape[1], generator=torch.Generator().manual_seed(0)) + 0.1
    d = channel_factors(loudness, weights.square().mean(0).sqrt(), seed=0)
    planes = encode_planes(weights, d, layout, code, n_planes)
    return TrellisMatrix(layout, code, tuple(planes), d)


@pytest.mark.parametrize("shape", [(64, 64), (200, 128), (130, 97), (5, 70)])
def test_a_trellis_matrix_stands_for_the_weights_it_codes(shape: tuple[int, int]) -> None:
    weights = weights_of(shape)
    matrix = trellis_matrix(weights)
    decoded = dequantize(matrix)
    assert matrix.n_out == shape[0]
    assert decoded.shape == shape
    # Two planes leave .006 of a Gaussian; weights divided by unlike d's, rotated in small blocks or
    # none, and beside padding are coded up to 3 times worse.
    assert float((decoded - weights).square().sum() / weights.square().sum()) < 0.02


@pytest.mark.parametrize("shape", [(64, 64), (130, 97), (200, 128)])
def test_a_transformed_product_is_the_product_with_the_dequantized_weights(
    shape: tuple[int, int],
) -> None:
    matrix = trellis_matrix(weights_of(shape))
    x = torch.randn(3, shape[1], generator=torch.Generator().manual_seed(1))
    moved = transform_activations(x, matrix.d)
    assert matrix.transformed().shape == shape
    # Terms of a dot product rounded n times: n * 2^-24 * |a| |b|; three transforms of up to 128.
    bound = (3 * 128 + 8) * 2**-24 * moved.norm(dim=1)[:, None] * matrix.transformed().norm(dim=1)
    product = moved.double() @ matrix.transformed().double().T
    assert ((product - x.double() @ dequantize(matrix).double().T).abs() <= bound).all()


@pytest.mark.parametrize("n_planes", [1, 2, 3])
@pytest.mark.parametrize("shape", [(200, 128), (130, 97)])
def test_rows_are_rows_of_the_dequantized_matrix(n_planes: int, shape: tuple[int, int]) -> None:
    matrix = trellis_matrix(weights_of(shape), n_planes)
    row_ids = torch.tensor([129, 0, 63, 64, 129, 1])  # out of order, twice, of all blocks
    rows = matrix.rows(row_ids)
    # The same 128 products, perhaps summed in another order: at most 128 * 2^-24 of their norm.
    atol = float(128 * 2**-24 * matrix.transformed().norm(dim=1).max() * matrix.d.abs().max())
    torch.testing.assert_close(rows, dequantize(matrix)[row_ids], rtol=0, atol=atol)


def test_one_row_costs_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[PlaneLayout] = []

    def spy(planes: tuple[Tensor, ...], layout: PlaneLayout, code: TrellisCode) -> Tensor:
        decoded.append(layout)
        return decode_planes(planes, layout, code)

    matrix = trellis_matrix(weights_of((320, 64)))
    monkeypatch.setattr(quant.matrix, "decode_planes", spy)
    matrix.rows(torch.tensor([200, 201, 200]))
    assert decoded == [PlaneLayout(64, 64)]


def test_an_nf4_matrix_and_a_plain_one_stand_for_themselves() -> None:
    weights = weights_of((33, 65))
    layout = nf4.Nf4Layout(33, 65)
    matrix = Nf4Matrix(layout, nf4.encode(weights))
    assert matrix.n_out == 33
    assert torch.equal(dequantize(matrix), nf4.decode(matrix.buffer, layout))
    assert dequantize(weights) is weights
