"""Damages to a safetensors file's bytes, the same for the same generator."""

import random


def mutated_bytes(data: bytes, pick: random.Random) -> bytes:
    """Other bytes in the header, rarely further on; sometimes fewer or more of them."""
    n_header = 8 + int.from_bytes(data[:8], "little")
    end = n_header if pick.random() < 0.8 else len(data)
    for _ in range(pick.choice([1, 1, 1, 2, 5])):
        place = pick.randrange(end)
        new = pick.choice([b"", b"0", b"9", b"-", b'"', b"[", b",", pick.randbytes(1)])
        data = data[:place] + new + data[place + pick.choice([0, 1, 1, 1, 3]) :]
    return data[: pick.randrange(len(data))] if pick.random() < 0.05 else data
