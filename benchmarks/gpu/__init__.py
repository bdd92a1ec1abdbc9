"""Kernels for NVIDIA cards beside what the card allows; benchmarks/on_gpu.sh runs all of it."""
