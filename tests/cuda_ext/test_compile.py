"""CUDA sources in, machine code out, and what is kept on disk."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from cuda_ext import compile as compiling
from cuda_ext.compile import KERNELS, CompileError, Compiler
from cuda_ext.cubin import kernel_names
from tests.cuda_ext import test_launches_on_a_card

pytest.importorskip("cuda.core", reason="the compiler is cuda-core's")

TWICE = """
#include "factor.cuh"
extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= kFactor; }
extern "C" __global__ void nothing() {}
"""
ADD = """
#include <cuda_fp16.h>
#include <cstdint>
#include "quant/layout.h"
extern "C" __global__ void add(__half* x, uint64_t n) { x[n] = __hadd(x[n], x[n + 1]); }
"""


class Listener:
    """Remembers what was announced."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def compiler(tmp_path: Path) -> Compiler:
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "twice.cu").write_text(TWICE)
    (sources / "add.cu").write_text(ADD)
    (sources / "factor.cuh").write_text("constexpr float kFactor = 2.f;")
    return Compiler(sm=89, cache=tmp_path / "cache" / "kernels", sources=sources)


def entries(compiler: Compiler) -> dict[str, Path]:
    """The one entry of each source."""
    found = sorted(compiler.cache.iterdir())
    assert len({path.name.split("-")[0] for path in found}) == len(found)
    return {path.name.split("-")[0]: path for path in found}


def must_not_compile(*_: object) -> bytes:
    raise AssertionError("compiled again")


def test_a_first_run_says_so_once_and_a_second_reads_the_same_from_disk(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = Listener()
    made = compiler.compile_all(listener)
    assert listener.lines == ["compiling GPU kernels for sm_89, once: add, twice"]
    assert {file: kernel_names(code) for file, code in made.items()} == {
        "add": ["add"],
        "twice": ["nothing", "twice"],
    }
    monkeypatch.setattr(Compiler, "_make", must_not_compile)
    assert compiler.compile_all(listener) == made
    assert len(listener.lines) == 1


def test_only_the_source_that_changed_is_compiled_again(compiler: Compiler) -> None:
    made, listener = compiler.compile_all(Listener()), Listener()
    (compiler.sources / "twice.cu").write_text(TWICE.replace("*=", "+="))
    again = compiler.compile_all(listener)
    assert listener.lines == ["compiling GPU kernels for sm_89, once: twice"]
    assert again["add"] == made["add"]
    assert again["twice"] != made["twice"]


def test_a_changed_header_is_noticed_and_a_header_put_back_is_remembered(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, header = compiler.compile_all(Listener()), compiler.sources / "factor.cuh"
    text = header.read_text()
    header.write_text(text.replace("2.f", "3.f"))
    assert compiler.compile_all(Listener())["twice"] != made["twice"]
    header.write_text(text)
    monkeypatch.setattr(Compiler, "_make", must_not_compile)
    assert compiler.compile_all(Listener()) == made


def test_a_header_edited_during_a_compilation_does_not_spoil_the_cache(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    header, options = compiler.sources / "factor.cuh", Compiler._options
    text = header.read_text()

    def edit_just_before(self: Compiler, headers: Path, name: str = "any.cu") -> object:
        if name == "twice.cu":  # it is this one's turn
            header.write_text(text.replace("2.f", "3.f"))
        return options(self, headers, name)

    with monkeypatch.context() as patch:
        patch.setattr(Compiler, "_options", edit_just_before)
        edited = compiler.compile_all(Listener())["twice"]
    header.write_text(text)
    assert compiler.compile_all(Listener())["twice"] != edited


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(compiling, "_nvrtc_version", lambda: "99.0"),
        lambda patch: patch.setattr(compiling, "_LAYOUT", KERNELS / "nvrtc" / "cstdint"),
    ],
    ids=["NVRTC", "the layout"],
)
def test_another_compiler_or_layout_is_another_entry(
    compiler: Compiler,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[pytest.MonkeyPatch], None],
) -> None:
    compiler.compile_all(Listener())
    before, listener = entries(compiler), Listener()
    (compiler.sources / "add.cu").unlink()  # it includes the layout, which is about to go
    change(monkeypatch)
    compiler.compile_all(listener)
    assert listener.lines == ["compiling GPU kernels for sm_89, once: twice"]
    assert len(list(compiler.cache.iterdir())) == len(before) + 1


