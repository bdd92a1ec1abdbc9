from collections.abc import Iterator

import pytest
import torch
from native_goldens import Golden, golden_of
from transformers.utils import logging
from trellis_models import trellis_model
from trellis_shapes import DEMANDING_SHAPES, SHAPES


@pytest.fixture(scope="package", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Tiny matrices on several threads of a busy machine take longer than on one."""
    found = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
    torch.set_num_threads(found)


@pytest.fixture(scope="package", params=SHAPES | DEMANDING_SHAPES)
def golden(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Golden]:
    shape = (SHAPES | DEMANDING_SHAPES)[request.param]
    with trellis_model(tmp_path_factory.mktemp("model") / "folder", shape) as model:
        yield golden_of(model)


@pytest.fixture(scope="package")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Golden]:
    """One shape, where what is tested has nothing to do with shapes."""
    shape = SHAPES["3 heads of 64 of their own, hidden 192, inner 200"]
    with trellis_model(tmp_path_factory.mktemp("model") / "folder", shape) as model:
        yield golden_of(model)
