"""Vocabularies of every kind that the house reads, small enough to be made for a test."""

import json
from collections.abc import Mapping

from lowmoe.engine.text_parts import TOKENIZER, TextParts
from lowmoe.families.tokenizer_files import made_tokenizer
from tests.families.test_tokenizer_files import KINDS as PIECES
from tests.families.test_tokenizer_files import learned_vocabulary, trained, written
from tests.talking_mixtral import learned_tokenizer

# Every one has a token of its own that is matched whole and one that is never written.
END = "</s>"


def vocabulary_files() -> dict[str, Mapping[str, bytes]]:
    """The small files of each kind."""
    bytewise = learned_tokenizer()
    bytewise.add_special_tokens([END])
    bytewise.add_tokens(["<own>"])
    ranks = {token: rank for rank, token in enumerate(learned_vocabulary())}
    added = {
        len(ranks): {"content": END, "special": True},
        len(ranks) + 5: {"content": "<own>", "special": False},  # ids between them have no names
    }
    config = {"tokenizer_config.json": json.dumps({"added_tokens_decoder": added}).encode()}
    pieces = {
        f"pieces, {kind}": {"tokenizer.model": trained(**how)} for kind, how in PIECES.items()
    }
    return {
        "byte-level": {TOKENIZER: bytewise.to_str().encode()},
        "ranks": _made("kimi_k2", {"tiktoken.model": written(ranks), **config}),
        **{kind: _made("mixtral", files) for kind, files in pieces.items()},
    }


def _made(model_type: str, files: Mapping[str, bytes]) -> Mapping[str, bytes]:
    data = made_tokenizer(model_type, files.get)
    assert data is not None
    return {TOKENIZER: data}


def text_parts(kind: str) -> TextParts:
    """Those of one kind."""
    return TextParts(vocabulary_files()[kind].get)