def test_each_architecture_has_code_of_its_own(compiler: Compiler) -> None:
    other = Compiler(sm=120, cache=compiler.cache, sources=compiler.sources)
    assert compiler.compile_all(Listener()) != other.compile_all(Listener())


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:20],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: content[:500] + bytes([content[500] ^ 1]) + content[501:],
    ],
    ids=["empty", "shorter than a digest", "cut", "longer", "a bit turned"],
)
def test_a_damaged_entry_is_made_again(
    compiler: Compiler, damage: Callable[[bytes], bytes]
) -> None:
    made, listener = compiler.compile_all(Listener()), Listener()
    entry = entries(compiler)["twice"]
    sound = entry.read_bytes()
    entry.write_bytes(damage(sound))
    assert compiler.compile_all(listener) == made
    assert listener.lines == ["compiling GPU kernels for sm_89, once: twice"]
    assert entry.read_bytes() == sound


def test_nvrtcs_log_is_in_the_error(compiler: Compiler) -> None:
    (compiler.sources / "twice.cu").write_text(TWICE.replace("kFactor", "kVector"))
    with pytest.raises(CompileError, match=r"^twice.cu: NVRTC refused it for sm_89.\n") as caught:
        compiler.compile_all(Listener())
    assert 'twice.cu(3): error: identifier "kVector" is undefined' in str(caught.value)


def test_what_is_refused_is_not_kept_but_the_others_are(compiler: Compiler) -> None:
    (compiler.sources / "twice.cu").write_text("nonsense")
    with pytest.raises(CompileError):
        compiler.compile_all(Listener())
    assert list(entries(compiler)) == ["add"]


def test_a_card_that_nvrtc_does_not_know_is_one_line(compiler: Compiler) -> None:
    unknown = Compiler(sm=999, cache=compiler.cache, sources=compiler.sources)
    with pytest.raises(CompileError, match=r"^NVRTC \d+\.\d compiles for .*, but the card is sm_9"):
        unknown.compile_all(Listener())


def test_a_cache_that_cannot_be_written_is_one_line(compiler: Compiler) -> None:
    compiler.cache.parent.write_text("a file where a folder should be")
    with pytest.raises(CompileError, match=r"gave Not a directory. Set LOWMOE_HOME to another"):
        compiler.compile_all(Listener())


def test_a_disk_that_is_full_leaves_no_part_of_an_entry(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CompileError, match="gave No space left on device"):
        compiler.compile_all(Listener())
    assert list(compiler.cache.iterdir()) == []


def test_missing_headers_are_one_line(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cuda.pathfinder.find_nvidia_header_directory", lambda name: None)
    with pytest.raises(CompileError, match=r"CUDA's headers.*pip install nvidia-cuda-runtime"):
        compiler.compile_all(Listener())


def test_a_missing_compiler_is_one_line(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise RuntimeError("libnvrtc.so could not be loaded")

    monkeypatch.setattr("cuda.bindings.nvrtc.nvrtcVersion", missing)
    with pytest.raises(CompileError, match=r"GPU kernels need NVRTC.*pip install cuda-bindings nv"):
        compiler.compile_all(Listener())


def test_a_missing_cuda_core_is_one_line(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(CompileError, match=r"GPU kernels need cuda-core.*'lowmoe\[cuda\]'"):
        compiler.compile_all(Listener())


def _make(compiler: Compiler, start: Barrier) -> int:
    start.wait()
    return sum(map(len, compiler.compile_all(Listener()).values()))


def test_processes_that_compile_at_once_do_not_disturb_each_other(compiler: Compiler) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(3) as pool:
        start = manager.Barrier(3)
        sizes = pool.starmap(_make, [(compiler, start)] * 3)
    assert len(set(sizes)) == 1
    assert set(entries(compiler)) == {"add", "twice"}  # no parts left either
    listener = Listener()
    compiler.compile_all(listener)
    assert listener.lines == []


def test_what_only_tests_on_a_card_run_compiles_everywhere(compiler: Compiler) -> None:
    (compiler.sources / "toy.cu").write_text(test_launches_on_a_card.SOURCE)
    emulator = test_launches_on_a_card.EMULATOR_KERNELS
    for sources in (compiler.sources, emulator):
        Compiler(sm=90, cache=compiler.cache, sources=sources).compile_all(Listener())


def test_importing_does_not_import_cuda_core() -> None:
    # torch imports cuda.bindings by itself where it finds them.
    code = "import sys, cuda_ext.card, cuda_ext.on_card\nprint('cuda.core' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
