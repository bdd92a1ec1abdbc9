"""Which kernels a cubin holds.

Knows:        as much of ELF as names its sections.
Ignorant of:  what is in them.
"""

import struct

_TEXT = b".text."  # each kernel's code has a section of its own, .text.NAME


def kernel_names(cubin: bytes) -> list[str]:
    """The kernels of a cubin, an ELF file of 64 bits, little-endian, sorted.

    Raises ValueError if it is something else.
    Source: System V ABI, "Object Files", section header table.
    """
    if cubin[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"a cubin begins as ELF of 64 bits, but this with {cubin[:6]!r}")
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry_bytes, n_sections, names_section = struct.unpack_from("<HHH", cubin, 0x3A)
    entries = [table + i * entry_bytes for i in range(n_sections)]
    # A section's entry begins with where its name begins in the section of names; at 0x18 is where
    # the section itself begins.
    (names,) = struct.unpack_from("<Q", cubin, entries[names_section] + 0x18)
    found = (_word(cubin, names + struct.unpack_from("<I", cubin, e)[0]) for e in entries)
    return sorted(name[len(_TEXT) :].decode() for name in found if name.startswith(_TEXT))


def _word(content: bytes, begin: int) -> bytes:
    return content[begin : content.index(b"\0", begin)]
