"""popularity.json: how many tokens of the calibration text went to each expert, for a start.

    {"tokens": 8192, "counts": [[1021, 2044, ...], ...]}      by layer, by expert; optional

Knows:        its JSON.
Ignorant of:  who counted, what a start is.
"""

import json
from collections.abc import Sequence

from lowmoe.errors import FolderError

POPULARITY = "popularity.json"


def popularity_json(counts: Sequence[Sequence[int]], n_tokens: int) -> bytes:
    """The file's content.  counts: of each layer, of each of its experts."""
    values = {"tokens": n_tokens, "counts": [list(layer) for layer in counts]}
    return json.dumps(values, separators=(",", ":")).encode() + b"\n"


def read_popularity(data: bytes, n_experts: Sequence[int]) -> list[list[float]]:
    """The share of tokens that went to each expert of each layer.

    n_experts: of each layer.  Raises FolderError for what is no such file, or another model's.
    """
    try:
        values = json.loads(data)
        counts, n_tokens = values["counts"], values["tokens"]
        shares = [[count / n_tokens for count in layer] for layer in counts]
        if [len(layer) for layer in shares] != list(n_experts):
            raise ValueError(f"{[len(layer) for layer in shares]} experts by layer")
        if not all(0 <= share <= 1 for layer in shares for share in layer):
            raise ValueError("a share of tokens is not between 0 and 1")
    except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as e:
        raise FolderError(
            f"{POPULARITY}: not the counts of {sum(n_experts)} experts in {len(n_experts)} layers "
            f"({e}). Make the model again."
        ) from e
    return shares
