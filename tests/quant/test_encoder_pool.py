import contextlib
import io
import signal
from collections.abc import Callable, Iterator
from typing import IO, Any

import pytest
import torch
from torch import Tensor

import quant.encode
import quant.encoder_pool
from quant.encode import encode_planes
from quant.encoder_pool import EncoderPool
from quant.layout import PlaneLayout
from quant.transform import channel_factors, hadamard_size
from quant.trellis import TrellisCode

CODE = TrellisCode()
SHAPES = [(130, 128), (130, 72), (129, 97)]  # Hadamard blocks of 128, 8 and none


@pytest.fixture(scope="module")
def pool() -> Iterator[EncoderPool]:
    with EncoderPool(2) as pool:
        yield pool


@pytest.fixture(autouse=True)
def chunks_of_64_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quant.encode, "CHUNK_WEIGHTS", 1)


def gaussian(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def some_factors(n_in: int) -> Tensor:
    generator = torch.Generator().manual_seed(n_in)
    loudness = torch.rand(n_in, generator=generator) + 0.1
    return channel_factors(loudness, torch.ones(n_in), seed=n_in)


def some_covariance(n_in: int) -> Tensor:
    size = hadamard_size(n_in)
    x = gaussian(n_in // size, 2 * size, size) @ gaussian(size, size)
    return x.transpose(1, 2) @ x


def arguments(weights: Tensor) -> tuple[Tensor, Tensor, PlaneLayout, TrellisCode, int]:
    return weights, some_factors(weights.shape[1]), PlaneLayout(*weights.shape), CODE, 2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("correlated", [False, True])
def test_a_pool_returns_the_bytes_of_one_process(
    pool: EncoderPool, shape: tuple[int, int], dtype: torch.dtype, correlated: bool
) -> None:
    weights = gaussian(*shape).to(dtype)
    covariance = some_covariance(shape[1]) if correlated else None
    found = pool.encode(*arguments(weights), covariance)
    wanted = encode_planes(*arguments(weights), covariance)
    assert len(found) == len(wanted) == 2
    assert all(map(torch.equal, found, wanted))


def test_chunks_are_cut_here_and_each_is_coded_by_a_process(
    pool: EncoderPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []

    def spy(stream: IO[bytes], message: object) -> None:
        sent.append(message)
        original(stream, message)

    original = quant.encoder_pool._send
    monkeypatch.setattr(quant.encoder_pool, "_send", spy)
    pool.encode(*arguments(gaussian(300, 128)))
    # Two at once may be sent in either order.
    assert sorted(len(job.rows) // (4 * 128) for job in sent) == [44, 64, 64, 64, 64]


@pytest.mark.parametrize("correlated", [False, True])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "not finite"),
        (float("inf"), "not finite"),
        (1e30, "too large for float16 scales"),
        (1e6, "too large for float16 scales"),
    ],
)
def test_weights_that_no_code_can_hold_are_refused_by_one_process_and_by_many(
    pool: EncoderPool, value: float, message: str, correlated: bool
) -> None:
    weights = gaussian(200, 128)
    weights[150] = value  # in the third chunk of four
    covariance = some_covariance(128) if correlated else None
    for encode in (encode_planes, pool.encode):
        with pytest.raises(ValueError, match=message):
            encode(*arguments(weights), covariance)


def test_a_pool_that_refused_weights_codes_the_next_ones(pool: EncoderPool) -> None:
    weights = gaussian(200, 128)
    with pytest.raises(ValueError, match="not finite"):
        pool.encode(*arguments(weights / 0))
    assert all(
        map(torch.equal, pool.encode(*arguments(weights)), encode_planes(*arguments(weights)))
    )


def test_whatever_goes_wrong_in_a_process_is_raised_here_as_it_is(pool: EncoderPool) -> None:
    weights, _, layout, code, n_planes = arguments(gaussian(200, 128))
    wrong = some_factors(64)
    raised = []
    for encode in (encode_planes, pool.encode):
        with pytest.raises(RuntimeError, match="must match the size") as error:
            encode(weights, wrong, layout, code, n_planes)
        raised.append((error.type, str(error.value)))
    assert raised[0] == raised[1]
    assert all(
        map(torch.equal, pool.encode(*arguments(weights)), encode_planes(*arguments(weights)))
    )


def end_processes(pool: EncoderPool) -> None:
    """What a test that failed leaves behind."""
    for worker in pool._workers:
        worker.kill()
        worker.wait()
        for stream in (worker.stdin, worker.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def die_before_the_job(pool: EncoderPool, monkeypatch: pytest.MonkeyPatch) -> None:
    for worker in pool._workers:
        worker.kill()
        worker.wait()


def die_at(
    pool: EncoderPool, monkeypatch: pytest.MonkeyPatch, received: Callable[[IO[bytes]], IO[bytes]]
) -> None:
    """Kill each process once `received` has taken from its answer what is to arrive."""

    def receive(stream: IO[bytes]) -> Any:
        rest = received(stream)
        (worker,) = (worker for worker in pool._workers if worker.stdout is stream)
        worker.kill()
        worker.wait()
        return original(rest)

    original = quant.encoder_pool._receive
    monkeypatch.setattr(quant.encoder_pool, "_receive", receive)


def die_at_work(pool: EncoderPool, monkeypatch: pytest.MonkeyPatch) -> None:
    die_at(pool, monkeypatch, lambda stream: stream)


def die_in_mid_answer(pool: EncoderPool, monkeypatch: pytest.MonkeyPatch) -> None:
    die_at(pool, monkeypatch, lambda stream: io.BytesIO(stream.read(1000)))


@pytest.mark.parametrize("die", [die_before_the_job, die_at_work, die_in_mid_answer])
def test_a_process_that_dies_is_an_error_at_once(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    die: Callable[[EncoderPool, pytest.MonkeyPatch], None],
) -> None:
    weights = gaussian(128, 4096)  # jobs larger than a pipe holds, so that sending meets the dead
    killed = rf"ended with exit code {-signal.SIGKILL}"
    pool = EncoderPool(2)
    request.addfinalizer(lambda: end_processes(pool))
    with pool:
        die(pool, monkeypatch)
        with pytest.raises(RuntimeError, match=killed):
            pool.encode(*arguments(weights))


def test_leaving_the_pool_ends_its_processes() -> None:
    with EncoderPool(2) as pool:
        assert [worker.poll() for worker in pool._workers] == [None, None]
    assert [worker.returncode for worker in pool._workers] == [0, 0]


def test_leaving_the_pool_by_an_error_ends_its_processes_at_once() -> None:
    pool = EncoderPool(2)
    with pytest.raises(KeyError), pool:
        raise KeyError
    assert [worker.returncode for worker in pool._workers] == [-signal.SIGKILL] * 2


def test_a_pool_of_one_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr("subprocess.Popen", refuse)
    weights = gaussian(130, 72)
    with EncoderPool(1) as pool:
        found = pool.encode(*arguments(weights))
    assert all(map(torch.equal, found, encode_planes(*arguments(weights))))
