"""What NVRTC made of the kernels: registers, opcodes, what is in their loops.

Knows:        cubins, NVIDIA's cuobjdump and nvdisasm, how they print.
Ignorant of:  what any of it should be.
"""

import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cuda.pathfinder import find_nvidia_binary_utility

from cuda_ext.compile import KERNELS, Announce, Compiler

ARCHITECTURES = (80, 86, 89, 90, 120)  # that lowmoe is made for
DP4A, IMMA, HMMA = "IDP.4A", "IMMA", "HMMA"
# What a turn of a loop that multiplies is there for: products, and looking up weights.
WORK = (DP4A, IMMA, HMMA, "LDS")
# As the tools print. A predicate may stand before an opcode: "@!P0 BRA `(.L_x_3) ;".
_RESOURCES = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_SECTION = re.compile(r"^\s*\.section\s+\.text\.(\w+)", re.M)
_LABEL = re.compile(r"^(\.L\w+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*)")
_TARGET = re.compile(r"`\((\.L\w+)\)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """From where a branch goes back to, up to that branch.

    begin, end: places in the kernel; opcodes: everything there; usual: without what a branch within
    the loop jumps over, unless a tenth of that is WORK.
    """

    begin: int
    end: int
    opcodes: tuple[str, ...]
    usual: tuple[str, ...]

    def count(self, *begins: str) -> int:
        """Instructions of these opcodes, each as often as it is there."""
        return sum(opcode.startswith(begins) for opcode in self.opcodes)

    def holds(self, other: "Loop") -> bool:
        """Whether the other is inside."""
        return other is not self and self.begin <= other.begin and other.end <= self.end


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCode:
    """One kernel.

    registers, stack_bytes: of a thread, the latter for what was spilled and for arrays indexed by
    what only the card knows; shared_bytes: of a block, static ones.
    """

    registers: int
    stack_bytes: int
    shared_bytes: int
    opcodes: tuple[str, ...]
    loops: tuple[Loop, ...]

    def has(self, pattern: str) -> bool:
        """Whether an opcode begins as this regular expression says."""
        return any(re.match(pattern, opcode) for opcode in self.opcodes)

    def innermost(self, product: str) -> Loop | None:
        """The loop that multiplies by this opcode and has no other such in it; with most of it."""
        found = [loop for loop in self.loops if loop.count(product)]
        inner = [loop for loop in found if not any(map(loop.holds, found))]
        return max(inner, key=lambda loop: loop.count(product), default=None)


def read_kernels(
    sm: int, cache: Path, announce: Announce, sources: Path = KERNELS
) -> dict[str, KernelCode]:
    """Every kernel of the sources by "file/name", compiled for sm."""
    cubins = Compiler(sm=sm, cache=cache, sources=sources).compile_all(announce)
    with ThreadPoolExecutor() as pool:
        read = zip(cubins, pool.map(_disassemble, cubins.values()), strict=True)
        return {f"{file}/{name}": code for file, found in read for name, code in found.items()}


def _disassemble(cubin: bytes) -> dict[str, KernelCode]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cubin"
        path.write_bytes(cubin)
        return parse(_output("cuobjdump", "-res-usage", path), _output("nvdisasm", "-c", path))


def _output(tool: str, option: str, path: Path) -> str:
    program = find_nvidia_binary_utility(tool)
    assert program is not None, f"{tool} is missing: pip install -e '.[test]'"
    return subprocess.run(
        [program, option, path], capture_output=True, text=True, check=True
    ).stdout


def parse(resources: str, assembly: str) -> dict[str, KernelCode]:
    """From what `cuobjdump -res-usage` and `nvdisasm -c` print."""
    usage = {name: map(int, numbers) for name, *numbers in _RESOURCES.findall(resources)}
    _, *parts = _SECTION.split(assembly)  # what is before the first; then name, body, name, ...
    kernels = {}
    for name, body in zip(parts[::2], parts[1::2], strict=True):
        registers, stack_bytes, shared_bytes = usage[name]
        opcodes, branches = _read(body)
        kernels[name] = KernelCode(
            registers=registers,
            stack_bytes=stack_bytes,
            shared_bytes=shared_bytes,
            opcodes=opcodes,
            loops=tuple(
                _loop(target, at + 1, opcodes, branches) for at, target in branches if target < at
            ),
        )
    return kernels


def _loop(begin: int, end: int, opcodes: tuple[str, ...], branches: list[tuple[int, int]]) -> Loop:
    skipped: set[int] = set()
    for at, target in branches:
        over = opcodes[at + 1 : target]
        inside = begin <= at < target < end
        if inside and 10 * sum(opcode.startswith(WORK) for opcode in over) < len(over):
            skipped.update(range(at + 1, target))
    return Loop(
        begin=begin,
        end=end,
        opcodes=opcodes[begin:end],
        usual=tuple(opcodes[i] for i in range(begin, end) if i not in skipped),
    )


def _read(body: str) -> tuple[tuple[str, ...], list[tuple[int, int]]]:
    """Opcodes in order, and of each branch its place and the one it goes to."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    for line in body.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(opcodes)
        elif instruction := _INSTRUCTION.match(line):
            if instruction[1].startswith("BRA") and (target := _TARGET.search(instruction[2])):
                jumps.append((len(opcodes), target[1]))
            opcodes.append(instruction[1])
    # What goes to itself ends every kernel, and is no loop.
    return tuple(opcodes), [(at, labels[to]) for at, to in jumps if labels[to] != at]
