"""Shortages of a GPU's memory, whoever finds one, as the exception of torch's own allocator.

Not all memory is torch's: a graph takes some when it is made and when it is first replayed, cuBLAS
takes some for the first product, the driver takes some for kernels.

Knows:        in which words the runtime, cuBLAS and the driver say that there is none.
Ignorant of:  what it was for, what is done about it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cuda_ext.on_card import RefusedLaunch

WORDS = (
    "CUDA error: out of memory",  # torch, of what the runtime refuses
    "CUDA_ERROR_OUT_OF_MEMORY",  # cuda-core, of what the driver refuses
    "CUBLAS_STATUS_ALLOC_FAILED",
    # On a card that computes already nothing but memory is missing, but it may come out as
    # CUBLAS_STATUS_NOT_INITIALIZED.
    "cublasCreate",
)


@contextmanager
def shortages() -> Iterator[None]:
    """Raises torch.OutOfMemoryError for whatever says that memory does not do."""
    try:
        yield
    except (RuntimeError, RefusedLaunch) as e:
        if isinstance(e, torch.OutOfMemoryError) or not any(words in str(e) for words in WORDS):
            raise
        raise torch.OutOfMemoryError(str(e)) from e
