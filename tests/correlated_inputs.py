"""Covariances of inputs that error feedback is tested with."""

import torch
from torch import Tensor

from quant.transform import hadamard_size


def correlated_inputs(n_in: int) -> Tensor:
    """[blocks, h, h] with eigenvalues from 1 to e^-6 in random directions."""
    size = hadamard_size(n_in)
    generator = torch.Generator().manual_seed(n_in)
    directions = torch.linalg.qr(torch.randn(n_in // size, size, size, generator=generator))[0]
    strengths = (-6 * torch.arange(size) / size).exp()
    covariance: Tensor = directions * strengths @ directions.transpose(1, 2)
    return covariance


def white(n_in: int) -> Tensor:
    """[blocks, h, h] of inputs that have nothing to do with each other."""
    size = hadamard_size(n_in)
    return torch.eye(size).expand(n_in // size, size, size)
