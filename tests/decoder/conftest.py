from collections.abc import Iterator

import pytest
import torch
from transformers.utils import logging


@pytest.fixture(scope="package", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Tiny matrices on several threads of a busy machine take longer than on one."""
    found = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
    torch.set_num_threads(found)
