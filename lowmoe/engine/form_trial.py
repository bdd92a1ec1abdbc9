"""A process of its own that tries whether a form can be compiled: what hangs or crashes is this.

Knows:        llguidance.
Ignorant of:  everything else of this package: it runs as a file, before any of it is imported.

Reads {"grammar": ..., "special": [...], "limits": {...}, "seconds": ..., "path": [...]} from
standard input, path being where modules are, and writes {"fault": ...}, empty if there is
none. Another exit status than 0 is a crash.
"""

import contextlib
import json
import os
import random
import re
import sys
import threading
from collections.abc import Collection
from typing import Any

# What compiles on half of any thread's stack will not overflow a whole one.
STACK_BYTES = 4 << 20
MEMORY_BYTES = 1 << 30
STEPS = 16
END = 256  # beside a token for every byte
MAX_IDS = 1 << 20  # no vocabulary has a quarter of it

_NAMED = re.compile(r"<\[(\d{1,9})\]>")


class _Bytes:
    """The vocabulary: what is wrong with a form does not depend on one."""

    eos_token_id, bos_token_id = END, None

    def __init__(self, named: Collection[int], special: Collection[str]) -> None:
        """named: the tokens that the form names by their ids, which must be there; special: those
        that it may name as they are spelled.
        """
        n_ids = 1 + max([END, *named])
        self.tokens = [*(bytes([byte]) for byte in range(256)), b"\xff<end>"]
        self.tokens += [b"\xff<%d>" % token_id for token_id in range(END + 1, n_ids)]
        self.tokens += [b"\xff" + token.encode() for token in special]
        self.special_token_ids = [*range(END, len(self.tokens))]

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def fault(grammar: str, limits: dict[str, Any], special: Collection[str]) -> str:
    """What llguidance finds wrong, now or in its first steps along a random text."""
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

    named = sorted({int(found) for found in _NAMED.findall(grammar) if int(found) < MAX_IDS})
    tokenizer = LLTokenizer(TokenizerWrapper(_Bytes(named, special)))
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(**limits))
    choose = random.Random(0)
    for _ in range(STEPS):
        if matcher.is_error() or matcher.is_stopped():
            break
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [i for i in (*range(256), *named) if i != END and mask >> i & 1]
        if not allowed:
            break
        matcher.consume_token(choose.choice(allowed))
    return str(matcher.get_error())


def _main() -> None:
    asked = json.load(sys.stdin)
    # Begun with -I, lest modules beside this file stand in for Python's own; llguidance may be
    # where only PYTHONPATH or a user's folder leads.
    sys.path[:] = asked["path"]
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import llguidance  # noqa: F401  # what loading it takes is not the form's

    found: list[str] = []
    threading.stack_size(STACK_BYTES)
    trial = threading.Thread(
        target=lambda: found.append(fault(asked["grammar"], asked["limits"], asked["special"])),
        daemon=True,
    )
    trial.start()
    trial.join(asked["seconds"])  # llguidance lets other threads run
    if trial.is_alive():
        found = [f"it is not compiled within {asked['seconds']} s"]
    elif not found:  # an exception, which has been written to standard error
        os._exit(1)
    json.dump({"fault": found[0]}, sys.stdout)
    sys.stdout.flush()
    os._exit(0)  # not waiting for what cannot be interrupted


if __name__ == "__main__":
    _main()
