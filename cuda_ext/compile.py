"""CUDA sources in, machine code for one kind of card out, kept on disk.

NVRTC compiles within this process: a user needs no CUDA toolkit and, to compile, no card.
Machine code rather than PTX, because a driver refuses the PTX of a newer NVRTC but loads the
machine code of its own CUDA major. What was made is kept under a name that hashes all it was made
from, so it is never out of date; a file that is not what was once written is made again.

Knows:        NVRTC through cuda-core, its options, the files of the cache.
Ignorant of:  cards and drivers, what kernels compute, who is told that it takes a while.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import quant

if TYPE_CHECKING:
    from cuda.core import ProgramOptions

KERNELS = Path(__file__).parent / "kernels"
INSTALL = "pip install 'lowmoe[cuda]'"
_LAYOUT = Path(quant.__file__).parent / "layout.h"
_TOOLKIT_HEADERS = ("cuda_fp16.h", "cuda_fp16.hpp")  # those of them that kernels include
_DIGEST_BYTES = hashlib.sha256().digest_size

Announce = Callable[[str], None]  # takes one line that says what will take seconds


class CompileError(Exception):
    """Kernels could not be compiled: one line of why, then NVRTC's log if there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiler:
    """NVRTC for one architecture, with the memory of a folder.

    sm: 89 for sm_89; cache: the folder of what was compiled, made when needed; sources: the folder
    of *.cu and *.cuh. Headers of ours are found from anywhere.
    """

    sm: int
    cache: Path
    sources: Path = KERNELS

    def compile_all(self, announce: Announce) -> dict[str, bytes]:
        """The machine code of every *.cu, an ELF file, by the name of its source without ".cu".

        announce: called once, before anything is compiled; not at all if nothing has to be.
        Raises CompileError if NVRTC or its headers are missing, if it does not know the
        architecture or refuses a source, or if the cache cannot be used.
        """
        headers = _toolkit_headers()
        _check_known(self.sm)
        shared = self._digest_of_what_all_share(headers)
        entries = {path: self._entry(path, shared) for path in sorted(self.sources.glob("*.cu"))}
        with _blaming(self.cache):
            codes = {path: _read(entry) for path, entry in entries.items()}
        missing = [path for path, code in codes.items() if code is None]
        if missing:
            names = ", ".join(path.stem for path in missing)
            announce(f"compiling GPU kernels for sm_{self.sm}, once: {names}")
        # Side by side: NVRTC allows it, and cuda-core gives up the GIL. On two cores, two sources
        # of equal size took as long as one.
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            made = pool.map(lambda path: self._make(path, entries[path], headers), missing)
            codes.update(zip(missing, made, strict=True))
        return {path.stem: code for path, code in codes.items() if code is not None}

    def _options(self, headers: Path, name: str = "any.cu") -> "ProgramOptions":
        """name: what NVRTC's log calls the source."""
        from cuda.core import ProgramOptions

        # The stand-ins come last: they are for headers that nobody else has.
        folders = (self.sources, KERNELS, _LAYOUT.parent.parent, headers, KERNELS / "nvrtc")
        return ProgramOptions(
            name=name,
            arch=f"sm_{self.sm}",
            std="c++20",
            fma=False,  # products and sums are rounded one by one, as on the CPU; or say fmaf
            device_as_default_execution_space=True,  # for the constexpr functions of layout.h
            lineinfo=True,  # for profilers; costs no instruction
            include_path=[str(folder) for folder in folders],
        )

    def _digest_of_what_all_share(self, headers: Path) -> bytes:
        """Of everything but a source itself that decides what NVRTC makes of it."""
        files = [*sorted(self.sources.glob("*.cuh")), *sorted(KERNELS.glob("*.cuh"))]
        files += [*sorted(KERNELS.glob("nvrtc/*")), _LAYOUT]
        files += [headers / name for name in _TOOLKIT_HEADERS]
        parts = [_nvrtc_version().encode(), *self._options(headers).as_bytes("nvrtc", "cubin")]
        for file in files:
            parts += [file.name.encode(), file.read_bytes()]
        return _digest(parts)

    def _entry(self, path: Path, shared: bytes) -> Path:
        key = _digest([shared, path.name.encode(), path.read_bytes()]).hex()
        return self.cache / f"{path.stem}-sm_{self.sm}-{key[:32]}.cubin"

    def _make(self, path: Path, entry: Path, headers: Path) -> bytes:
        from cuda.core import Program

        source = path.read_text(encoding="utf-8")
        program = Program(source, "c++", self._options(headers, path.name))
        try:
            code = bytes(program.compile("cubin").code)
        except Exception as e:  # of a class that cuda-core has no public name for
            log = str(e).rstrip("\0 \n")
            raise CompileError(f"{path.name}: NVRTC refused it for sm_{self.sm}.\n{log}") from e
        # Whoever edits sources meanwhile must not find this under the name of what they were.
        if entry == self._entry(path, self._digest_of_what_all_share(headers)):
            with _blaming(self.cache):
                _write(entry, code)
        return code


def _toolkit_headers() -> Path:
    """The folder of NVIDIA's headers, which come with torch."""
    try:
        import cuda.core  # noqa: F401
        from cuda.pathfinder import find_nvidia_header_directory
    except ImportError as e:
        raise CompileError(f"GPU kernels need cuda-core, which is missing: {INSTALL}.") from e
    folder = find_nvidia_header_directory("cudart")
    if folder is None:
        raise CompileError(
            "GPU kernels need CUDA's headers, which come with a torch for CUDA, but none were "
            "found: pip install nvidia-cuda-runtime."
        )
    return Path(folder)


def _nvrtc() -> Any:
    """The bindings, with the library they bind."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as e:  # the latter if there is no library
        raise CompileError(
            "GPU kernels need NVRTC, which comes with a torch for CUDA, but it was not found: "
            "pip install cuda-bindings nvidia-cuda-nvrtc."
        ) from e
    return nvrtc


def _nvrtc_version() -> str:
    _, major, minor = _nvrtc().nvrtcVersion()
    return f"{major}.{minor}"


def _check_known(sm: int) -> None:
    _, known = _nvrtc().nvrtcGetSupportedArchs()
    if sm not in known:
        raise CompileError(
            f"NVRTC {_nvrtc_version()} compiles for sm_{min(known)} to sm_{max(known)}, but the "
            f"card is sm_{sm}. Install a torch for a newer CUDA."
        )


def _digest(parts: list[bytes]) -> bytes:
    """Of each part by itself, so that moving bytes from one to the next changes it."""
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()


def _read(entry: Path) -> bytes | None:
    """The machine code, or None if there is none or it is not what was written.

    Its SHA-256 follows the ELF file in the same file; cuobjdump and nvdisasm do not mind.
    """
    try:
        content = entry.read_bytes()
    except FileNotFoundError:
        return None
    code, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write(entry: Path, code: bytes) -> None:
    """All of it or nothing, whoever else writes the same at the same time."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=entry.parent, suffix=".part", delete=False) as file:
        try:
            file.write(code + hashlib.sha256(code).digest())
            file.close()  # before the renaming, which Windows refuses for open files
            os.replace(file.name, entry)
        except OSError:
            Path(file.name).unlink()
            raise


@contextmanager
def _blaming(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise CompileError(
            f"{folder}: keeping compiled GPU kernels there gave {e.strerror}. Set LOWMOE_HOME to "
            "another folder."
        ) from e
