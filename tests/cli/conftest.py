"""How the command line is run: in this process, so that torch is imported once."""

import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor

from lowmoe.cli.app import main
from lowmoe.engine.sampling import Sampler
from lowmoe.engine.text_parts import TextParts
from lowmoe.engine.thinking import thinking_of
from tests.talking_mixtral import learned_tokenizer


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


@pytest.fixture
def thinking_answers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What models answer from now on, each once; they think between `<think>` and `</think>`."""
    answers: list[str] = []
    tokenizer = learned_tokenizer()

    def scripted(self: Sampler, scores: Tensor, context: Sequence[int]) -> int:
        ids = tokenizer.encode(answers[0]).ids
        n_said = next(
            n for n in range(len(ids), -1, -1) if list(context[-n:] if n else []) == ids[:n]
        )
        if n_said < len(ids):
            return ids[n_said]
        del answers[0]
        return 0  # ends an answer

    monkeypatch.setattr(Sampler, "pick", scripted)
    thinking = thinking_of("</think>")
    monkeypatch.setattr(TextParts, "thinking", thinking)
    return answers
