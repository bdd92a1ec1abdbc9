"""The text a conversion measures activations on, as tokens.

Knows:        the text that comes with lowmoe, how a text is shared out over a limit.
Ignorant of:  what is measured.
"""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import torch
import xxhash

from lowmoe.engine.text_parts import TOKENIZER, TextParts
from lowmoe.errors import TextError, UsageError
from lowmoe.families import Family
from lowmoe.library.options import MakeOptions
from lowmoe.loader.convert import CalibrationText

CALIBRATION_TOKENS = 8192
CALIBRATION_SEQUENCE = 1024
SECTION_BREAK = "\n<|section|>\n"


def calibration_tokens(options: MakeOptions) -> int:
    """The most tokens that will be run through the model."""
    return CALIBRATION_TOKENS if options.calibrates else 0


def calibration_text(
    path: Path | None, small_files: Mapping[str, bytes], family: Family
) -> CalibrationText:
    """At most CALIBRATION_TOKENS of a file's text, None for the text that comes with lowmoe.

    Raises TextError without a tokenizer or with that of another model, UsageError for a file that
    cannot be read or is empty.
    """
    if TOKENIZER not in small_files:
        raise TextError(
            f"the checkpoint has no {TOKENIZER}, but calibration needs to read text. Add the file, "
            "or give --no-calibration."
        )
    text = _read_text(path)
    tokenizer = TextParts(small_files.get).tokenizer
    ids = section_tokens(
        [tokenizer.encode(s, add_special=False) for s in text.split(SECTION_BREAK)],
        CALIBRATION_TOKENS,
    )
    if not ids:
        raise UsageError("the calibration text is empty. Give a file with a few pages of text.")
    if max(ids) >= family.spec.n_vocab:
        raise TextError(
            f"{TOKENIZER} gives token id {max(ids)}, but config.json has a vocabulary of "
            f"{family.spec.n_vocab}. They look like different models; download both again."
        )
    length = min(CALIBRATION_SEQUENCE, family.spec.context_length)
    return CalibrationText(
        sequences=torch.split(torch.tensor(ids), length),
        text_hash=xxhash.xxh3_128_hexdigest(text.encode()),
    )


def _read_text(path: Path | None) -> str:
    if path is None:
        return (resources.files("lowmoe") / "loader" / "calibration.txt").read_text("utf-8")
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{path}: cannot be read as UTF-8 text ({e}).") from e


def section_tokens(sections: list[list[int]], limit: int) -> list[int]:
    """At most `limit` tokens, taken from all sections as evenly as they allow, in their order."""
    room, share = limit, {}
    for left, index in enumerate(sorted(range(len(sections)), key=lambda i: len(sections[i]))):
        share[index] = min(len(sections[index]), room // (len(sections) - left))
        room -= share[index]
    return [token for i, section in enumerate(sections) for token in section[: share[i]]]
