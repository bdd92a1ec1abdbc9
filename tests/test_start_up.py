"""What starting up costs: which packages are imported before anything was asked for."""

import subprocess
import sys

import pytest

HEAVY = ["huggingface_hub", "numpy", "prompt_toolkit", "rich", "tokenizers", "torch"]
HEAVY += ["transformers"]
REPORT = f"import sys; print('heavy', list(filter(sys.modules.__contains__, {HEAVY})))"


def heavy_imports_after(code: str) -> tuple[str, str]:
    """What a fresh interpreter printed, and which heavy packages it had imported at its end."""
    done = subprocess.run(
        [sys.executable, "-c", f"import atexit\natexit.register(lambda: exec({REPORT!r}))\n{code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    *said, last = done.stdout.splitlines()
    return "\n".join(said), last


def test_importing_lowmoe_imports_nothing_heavy() -> None:
    assert heavy_imports_after("import lowmoe") == ("", "heavy []")


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["quantize", "-h"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    said, heavy = heavy_imports_after(
        f"import sys; sys.argv = ['lowmoe', *{arguments}]\nfrom lowmoe.cli.app import main; main()"
    )

    assert "Usage: lowmoe" in said
    assert heavy == "heavy []"


def test_using_the_library_does_import_torch() -> None:
    # The other tests would pass if the list of modules were read too early.
    assert "'torch'" in heavy_imports_after("import lowmoe; lowmoe.load")[1]


def test_reading_begins_before_torch_is_imported() -> None:
    said, heavy = heavy_imports_after(
        """
import lowmoe.cli.app as app, lowmoe.library.early_reads as early, sys
def begins(model, settings):
    print(model, "torch" in sys.modules)
    raise SystemExit
early.begin_early_reads = begins
for command in "run", "serve":
    sys.argv = ["lowmoe", command, "some/model"]
    try: app.main()
    except SystemExit: pass
"""
    )

    assert said == "some/model False\nsome/model False"
    assert heavy == "heavy []"
