"""How a checkpoint may keep tensors otherwise than one by one, rows out and columns in.

Knows:        several in one, experts in one, columns for rows, pairs of channels for halves, heads
              that lie apart.
Ignorant of:  which family keeps which tensor how.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A tensor that holds several roles' or lies otherwise.

    name: its template; holds: the roles in it, one above the other, () for one role alone;
    interleaved: their rows take turns instead; experts: None for a tensor of each expert, "axis"
    for a first axis [E, ...], "rows" for one above the other; transposed: columns in, rows out;
    in_heads: head by head instead, each head's rows of one role above those of the next role;
    leading_one: vectors are [1, n]; middle_one: matrices are [rows, 1, columns]; less_one: weights
    are kept less 1; minus_exp: each is kept as -exp of itself; tiled: of rows or columns in heads,
    one of each head of keys in turn, where the decoder wants those of a head of keys side by side;
    pairs: channels that rope turns against each other stand side by side within a head, where the
    decoder wants halves.
    """

    name: str
    holds: tuple[str, ...] = ()
    interleaved: bool = False
    in_heads: bool = False
    experts: Literal["axis", "rows"] | None = None
    transposed: bool = False
    leading_one: bool = False
    middle_one: bool = False
    less_one: bool = False
    minus_exp: bool = False
    tiled: Literal["rows", "columns"] | None = None
    pairs: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What to read for one role, and how to make it a tensor [rows out, columns in].

    name, shape: of the whole tensor; first, count: of its first axis, what is read; transposed: to
    be turned over then; rows: those that are the role's then, of each of n_heads equal parts;
    wanted: its shape; pairs: (head size, first channel, channels) where pairs are to become halves;
    less_one: 1 is to be added; minus_exp: the logarithm of its negative is wanted; tiled: (axis,
    where on it heads begin, heads of keys, heads) where heads are to be put side by side.
    """

    name: str
    shape: tuple[int, ...]
    first: int
    count: int
    transposed: bool
    rows: slice
    wanted: tuple[int, ...]
    pairs: tuple[int, int, int] | None
    n_heads: int = 1
    less_one: bool = False
    minus_exp: bool = False
    tiled: tuple[int, int, int, int] | None = None
