"""Makes a library of a kernel file with g++, once for each content of everything that goes into it.

Knows:        compiler flags, sanitizers, where CUDA's headers and the results are.
Ignorant of:  what is in a kernel file but its #include lines.
"""

import enum
import hashlib
import os
import re
import subprocess
from functools import cache
from pathlib import Path

from cuda import pathfinder
from filelock import FileLock

EMULATOR = Path(__file__).parent
REPOSITORY = EMULATOR.parent.parent
KERNELS = REPOSITORY / "cuda_ext" / "kernels"
LIBRARIES = REPOSITORY / "build" / "cuda_emulator"

_KEPT = 4  # libraries of one file and build; a day of changes leaves half a gigabyte otherwise
_INCLUDE = re.compile(rb'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
_FLAGS = [
    *("-std=c++20", "-shared", "-fPIC", "-Wall", "-Werror"),
    # Vectors of 16 bytes are read where other types were written, as device code does everywhere.
    "-fno-strict-aliasing",
    "-ffp-contract=off",  # as NVRTC's -fmad=false
    # `#pragma unroll`, and functions of headers that one kernel file does not use.
    *("-Wno-unknown-pragmas", "-Wno-unused-function"),
    *("-fvisibility=hidden", "-fno-gnu-unique"),  # two libraries in one process share nothing
    "-fdata-sections",  # one for each __shared__ variable, for shared_memory.ld to gather
]


class Build(enum.Enum):
    """How a library is compiled; under a sanitizer the process must have been started for it."""

    PLAIN = "-O2"
    # float-cast-overflow is as undefined as the rest, but no part of GCC's "undefined"; vptr needs
    # C++ libraries that no kernel has. Optimised it would take three times as long to compile and
    # run no faster: checks are most of it.
    MEMORY = (
        "-O0 -g -fsanitize=address,undefined,float-cast-overflow -fno-sanitize=vptr "
        "-fsanitize-recover=address"  # so that one process can show more than one mistake
    )
    RACES = "-O1 -g -fsanitize=thread"


def library_of(source: Path, build: Build) -> Path:
    """The library of a kernel file, built unless it is there. Any number of processes may call."""
    command = _command(build)
    digest = hashlib.sha256("\n".join([str(source), *command, _compiler()]).encode())
    for part in sorted(_parts(source) | _parts(EMULATOR / "cuda_emu.h")):
        digest.update(part.read_bytes())
    digest.update((EMULATOR / "shared_memory.ld").read_bytes())
    name = f"{source.stem}-{build.name.lower()}"
    library = LIBRARIES / f"{name}-{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library
    LIBRARIES.mkdir(parents=True, exist_ok=True)
    with FileLock(LIBRARIES / f"{name}.lock"):
        if not library.exists():
            _compile(source, command, library)
            _forget_all_but_latest(f"{name}-*.so")
    return library


def _forget_all_but_latest(pattern: str) -> None:
    """Keeps as many as two people who try something would go back and forth between."""
    by_age = sorted(LIBRARIES.glob(pattern), key=lambda library: library.stat().st_mtime_ns)
    for library in by_age[:-_KEPT]:
        library.unlink()


def _compile(source: Path, command: list[str], library: Path) -> None:
    text = f'#include "cuda_emu.h"\nnamespace {{\n#include "{source}"\n}}\n'
    unfinished = library.with_suffix(f".{os.getpid()}")
    done = subprocess.run(
        [*command, "-x", "c++", "-", "-o", str(unfinished)], input=text, text=True,
        capture_output=True, cwd=REPOSITORY,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"g++ cannot compile {source}:\n{done.stderr}")
    unfinished.replace(library)


def _command(build: Build) -> list[str]:
    folders = (EMULATOR, KERNELS, REPOSITORY)
    return [
        "g++",
        *_FLAGS,
        *build.value.split(),
        *(f"-I{folder}" for folder in folders),
        "-isystem",
        _cuda_headers(),
        f"-Wl,-T,{EMULATOR / 'shared_memory.ld'}",
    ]


@cache
def _cuda_headers() -> str:
    folder = pathfinder.find_nvidia_header_directory("cudart")
    if folder is None:
        raise RuntimeError("The emulator needs cuda_fp16.h: pip install -e '.[test]' brings it.")
    return str(folder)


@cache
def _compiler() -> str:
    return subprocess.run(["g++", "--version"], check=True, capture_output=True, text=True).stdout


def _parts(source: Path) -> set[Path]:
    """The file and all of ours that it includes, directly or not."""
    found: set[Path] = set()
    unread = [source]
    while unread:
        path = unread.pop()
        if path in found:
            continue
        found.add(path)
        for name in _INCLUDE.findall(path.read_bytes()):
            folders = (path.parent, EMULATOR, KERNELS, REPOSITORY)
            unread += [f / name.decode() for f in folders if (f / name.decode()).is_file()][:1]
    return found
