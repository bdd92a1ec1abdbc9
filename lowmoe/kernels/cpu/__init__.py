"""Kernels for the CPU, written in C++: trellis planes multiplied straight from their bits."""
