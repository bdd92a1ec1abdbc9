"""Which errors say that a GPU's memory does not do, and which say something else."""

import pytest
import torch

from cuda_ext.on_card import RefusedLaunch
from lowmoe.kernels.shortage import shortages


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be .."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasSgemm(..)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(h)`"),
        RefusedLaunch("linear/one: a card does not launch it, CUDA_ERROR_OUT_OF_MEMORY: .."),
    ],
)
def test_whoever_says_that_memory_is_short_it_is_the_error_of_torchs_allocator(
    error: Exception,
) -> None:
    with pytest.raises(torch.OutOfMemoryError) as raised, shortages():
        raise error
    assert str(raised.value) == str(error)
    assert raised.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB"),
        torch.AcceleratorError("CUDA error: unspecified launch failure"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(..)`"),
        RefusedLaunch("linear/one: a card does not launch it, CUDA_ERROR_LAUNCH_FAILED: .."),
        MemoryError("CUDA error: out of memory"),
    ],
)
def test_what_is_one_already_or_says_something_else_stays_as_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, shortages():
        raise error
    assert raised.value is error
