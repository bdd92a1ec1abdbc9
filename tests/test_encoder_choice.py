"""Which encoder makes a folder: native code, or torch where LOWMOE_ISA asks for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowmoe.engine.report import SilentReporter
from lowmoe.errors import UsageError
from lowmoe.kernels.cpu import isas
from lowmoe.kernels.cpu.encode import NativeEncoder
from lowmoe.library import making
from lowmoe.library.making import quantize_checkpoint
from lowmoe.library.options import MakeOptions

QUICK = MakeOptions(bits=2, calibrate=False, threads=3)


@pytest.fixture
def coded_by(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What has coded each matrix: an instruction set and threads, or "torch"."""
    found: list[object] = []

    def remembering(name: Callable[..., object], encode: Callable[..., Any]) -> Callable[..., Any]:
        def remembered(*arguments: Any, **named: Any) -> Any:
            found.append(name(*arguments))
            return encode(*arguments, **named)

        return remembered

    native = remembering(lambda encoder, *_: (encoder.isa, encoder.threads), NativeEncoder.encode)
    monkeypatch.setattr(NativeEncoder, "encode", native)
    in_torch = remembering(lambda *_: "torch", making.encode_planes)
    monkeypatch.setattr(making, "encode_planes", in_torch)
    return found


@pytest.mark.parametrize("forced", [None, *isas()])
def test_native_code_encodes_on_the_best_instruction_set_or_the_one_asked_for(
    talking_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    coded_by: list[object],
    forced: str | None,
) -> None:
    monkeypatch.setenv("LOWMOE_ISA", forced or "")
    quantize_checkpoint(talking_checkpoint, tmp_path / "model", QUICK, SilentReporter())
    assert set(coded_by) == {(forced or isas()[0], 3)}


def test_torch_encodes_where_it_is_asked_for(
    talking_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    coded_by: list[object],
) -> None:
    monkeypatch.setenv("LOWMOE_ISA", "torch")
    quantize_checkpoint(talking_checkpoint, tmp_path / "model", QUICK, SilentReporter())
    assert set(coded_by) == {"torch"}


def test_an_instruction_set_that_is_not_here_is_refused(
    talking_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWMOE_ISA", "z80")
    with pytest.raises(UsageError, match="LOWMOE_ISA is 'z80', but this processor runs"):
        quantize_checkpoint(talking_checkpoint, tmp_path / "model", QUICK, SilentReporter())
