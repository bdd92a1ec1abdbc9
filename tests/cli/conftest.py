"""How the command line is run: in this process, so that torch is imported once."""

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from lowmoe.cli.app import main


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What a command left: its exit code and what it wrote."""

    code: object
    out: str
    err: str


RunCommand = Callable[..., Done]


@pytest.fixture
def lowmoe_command(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> RunCommand:
    """Runs `lowmoe ARGUMENTS` with stdin, which is no terminal, in a home of its own."""

    def run(*arguments: object, stdin: str = "") -> Done:
        monkeypatch.setattr(sys, "argv", ["lowmoe", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return Done(code=ended.value.code or 0, out=said.out, err=said.err)

    return run
