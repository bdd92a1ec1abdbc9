"""Packages as they were published, by npm.

Knows:        how to ask for one.
Ignorant of:  what is in it.
"""

import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest


def file_of(package: str, name: str, folder: Path) -> bytes:
    """A file of a package as it was published.  Skips where npm is not there to ask for it."""
    with tarfile.open(packed_by_npm(package, folder)) as packed:
        member = packed.extractfile(name)
        assert member is not None
        return member.read()


def packed_by_npm(package: str, folder: Path) -> Path:
    if shutil.which("npm") is None:
        pytest.skip("npm is not there")
    told = subprocess.run(
        ["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
    )
    return folder / told.stdout.strip()
