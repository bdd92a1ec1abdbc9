"""Passes of a decoder on an NVIDIA card: CUDA sources, compiled by NVRTC for the card that is here.

`ops` says what can be computed, as torch ops. `launches` choose a kernel and a grid for each;
`kernels` are the CUDA sources; `launch` is all that the former know of whoever runs the latter.

On a card: `card` finds it or says what is missing, `compile` makes machine code and keeps it,
`on_card` runs it. `cubin` reads names from machine code.
"""
