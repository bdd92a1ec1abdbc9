"""What emulated threads get from each other and from CUDA's functions, against numpy and Python."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cuda_emulator.emulated import FORWARD, ORDERS, REVERSE, EmulatedLaunch

KERNELS = Path(__file__).parent / "kernels"
LANES = np.arange(32)
WORDS = 256


@pytest.fixture(params=ORDERS)
def launch(request: pytest.FixtureRequest) -> EmulatedLaunch:
    launch = EmulatedLaunch(kernels=KERNELS)
    launch.order = request.param
    return launch


def one_block(launch: EmulatedLaunch, kernel: str, threads: int, *arguments: object) -> None:
    launch(kernel, (1, 1, 1), threads, *arguments)  # type: ignore[arg-type]


def shuffled(by: int, width: int) -> list[np.ndarray]:
    """The source lane of each lane, as the CUDA C++ Programming Guide words it."""
    inside, first = LANES % width, LANES // width * width
    plain = first + by % width
    # "Lanes may read from earlier groups, but a later group's lane gets its own value."
    turned = np.where((LANES ^ by) < first + width, LANES ^ by, LANES)
    up = np.where(inside - by < 0, LANES, LANES - by)
    down = np.where(inside + by >= width, LANES, LANES + by)
    return [plain, turned, up, down]


@pytest.mark.parametrize("width", [2, 8, 32])
@pytest.mark.parametrize("by", [0, 1, 5, 16])
def test_a_shuffle_brings_the_value_of_the_lane_it_names(
    launch: EmulatedLaunch, by: int, width: int
) -> None:
    for kernel, x in (
        ("shuffles_float", torch.randn(32)),
        ("shuffles_long", torch.randint(-(2**62), 2**62, (32,))),
    ):
        y = torch.zeros(4, 32, dtype=x.dtype)
        one_block(launch, f"warps/{kernel}", 32, x, y, by, width)
        for found, source in zip(y, shuffled(by, width), strict=True):
            assert torch.equal(found, x[torch.from_numpy(source)])


def test_lanes_outside_a_mask_take_no_part_and_bring_nothing(launch: EmulatedLaunch) -> None:
    x, y = torch.arange(32, dtype=torch.int32), torch.full((32,), 77, dtype=torch.int32)
    mask = 0x0F0F00FF
    inside = torch.tensor([bool(mask >> lane & 1) for lane in range(32)])
    one_block(launch, "warps/shuffle_of_some", 32, x, y, mask, 3)
    assert torch.equal(y, torch.where(inside, 3, 77).to(torch.int32))
    one_block(launch, "warps/shuffle_of_some", 32, x, y, mask, 8)
    # Undefined on a card; here never a lane's number.
    assert (y[inside].abs() > 31).logical_or(y[inside] < 0).all()


@pytest.mark.parametrize("mask", [0xFFFFFFFF, 0x1, 0x80000001, 0x00FFF000])
def test_votes_and_sums_are_of_the_lanes_in_the_mask(launch: EmulatedLaunch, mask: int) -> None:
    x = torch.randint(-(2**31), 2**31, (32,), dtype=torch.int32)
    y = torch.zeros(6, 32, dtype=torch.int32)
    one_block(launch, "warps/votes", 32, x, y, mask)
    inside = [lane for lane in range(32) if mask >> lane & 1]
    mine = x[inside].tolist()
    ballot = sum(1 << lane for lane in inside if x[lane] > 0)
    total = (sum(mine) + 2**31) % 2**32 - 2**31
    wanted = [np.uint32(ballot).astype(np.int32), ballot > 0, all(v > 0 for v in mine), total]
    wanted += [max(mine), min(mine)]
    for found, value in zip(y, wanted, strict=True):
        assert found[inside].tolist() == [int(value)] * len(inside)
        assert found.count_nonzero() <= len(inside)


@pytest.mark.parametrize("n_set", [0, 1, 95, 96])
def test_votes_of_a_block_count_all_its_threads(launch: EmulatedLaunch, n_set: int) -> None:
    x = (torch.randperm(96) < n_set).to(torch.int32) * 5
    y = torch.full((3, 96), -1, dtype=torch.int32)
    one_block(launch, "warps/votes_of_block", 96, x, y)
    assert torch.equal(y.amin(1), y.amax(1))
    assert y[:, 0].tolist() == [n_set, n_set > 0, n_set == 96]


def test_products_of_int8_are_exact(launch: EmulatedLaunch) -> None:
    a = torch.randint(-128, 128, (16, 32), dtype=torch.int8)
    b = torch.randint(-128, 128, (32, 8), dtype=torch.int8)
    d = torch.randint(-(2**20), 2**20, (16, 8), dtype=torch.int32)
    wanted = d.numpy() + a.numpy().astype(np.int32) @ b.numpy().astype(np.int32)
    one_block(launch, "warps/product_of_int8", 32, a, b, d)
    assert np.array_equal(d.numpy(), wanted)


def test_products_of_float16_are_off_by_roundings_of_their_sum(launch: EmulatedLaunch) -> None:
    a, b, d = torch.randn(16, 16).half(), torch.randn(16, 8).half(), torch.randn(16, 8)
    wanted = d.double() + a.double() @ b.double()
    # Products of float16 are exact in float32; 16 additions of at most the sum of the magnitudes.
    allowed = 16 * 2.0**-24 * (d.double().abs() + a.double().abs() @ b.double().abs())
    one_block(launch, "warps/product_of_half", 32, a, b, d)
    assert ((d - wanted).abs() <= allowed).all()


def test_ldmatrix_hands_out_rows_by_the_addresses_of_their_lanes(launch: EmulatedLaunch) -> None:
    x = torch.randint(-(2**31), 2**31, (4, 8, 4), dtype=torch.int32)
    y = torch.zeros(32, 4, dtype=torch.int32)
    one_block(launch, "warps/loaded_tiles", 32, x, y)
    assert torch.equal(y, x.reshape(4, 32).T)  # lane l: word l % 4 of row l / 4, of each tile


def test_threads_and_blocks_take_turns_in_the_order_asked_for(launch: EmulatedLaunch) -> None:
    blocks, threads = 5, 64

    def turns() -> tuple[list[int], list[list[int]]]:
        which = torch.zeros(blocks, dtype=torch.int32)
        of_threads = torch.zeros(blocks, threads, dtype=torch.int32)
        counts = [torch.zeros(1, dtype=torch.int32) for _ in range(2)]
        launch("warps/turns", (blocks, 1, 1), threads, which, of_threads, *counts)
        return which.tolist(), of_threads.tolist()

    which, of_threads = turns()
    ascending, every = list(range(blocks)), list(range(blocks * threads))
    flat = [turn for block in of_threads for turn in block]
    if launch.order == FORWARD:
        assert (which, flat) == (ascending, every)
    elif launch.order == REVERSE:
        assert (which, flat) == (ascending[::-1], every[::-1])
    else:
        assert sorted(flat) == every
        assert flat not in (every, every[::-1])
        assert which not in (ascending, ascending[::-1])
        assert sorted(which) == ascending
        assert turns() == (which, of_threads), "an order must be the same every time"


def test_words_are_turned_as_cuda_does(launch: EmulatedLaunch) -> None:
    random = np.random.default_rng(0)
    a, b, c = (random.integers(0, 2**32, WORDS, dtype=np.uint32) for _ in range(3))
    a[:4] = 0, 1, 2**31, 2**32 - 1
    y = torch.zeros(12, WORDS, dtype=torch.int32)
    one_block(launch, "operations/on_words", WORDS, *map(torch.from_numpy, (a, b, c)), y)

    def wanted(a: int, b: int, c: int) -> list[int]:
        ones = bin(a).count("1")
        both, by = b << 32 | a, c & 31
        permuted = [both >> 8 * (c >> 4 * i & 7) & 0xFF for i in range(4)]
        products = np.frombuffer(np.uint32([a, b]).tobytes(), np.int8).astype(int).reshape(2, 4)
        signed = min(np.uint32([a, b]).view(np.int32).tolist())
        return [
            ones, 32 - a.bit_length(), (a & -a).bit_length(), int(f"{a:032b}"[::-1], 2),
            both >> by, both << by >> 32, int.from_bytes(bytes(permuted), "little"),
            c + int(products.prod(0).sum()), a * b >> 32, signed, max(a, b), a,
        ]  # fmt: skip

    for i, values in enumerate(zip(a.tolist(), b.tolist(), c.tolist(), strict=True)):
        assert y[:, i].numpy().view(np.uint32).tolist() == [v % 2**32 for v in wanted(*values)]


def test_fractions_become_integers_as_cuda_rounds_and_saturates(launch: EmulatedLaunch) -> None:
    x = torch.cat([torch.randn(200) * 100, torch.arange(-8, 8) + 0.5, torch.arange(40) * 1e8])
    x = torch.cat([x, torch.tensor([1e20, -1e20, float("nan"), 2.0**31, -(2.0**31)])])
    y = torch.zeros(4, len(x), dtype=torch.int32)
    one_block(launch, "operations/to_integers", len(x), x, y)
    for found, rounded in zip(y, (np.rint, np.trunc, np.floor, np.ceil), strict=True):
        wanted = np.nan_to_num(rounded(x.double().numpy())).clip(-(2**31), 2**31 - 1)
        assert np.array_equal(found.numpy(), wanted)


def test_fractions_are_rounded_once_and_never_fused_unasked(launch: EmulatedLaunch) -> None:
    a, b, c = (torch.randn(WORDS) for _ in range(3))
    y = torch.zeros(9, WORDS)
    one_block(launch, "operations/on_floats", WORDS, a, b, c, y)
    wide = a.double()
    # A product of float32 is exact in float64; the sum with c may not be, but a test of this many
    # draws nothing so close to the middle between two float32 that its rounding matters.
    fused = (wide * b.double() + c.double()).float()
    # CUDA's and the C library's exp differ in the last bits only: 1e-6 is 8 units of float32.
    roots = wide.abs().sqrt()
    rounded = [a * b + c, fused, a / b, 1 / a, roots.float(), (1 / roots).float(), a * b]
    assert torch.equal(y[:7], torch.stack(rounded))
    assert torch.allclose(y[7], wide.exp().float(), rtol=1e-6, atol=0)
    assert torch.equal(y[8], a.half().float())
    assert not torch.equal(y[0], y[1])


def test_atomic_operations_lose_nothing(launch: EmulatedLaunch) -> None:
    n = 96
    at = torch.zeros(9, dtype=torch.int32)
    at[4] = -1
    was = torch.zeros(9, n, dtype=torch.int32)
    one_block(launch, "operations/atomics", n, at, was)
    first = int((was[7] == 0).nonzero())  # who came first set it, and nobody after
    last = at[6].item()
    total = n * (n - 1) // 2
    assert at.tolist() == [total, -total, n - 1, 1 - n, 0, -1, last, first + 1, n % 10]
    by = torch.arange(n, dtype=torch.int32)
    for found in (was[0], -was[1]):  # in some order each found what those before it had left
        order = found.argsort(stable=True)
        assert torch.equal(found[order].diff(), by[order][:-1])
    assert sorted([*was[6].tolist(), last]) == [0, *range(n)]
    assert sorted(was[8].tolist()) == sorted(i % 10 for i in range(n))


def test_parameters_keep_their_values(launch: EmulatedLaunch) -> None:
    x, y = torch.randn(4), torch.zeros(4, dtype=torch.float64)
    one_block(launch, "operations/parameters", 1, x, 2, -(2**40) - 1, 0.1, y)
    assert y.tolist() == [2, -(2**40) - 1, float(np.float32(0.1)), x[2].item()]


def test_every_block_begins_with_shared_memory_nobody_has_written(launch: EmulatedLaunch) -> None:
    y = torch.zeros(3, 2, dtype=torch.int32)
    launch("operations/unwritten", (3, 1, 1), 1, y, shared_bytes=4)
    assert set(y.flatten().tolist()) == {-1 if launch.order == FORWARD else 0x7B7B7B7B}
