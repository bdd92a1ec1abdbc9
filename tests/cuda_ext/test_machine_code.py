"""What NVRTC makes of the kernels is what was meant: looked at in the machine code that users get.

A new kernel belongs into EXPECTED; what its loop costs, benchmarks/gpu_instructions.py counts.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache

import pytest

pytest.importorskip("cuda.core", reason="the compiler is cuda-core's")

from tests.cuda_ext.machine_code import (
    ARCHITECTURES,
    DP4A,
    HMMA,
    IMMA,
    KernelCode,
    parse,
    read_kernels,
)

LOAD_16_BYTES = r"LDG\.[\w.]*128"
COPY_16_BYTES = r"LDGSTS\.[\w.]*128"  # cp.async, from global to shared memory
SPILL = r"LDL|STL"


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a kernel must be.

    kernels: whose "file/name" is this regular expression; most_registers: of a thread, so that as
    many threads fit a multiprocessor, which has 65536, as it was written for; opcodes: regular
    expressions of how opcodes begin that must be there; sms: where this holds.
    """

    kernels: str
    most_registers: int
    opcodes: tuple[str, ...] = ()
    sms: tuple[int, ...] = ARCHITECTURES


EXPECTED = (
    # Blocks of 256 threads, two of them on a multiprocessor.
    Expected(kernels=r"attention/attend_\w+", most_registers=128, opcodes=(LOAD_16_BYTES,)),
    Expected(
        kernels=r"(linear|experts)/\w+",
        most_registers=128,
        opcodes=(LOAD_16_BYTES, COPY_16_BYTES, IMMA),
    ),
    # Of small tiles two blocks, where a multiprocessor has the shared memory for them.
    Expected(
        kernels=r"tiles_[12]/\w+_32",
        most_registers=128,
        opcodes=(COPY_16_BYTES, IMMA),
        sms=(90,),
    ),
    Expected(
        kernels=r"tiles_[12]/\w+_32",
        most_registers=255,
        opcodes=(COPY_16_BYTES, IMMA),
        sms=(80, 86, 89, 120),
    ),
    Expected(
        kernels=r"tiles_3/\w+_32|tiles_\d/\w+_128",
        most_registers=255,
        opcodes=(COPY_16_BYTES, IMMA),
    ),
    # Four blocks of 256 threads.
    Expected(kernels=r"tiles/add_\w+|rope/\w+|vectors/(embed|gate_round)", most_registers=64),
    # Blocks of up to 1024 threads.
    Expected(kernels=r"routing/(choose|choose_near|group)", most_registers=64),
    Expected(
        kernels=r"routing/(norm_)?route_\d|vectors/(norm_)?round_\w+",
        most_registers=64,
        opcodes=(LOAD_16_BYTES,),
    ),
)


def complaints(kernels: Mapping[str, KernelCode], expected: tuple[Expected, ...]) -> list[str]:
    """Where kernels are not as expected, and where there is nothing to expect."""
    found = []
    for row in expected:
        if not any(re.fullmatch(row.kernels, name) for name in kernels):
            found.append(f"no kernel is {row.kernels}")
    for name, code in kernels.items():
        rows = [row for row in expected if re.fullmatch(row.kernels, name)]
        if len(rows) != 1:
            found.append(f"{name} is in {len(rows)} rows of the table")
        if code.has(SPILL) or code.stack_bytes:
            found.append(f"{name} spills: {code.stack_bytes} bytes of stack")
        for row in rows:
            if code.registers > row.most_registers:
                found.append(f"{name}: {code.registers} registers, {row.most_registers} at most")
            found += [f"{name} has no {op}" for op in row.opcodes if not code.has(op)]
    return found


@pytest.fixture(scope="session")
def kernels_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, KernelCode]]:
    """All kernels, compiled for an architecture."""
    folder = tmp_path_factory.mktemp("cubins")
    return cache(lambda sm: read_kernels(sm, folder, lambda line: None))


@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_the_machine_code_is_what_was_meant(
    kernels_of: Callable[[int], dict[str, KernelCode]], sm: int
) -> None:
    expected = tuple(row for row in EXPECTED if sm in row.sms)
    found = complaints(kernels_of(sm), expected)
    assert not found, "\n".join(found)


