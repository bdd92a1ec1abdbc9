"""Runs Python under the sanitizers that kernels were built for.

Knows:        what must be loaded before Python, and which options they need.
Ignorant of:  what is run.
"""

import os
import re
import subprocess
import sys
from functools import cache

from tests.cuda_emulator.build import REPOSITORY, Build

_LIBRARIES = {Build.MEMORY: ("libasan.so", "libubsan.so"), Build.RACES: ("libtsan.so",)}
_REPORTS = {
    Build.MEMORY: ("ERROR: AddressSanitizer", "runtime error:"),
    Build.RACES: ("WARNING: ThreadSanitizer", "FATAL: ThreadSanitizer"),
}
# Addresses more random than ThreadSanitizer knows, where nobody may turn that off.
NOT_HERE = "FATAL: ThreadSanitizer: unexpected memory mapping"


def run_under(build: Build, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """python -m module arguments..., to its end; the sanitizers report on stderr."""
    libraries = [_path(name) for name in _LIBRARIES[build]]
    options = {
        "LD_PRELOAD": ":".join(libraries),
        # Python keeps what it allocates until it ends; a kernel allocates nothing.
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # Of what was built without the sanitizer it would see accesses, but no locks. All kernels
        # share one piece of shared memory: its addresses may be reported again.
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:suppress_equal_addresses=0",
        # Tensors in memory of their own rather than in Python's arenas.
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [*_without_random_addresses(), sys.executable, "-m", module, *arguments],
        env=os.environ | options,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )


def said_in_parts(stderr: str) -> dict[str, str]:
    """What follows the lines "== NAME", by name."""
    said: dict[str, str] = {}
    for part in re.split(r"^== ", stderr, flags=re.MULTILINE)[1:]:
        name, _, text = part.partition("\n")
        said[name] = said.get(name, "") + text
    return said


def is_reported(build: Build, text: str) -> bool:
    """Whether it holds a report of the build's sanitizers."""
    return any(report in text for report in _REPORTS[build])


@cache
def _without_random_addresses() -> tuple[str, ...]:
    """A command's beginning that turns them off, where that is allowed."""
    prefix = ("setarch", "-R")
    try:
        allowed = subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        allowed = False
    return prefix if allowed else ()


@cache
def _path(library: str) -> str:
    found = subprocess.run(
        ["g++", f"-print-file-name={library}"], check=True, capture_output=True, text=True
    ).stdout.strip()
    if not os.path.isabs(found):
        raise RuntimeError(f"g++ has no {library}: install the sanitizers' package of your system.")
    return found