TOY = """
#include "portable.cuh"
using namespace lowmoe;
extern "C" __global__ void products(const uint4* w, const unsigned* x, int n, float* y) {
  DYNAMIC_SHARED(unsigned, shared);
  cp_async16(shared, x + 4 * threadIdx.x);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  int sum = 0, ints[4] = {};
  float floats[4] = {};
#pragma unroll 1
  for (int i = 0; i < n; i++) {
    const uint4 v = load_once(w + 32 * i + threadIdx.x);
    sum = __dp4a(static_cast<int>(v.x), static_cast<int>(shared[i]), sum);
    sum = __dp4a(static_cast<int>(v.y ^ v.z), static_cast<int>(v.w), sum);
  }
  const unsigned a[4] = {shared[0], shared[1], shared[2], shared[3]}, b[2] = {a[1], a[2]};
  mma_m16n8k32(ints, a, b);
  mma_m16n8k16(floats, a, b);
  y[threadIdx.x] = sum + ints[0] + ints[1] + ints[2] + ints[3] + floats[0] + floats[3];
}
// Which place of the array is meant only the card knows, so it is in local memory.
extern "C" __global__ void spills(const int* x, int n, int* y) {
  int many[64] = {};
  for (int i = 0; i < n; i++) many[x[i] % 64] += i;
  y[threadIdx.x] = many[threadIdx.x];
}
"""


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, KernelCode]]:
    """Of two kernels that are known, for an architecture."""
    folder = tmp_path_factory.mktemp("toys")
    sources = folder / "sources"
    sources.mkdir()
    (sources / "toy.cu").write_text(TOY)
    return cache(lambda sm: read_kernels(sm, folder, lambda line: None, sources))


@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_every_opcode_that_the_table_may_ask_for_is_recognized(
    toys: Callable[[int], dict[str, KernelCode]], sm: int
) -> None:
    opcodes = (LOAD_16_BYTES, COPY_16_BYTES, DP4A, IMMA, HMMA)
    row = Expected(kernels="toy/products", most_registers=64, opcodes=opcodes)
    assert complaints({"toy/products": toys(sm)["toy/products"]}, (row,)) == []


@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_the_loop_that_multiplies_is_found(
    toys: Callable[[int], dict[str, KernelCode]], sm: int
) -> None:
    loop = toys(sm)["toy/products"].innermost(DP4A)
    assert loop is not None
    assert (loop.count(DP4A), loop.count("LDG"), loop.count("LDS")) == (2, 1, 1)
    assert toys(sm)["toy/products"].innermost(IMMA) is None  # it is in none


@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_each_fault_is_complained_about(
    toys: Callable[[int], dict[str, KernelCode]], sm: int
) -> None:
    kernels = toys(sm)
    products = Expected(kernels="toy/products", most_registers=64)
    spills = Expected(kernels="toy/spills", most_registers=64)
    assert complaints(kernels, (products, spills)) == ["toy/spills spills: 256 bytes of stack"]
    del kernels["toy/spills"]
    few = replace(products, most_registers=8)
    assert len(complaints(kernels, (few,))) == 1
    assert "8 at most" in complaints(kernels, (few,))[0]
    more = replace(products, opcodes=("FFMA.SAT",))
    assert complaints(kernels, (more,)) == ["toy/products has no FFMA.SAT"]
    assert complaints(kernels, ()) == ["toy/products is in 0 rows of the table"]
    assert complaints(kernels, (products, spills)) == ["no kernel is toy/spills"]
    assert complaints(kernels, (products, replace(products, kernels=r"toy/\w+"))) == [
        "toy/products is in 2 rows of the table"
    ]


NESTED = """
	.section	.text.nested,"ax",@progbits
.text.nested:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_1:
        /*0010*/              @!P1 IDP.4A.S8.S8 R1, R2, R3, R1 ;
.L_x_0:
        /*0020*/                   IDP.4A.S8.S8 R4, R5, R6, R4 ;
        /*0030*/                   IDP.4A.S8.S8 R4, R5, R7, R4 ;
        /*0040*/              @!P0 BRA `(.L_x_2) ;
        /*0050*/                   SHF.R.U32.HI R5, RZ, 0x6, R5 ;
.L_x_2:
        /*0060*/              @UP0 BRA.U `(.L_x_0) ;
        /*0070*/               @P1 BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
.L_x_3:
        /*0090*/                   BRA `(.L_x_3);
        /*00a0*/                   NOP;
.L_x_4:
"""


def test_of_loops_within_loops_the_inner_one_counts() -> None:
    usage = " Function nested:\n  REG:8 STACK:0 SHARED:16 LOCAL:0 CONSTANT[0]:380\n"
    kernel = parse(usage, NESTED)["nested"]
    assert (kernel.registers, kernel.stack_bytes, kernel.shared_bytes) == (8, 0, 16)
    assert len(kernel.loops) == 2
    inner = kernel.innermost(DP4A)
    assert inner is not None
    assert inner.usual == ("IDP.4A.S8.S8", "IDP.4A.S8.S8", "BRA", "BRA.U")
    assert inner.opcodes == (*inner.usual[:3], "SHF.R.U32.HI", "BRA.U")
